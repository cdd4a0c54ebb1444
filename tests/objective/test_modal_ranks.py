"""Two ranks with a part of the samples each find the loss and gradients of one rank with all, modalities missing on both."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from esvit_scale.models.trunk import Features, SignalFeatures
from tests.objective import test_esvit_modalities, test_vatt

CASES: dict[str, Any] = {"vatt": test_vatt, "esvit_modalities": test_esvit_modalities}


def part_of(f: Features, samples: slice, total: int) -> Features:
    """The features of some samples, as leaves."""

    def cut(x: Tensor) -> Tensor:
        return x.detach().unflatten(0, (-1, total))[:, samples].flatten(0, 1)

    def leaf(x: Tensor) -> Tensor:
        return cut(x).requires_grad_(x.requires_grad)

    few = len(range(total)[samples])
    grids = [(n // total * few, h, w) for n, h, w in f.grids]
    groups = f.regions.split([n * h * w for n, h, w in f.grids]) if len(f.regions) else []
    rows = [
        group.detach().unflatten(0, (n // total, total, h * w))[:, samples].flatten(0, 2)
        for group, (n, h, w) in zip(groups, f.grids, strict=False)
    ]
    regions = torch.cat(rows).requires_grad_(f.regions.requires_grad) if rows else f.regions[:0]
    signals = {
        name: SignalFeatures(leaf(s.view), leaf(s.tokens), cut(s.valid), cut(s.present))
        for name, s in f.signals.items()
    }
    return Features(leaf(f.view), regions, grids, signals, f.has_image[samples])


def given(case: str) -> tuple[nn.Module, Features, Features | None, int]:
    """The same objective and features in every process."""
    torch.manual_seed(5)
    module = CASES[case]
    features = module.features_of()
    student, teacher = (features, None) if case == "vatt" else features
    return module.objective_of(), student, teacher, module.B


def step(case: str, samples: slice) -> tuple[Tensor, list[Tensor], Tensor, dict[str, Tensor]]:
    """Loss, gradients of parameters, gradient of the images' views, and extra state after a commit."""
    objective, student, teacher, total = given(case)
    own: Any = part_of(student, samples, total)
    targets = None
    if teacher is not None:
        with torch.no_grad():
            targets = objective.targets(part_of(teacher, samples, total))
    loss, _ = objective(own, targets, 0.06)
    objective.commit()
    *of_parameters, of_view = torch.autograd.grad(loss, [*objective.parameters(), own.view])
    return loss.detach(), list(of_parameters), of_view, objective.extra_state()


def of_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        loss, of_parameters, of_view, state = step(case, slice(3 * rank, 3 * rank + 3))
        for x in (loss, *of_parameters):
            dist.all_reduce(x)
            x /= 2
        found[case] = (loss, of_parameters, of_view / 2, state)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_match_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(of_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for case in CASES:
        loss, of_parameters, of_view, state = step(case, slice(0, 6))
        whole = of_view.unflatten(0, (-1, 6))
        for rank, found in enumerate(ranks):
            torch.testing.assert_close(found[case][0], loss, rtol=0, atol=1e-9)
            torch.testing.assert_close(found[case][1], of_parameters, rtol=0, atol=1e-9)
            own = whole[:, 3 * rank : 3 * rank + 3].flatten(0, 1)
            torch.testing.assert_close(found[case][2], own, rtol=0, atol=1e-9)
            torch.testing.assert_close(found[case][3], state, rtol=0, atol=1e-9)
