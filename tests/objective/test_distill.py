"""The loss of distillation and its gradients against loops in float64, and what it costs."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.models.trunk import Features
from esvit_scale.objective import costs
from esvit_scale.objective.distill import DistillCosine, DistillPrototypes
from esvit_scale.objective.network import build_frozen_teacher, build_network
from esvit_scale.objective.objective import Objective
from esvit_scale.scaling import plan as plans
from tests import launcher
from tests import test_conformance as conformance
from tests.objective.distillation import BOTH, TEMP, planned

B = 3
GRIDS = [(2 * B, 2, 3), (2 * B, 2, 2), (1 * B, 1, 2)]


def objectives_of(targets: str, regions: bool) -> tuple[Objective, Objective, int, int]:
    """Student's and teacher's side in float64, and the widths of their features; all values are random."""
    config = conformance.config_of("swin_t", "distill", objective__targets=targets, objective__regions=regions)
    network = build_network(config)
    teacher = build_frozen_teacher(config, network.objective)
    for module in (network.objective, teacher.objective):
        module.double()
        for p in module.parameters():
            p.data = torch.randn_like(p)
    return network.objective, teacher.objective, network.trunk.dim, teacher.trunk.dim


def features(grids: list[tuple[int, int, int]], dim: int) -> Features:
    regions = torch.randn(sum(n * h * w for n, h, w in grids), dim, dtype=torch.float64, requires_grad=True)
    parts = regions.split([n * h * w for n, h, w in grids])
    view = torch.cat([x.view(n, h * w, dim).mean(1) for x, (n, h, w) in zip(parts, grids, strict=True)])
    return Features(view, regions, grids)


def crops_of(f: Features) -> list[list[tuple[Tensor, Tensor]]]:
    """For every crop of an image, and every image: view [C] and regions [T, C]."""
    found, parts = [], f.regions.split([n * h * w for n, h, w in f.grids])
    views = iter(f.view)
    for x, (n, h, w) in zip(parts, f.grids, strict=True):
        found += [(next(views), regions) for regions in x.view(n, h * w, -1)]
    return [found[i : i + B] for i in range(0, len(found), B)]


def slow_loss(student: Objective, teacher: Objective, f: Features, t: Features, centers: dict[str, Tensor]) -> Tensor:
    """Pair by pair: teacher crops, student crops, images, regions."""

    def logits(head: Any, x: Tensor) -> Tensor:
        rows = head.last_layer.weight_g * F.normalize(head.last_layer.weight_v, dim=1)
        return rows @ F.normalize(head.mlp(x), dim=0)

    def distance(part: str, ours: Tensor, theirs: Tensor) -> Tensor:
        if isinstance(student, DistillCosine):
            projected = getattr(student, f"{part}_projection")(ours)
            return 1 - F.cosine_similarity(projected, theirs, dim=0)
        p = ((logits(getattr(teacher, f"{part}_head"), theirs) - centers[part]) / TEMP).softmax(0)
        return -(p.detach() * (logits(getattr(student, f"{part}_head"), ours) / 0.1).log_softmax(0)).sum()

    of_student, of_teacher = crops_of(f), crops_of(t)
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for teacher_crop in range(2):
        for v, crop in enumerate(of_student):
            pairs += 1
            for b in range(B):
                view, regions = crop[b]
                their_view, their_regions = of_teacher[teacher_crop][b]
                of_view = distance("view", view, their_view.detach())
                if not student.needs_regions:
                    total = total + of_view / B
                    continue
                of_regions = torch.zeros((), dtype=torch.float64)
                for i, region in enumerate(regions):
                    cosines = [F.cosine_similarity(region, g, dim=0).item() for g in of_student[teacher_crop][b][1]]
                    j = i if v == teacher_crop else cosines.index(max(cosines))
                    of_regions = of_regions + distance("region", region, their_regions[j].detach()) / len(regions)
                total = total + (0.5 * of_view + 0.5 * of_regions) / B
    return total / pairs


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("targets", BOTH)
@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1]], ids=["multi-crop", "two globals"])
def test_loss_and_gradients_match_loops(targets: str, regions: bool, grids: list[tuple[int, int, int]]) -> None:
    """Of the student's parameters and features, with a teacher of another width."""
    student, teacher, dim, other = objectives_of(targets, regions)
    assert other != dim
    f, t = features(grids, dim), features(GRIDS[:1], other)
    centers = {part: torch.randn(64, dtype=torch.float64) for part in ("view", "region")}
    if targets == "prototypes":
        of_heads = ("view", "region") if regions else ("view",)
        student.load_extra_state({f"{part}.values": centers[part] for part in of_heads})
    with torch.no_grad():
        given = teacher.targets(t)
    loss, logs = student(f, given, TEMP)
    expected = slow_loss(student, teacher, f, t, centers)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    leaves = [f.regions, *student.parameters()]
    for found, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    parts = [0.5 * logs["loss_view"] + 0.5 * logs["loss_region"]] if regions else [logs["loss_view"]]
    torch.testing.assert_close(parts[0], loss.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("trunk", ["resnet50", "vil_2262"])
def test_cosine_trains_every_parameter(trunk: str) -> None:
    """The step that conformance tests take with prototypes."""
    config = conformance.config_of(trunk, "distill", objective__targets="cosine", objective__regions=True)
    student, loss, logs = conformance.train_once(config)
    assert loss.isfinite()
    assert {"loss_view", "loss_region"} <= logs.keys()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


def test_plan_counts_the_teacher() -> None:
    config, plain = planned(), configs.resolve("swin_t")
    swin_b = configs.resolve("swin_b")
    trunks = 2 * (costs.crop_flops(swin_b, 224) - costs.crop_flops(plain, 224))
    heads = (2 + 2 * 49) * 2 * (1024 - 768) * 2048  # the first layer of the teacher's heads, for its tokens
    assert costs.image_flops(config) - costs.image_flops(plain) == trunks + heads
    found, without = (plans.plan(c, 8, 80 * 2**30, None, None) for c in (config, plain))
    parameters = sum(costs.parameters(swin_b))
    for setting in found.settings:
        assert setting.memory.frozen == pytest.approx(2 * parameters / (8 if setting.stage == 3 else 1), rel=1e-3)
    assert found.numbers["checkpoint_bytes"] == without.numbers["checkpoint_bytes"]
    assert "\nfrozen " in plans.table(found, config, 8)
    assert "frozen" not in plans.table(without, plain, 8)
    bare = plans.plan(planned(targets="cosine"), 8, 80 * 2**30, None, None)
    assert bare.settings[0].memory.frozen == 2 * costs.parameters(swin_b).trunk


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("targets", "kind"), [("prototypes", DistillPrototypes), ("cosine", DistillCosine)])
def test_formulas_give_what_a_trace_counts(
    targets: str, kind: type[Objective], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = conformance.config_of(
        "swin_t", "distill", objective__targets=targets, objective__regions=True, train__precision=precision
    )
    flops, kept = costs.image_flops(config, "executed"), costs.kept(config).outside
    monkeypatch.setattr(kind, "formulas", lambda self: None)
    try:
        traced = costs.image_flops(config, "executed")
    except NotImplementedError:  # of torch 2.7, for heads with weight norm; a run needs the formulas only
        pytest.skip("this torch cannot trace the backward of a weight norm")
    assert traced == flops
    # The formulas of heads count what grows with their widths, which are small here.
    assert costs.kept(config).outside.per_image == pytest.approx(kept.per_image, rel=0.02)


@pytest.mark.slow
def test_benchmark_rows_are_configs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("distill", launcher.REPOSITORY / "benchmarks" / "distill.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trunk = costs.parameters(module.recipe(tmp_path, "alone", 0, 3, [])).trunk
    assert 3.5 < costs.parameters(module.recipe(tmp_path, "teacher", 0, 3, module.TEACHER)).trunk / trunk < 4.5
    for row, overrides in module.ROWS.items():
        config = module.recipe(tmp_path, row, 0, 3, overrides)
        assert config.objective.teacher == (None if row == "alone" else str(tmp_path / module.TAKEN))
        assert config.objective.regions
