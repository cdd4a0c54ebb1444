"""Objectives with random features, small and in float64: shared by the tests of every objective and by their ranks."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initialize
from esvit_scale.models.trunk import Features
from esvit_scale.objective.network import build_network
from esvit_scale.objective.objective import Objective
from esvit_scale.objective.registry import OBJECTIVES
from tests import tiny

B, C = 12, 10
SIZES = {"head_hidden": 14, "bottleneck": 6, "predictor_hidden": 9, "prototypes": 20}
NO_TEACHER = {"ema_momentum": 0.0, "ema_momentum_end": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "dino": {},
    "dino-sinkhorn": {"name": "dino", "centering": "sinkhorn"},
    "esvit-sinkhorn": {"name": "esvit", "centering": "sinkhorn"},
    "moco_v3": {"student_temp": 0.2},
    "byol": {},
    "simsiam": NO_TEACHER,
    "simclr": {"student_temp": 0.2, **NO_TEACHER},
    "swav": NO_TEACHER,
    "triplet": {},
}
MULTI_CROP = {"dino", "dino-sinkhorn", "esvit-sinkhorn", "swav"}
FEATURES = {"features", "regions"}  # among a Result's gradients
# Of a batch: the mean over ranks is not the whole batch's. How many prototypes are in use, and a spread.
UNEQUAL = {"projection_std", "prototypes_used_view", "prototypes_used_region"}
TEMP = 0.05


class Inputs(NamedTuple):
    """All of a step's: parameters and buffers of both networks, and the features of all images."""

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    features: Features
    teacher_features: Features


class Result(NamedTuple):
    loss: Tensor
    logs: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of every trainable parameter, and of the "features" in order


def section(case: str) -> dict[str, Any]:
    return {"name": case, **SIZES, **CASES[case]}


def module(case: str, values: dict[str, Tensor] | None = None) -> Objective:
    config = configs.Objective(**section(case))
    built = OBJECTIVES[config.name](C, config).double()
    if values is not None:
        built.load_state_dict(values)
    return built


def inputs(case: str, images: int = B) -> Inputs:
    """Fresh ones at every call."""
    regions, views = case.startswith("esvit"), 5 if case in MULTI_CROP else 2
    grids = [(2 * images, 2, 2), *([((views - 2) * images, 1, 2)] if views > 2 else [])]

    def random(grids: list[tuple[int, int, int]]) -> Features:
        tokens = torch.randn(sum(n * h * w for n, h, w in grids), C, dtype=torch.float64)
        if regions:
            return Features(pooled(tokens, grids), tokens, grids)
        return Features(pooled(tokens, grids), tokens[:0], [(n, 0, 0) for n, _, _ in grids])

    return Inputs(values(case), values(case), random(grids), random(grids[:1]))


def pooled(tokens: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    parts = tokens.split([n * h * w for n, h, w in grids])
    return torch.cat([x.view(n, h * w, -1).mean(1) for x, (n, h, w) in zip(parts, grids, strict=True)])


def values(case: str) -> dict[str, Tensor]:
    built = module(case)
    initialize(built, int(torch.randint(1 << 30, ())))
    with torch.no_grad():
        for name, p in built.named_parameters():
            if not name.endswith("weight_g"):
                p.add_(0.3 * torch.randn_like(p))
    return {name: value.clone() for name, value in built.state_dict().items()}


def part_of(f: Features, images: int, part: slice) -> Features:
    """The features of some images."""

    def cut(x: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        groups = x.split([n * max(h * w, 1) for n, h, w in grids])
        return torch.cat([g.view(n // images, images, -1, C)[:, part].reshape(-1, C) for g, (n, *_) in zip(groups, grids, strict=True)])  # fmt: skip

    few = len(range(images)[part])
    grids = [(n // images * few, h, w) for n, h, w in f.grids]
    view = cut(f.view, [(n, 1, 1) for n, _, _ in f.grids])
    return Features(view, cut(f.regions, f.grids) if len(f.regions) else f.regions, grids)


def step(case: str, given: Inputs, features: Features, teacher_features: Features) -> Result:
    """What the package computes."""
    student, teacher = module(case, given.student), module(case, given.teacher)
    leaf = Features(*(x.clone().requires_grad_() for x in features[:2]), features.grids)  # type: ignore[call-arg]
    with torch.no_grad():
        targets = teacher.targets(teacher_features) if teacher.has_teacher else None
    loss, logs = student(leaf, targets, TEMP)
    assert not any(value.requires_grad for value in logs.values())
    student.commit()
    return Result(loss.detach(), logs, gradients(loss, student, leaf))


def assert_ranks_agree(case: str, given: Inputs, ranks: tuple[Any, ...], expected: Result | None = None) -> None:
    """What two ranks with half of the images each found (tests/objective/ranks.py) against one rank with all."""
    expected = expected or step(case, given, given.features, given.teacher_features)
    loss, logs, of_parameters, of_ranks = ranks
    close = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(loss, expected.loss, **close)
    images = given.teacher_features.grids[0][0] // 2
    for name, gradient in expected.gradients.items():
        if name in FEATURES:
            whole = given.features._replace(**{"view" if name == "features" else name: gradient})
            for rank, found in enumerate(of_ranks):
                own = part_of(whole, images, slice(rank * images // 2, (rank + 1) * images // 2))
                torch.testing.assert_close(found[name], own.view if name == "features" else own.regions, **close)
        else:
            torch.testing.assert_close(of_parameters[name], gradient, **close)
    for name in logs.keys() - UNEQUAL:
        torch.testing.assert_close(logs[name], expected.logs[name], **close)


def gradients(loss: Tensor, student: nn.Module, features: Features) -> dict[str, Tensor]:
    leaves = {name: p for name, p in student.named_parameters() if p.requires_grad}
    leaves["features"] = features.view
    if len(features.regions):
        leaves["regions"] = features.regions
    found = torch.autograd.grad(loss, list(leaves.values()))  # an unused parameter is an error
    return dict(zip(leaves, found, strict=True))


def mlp(module: nn.Module, x: Tensor, parts: int = 1) -> Tensor:
    """A projector or predictor by torch's own functions, one part after the other."""
    rows = []
    for part in x.chunk(parts):
        for i, layer in enumerate(module.layers):
            part = F.linear(part, layer.weight, layer.bias)
            if i < len(module.norms):
                norm = module.norms[i]
                part = F.batch_norm(part, None, None, norm.weight, norm.bias, training=True)
            if i < len(module.layers) - 1:
                part = part.relu()
        rows.append(part)
    return torch.cat(rows)


def assert_same(found: Result, loss: Tensor, expected: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert abs(found.loss.item() - loss.item()) < tolerance
    assert found.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")  # fmt: skip


def error_of(case: str, **overrides: Any) -> str:
    """What refuses a tiny run with these overrides."""
    crops = {} if case in MULTI_CROP else {"data__local_crops": []}
    own = {f"objective__{key}": value for key, value in section(case).items()}
    try:
        build_network(tiny.config(Path("run"), Path("data"), **{**own, **crops, **overrides}))
    except UserError as error:
        return str(error)
    return ""
