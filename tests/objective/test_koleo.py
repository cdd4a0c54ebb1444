"""KoLeo against loops over its formula in float64, at its edges, in every objective, and over two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit_scale.errors import UserError
from esvit_scale.objective.koleo import koleo
from esvit_scale.objective.network import build_student
from esvit_scale.objective.registry import check_local_batch
from tests import test_conformance as conformance
from tests import tiny
from tests.objective.conftest import Ranks

B, C = 7, 5


def slow(view: Tensor, images: int) -> Tensor:
    """The formula: crops, images, all others."""
    total = torch.zeros((), dtype=torch.float64)
    for crop in range(2):
        rows = [row / row.norm() for row in view[crop * images : (crop + 1) * images]]
        for i, row in enumerate(rows):
            distances = [(row - other).norm() for j, other in enumerate(rows) if j != i]
            total = total - torch.stack(distances).min().log() / images
    return total


@pytest.mark.parametrize("views", [2, 5])
def test_loss_and_gradient_match_formula(views: int) -> None:
    view = (3 * torch.randn(views * B, C, dtype=torch.float64)).requires_grad_()
    loss, expected = koleo(view, B, across_ranks=False), slow(view, B)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    found, wanted = (torch.autograd.grad(value, view)[0] for value in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    assert not found[2 * B :].any()  # local crops take no part
    assert torch.autograd.gradcheck(lambda x: koleo(x, B, across_ranks=False), view)


def test_equal_images_have_a_finite_loss_and_no_gradient() -> None:
    """Copies are at distance 0, whose logarithm and the derivative of whose root are infinite."""
    one = torch.randn(1, C)
    view = torch.cat([one, one, torch.randn(1, C), torch.zeros(3, C)]).requires_grad_()
    loss = koleo(view, 3, across_ranks=False)
    (gradient,) = torch.autograd.grad(loss, view)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    alone = view.detach()[2:3].requires_grad_()
    apart = (alone / alone.norm() - one / one.norm()).norm().log() / -3
    torch.testing.assert_close(gradient[2:3], torch.autograd.grad(apart, alone)[0], rtol=1e-4, atol=1e-6)


def test_one_image_has_no_loss() -> None:
    assert koleo(torch.randn(2, C), 1, across_ranks=False) == 0


@pytest.mark.parametrize(("batch", "accum", "world", "across"), [(4, 1, 2, False), (8, 2, 2, False), (4, 2, 2, True)])
def test_ranks_that_have_nothing_to_compare_with_are_refused(
    tmp_path: Path, batch: int, accum: int, world: int, across: bool
) -> None:
    own = {"train__grad_accum": accum, "objective__koleo_weight": 0.1, "objective__koleo_across_ranks": across}
    config = tiny.config(tmp_path, tmp_path, train__global_batch=batch, **own)
    objective = build_student(config).objective
    check_local_batch(objective, config, world)
    alone = 1 if across else world
    small = tiny.config(tmp_path, tmp_path, train__global_batch=accum * alone, **own)
    with pytest.raises(UserError, match=rf"^objective.koleo_weight: .* at least .*={2 * accum * alone}$"):
        check_local_batch(objective, small, alone)


def test_bf16_features_are_compared_in_fp32() -> None:
    """Inside autocast too, where products would be bf16: neighbours at an angle of 1e-3 would be ties."""
    angles = torch.tensor([0.0, 1e-3, 3e-3, 1.0], dtype=torch.float64)
    view = torch.stack([angles.cos(), angles.sin()], 1).repeat(2, 1)
    exact = koleo(view, 4, across_ranks=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = koleo(view.float(), 4, across_ranks=False)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)  # 1e-3 · fp32's 6e-8 in a distance of 1e-3
    assert koleo(view.bfloat16(), 4, across_ranks=False).dtype == torch.float32


def test_two_ranks_match_one(ranks: Ranks) -> None:
    """An image's nearest neighbour may be on the other rank, and gets its part of the gradient there."""
    given, (loss, gradient) = ranks("koleo")
    view = given.features.view.clone().requires_grad_()
    images = given.teacher_features.grids[0][0] // 2
    expected = koleo(view, images, across_ranks=False)
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-9)
    globals_ = torch.autograd.grad(expected, view)[0][: 2 * images]
    torch.testing.assert_close(gradient, globals_, rtol=0, atol=1e-9)
    halves = [torch.cat([view[c * images :][: images // 2] for c in range(2)])]
    assert abs(koleo(halves[0], images // 2, across_ranks=True) - expected) > 1e-3  # not what a rank finds alone


@pytest.mark.parametrize("objective", conformance.SELF_SUPERVISED)
def test_every_objective_takes_it(objective: str) -> None:
    """The loss is the objective's and the weighted term's, and without a weight nothing is computed or logged."""
    changes: dict[str, Any] = {"objective__koleo_weight": 0.1}
    without = conformance.config_of("swin_t", objective)
    _, loss, logs = conformance.train_once(without)
    _, both, logs_of_both = conformance.train_once(conformance.config_of("swin_t", objective, **changes))
    assert logs_of_both.keys() - logs.keys() == {"loss_koleo"}
    torch.testing.assert_close(both, loss + 0.1 * logs_of_both["loss_koleo"], rtol=1e-6, atol=0)
    assert build_student(without).koleo_weight == 0
