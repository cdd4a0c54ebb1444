"""The loss of sparsification against slow loops, and its targets."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.data.mixing import mix_labels
from esvit_scale.errors import UserError
from esvit_scale.models.trunk import Features, Grid, Kept
from esvit_scale.objective.objective import LabelsAndTargets, joined_targets
from esvit_scale.objective.sparsify import DenseFeatures, Sparsify
from tests import test_conformance as conformance

GRIDS: list[Grid] = [(4, 2, 3)]
DIM = 5


def draw(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


def masks(seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(24, generator=generator, dtype=torch.float64) < 0.6).double().requires_grad_() for _ in range(2)
    ]


def slow_loss(student: Features, dense: DenseFeatures, token_weight: float, ratio_weight: float) -> Tensor:
    """One crop and one token at a time."""
    of_views = []
    for f, wanted in zip(student.view, dense.view, strict=True):
        of_views.append(((f - wanted) ** 2).sum() / (wanted**2).sum())
    of_tokens = []
    assert student.kept is not None
    for t in range(len(student.regions)):
        if student.kept.masks[-1][t] > 0.5:
            f, wanted = student.regions[t], dense.regions[t]
            of_tokens.append(((f - wanted) ** 2).sum() / (wanted**2).sum())
    deviations = []
    for mask, ratio in zip(student.kept.masks, student.kept.ratios, strict=True):
        for crop in range(4):
            deviations.append((sum(mask[6 * crop + t] for t in range(6)) / 6 - ratio) ** 2)
    means = [torch.stack(x).mean() for x in (of_views, of_tokens, deviations)]
    return means[0] + token_weight * means[1] + ratio_weight * means[2]


def test_loss_and_gradients_equal_those_of_slow_loops() -> None:
    objective = Sparsify(DIM, configs.Objective(token_weight=0.7, ratio_weight=3.0))
    kept = Kept(masks(), GRIDS, (0.7, 0.49))
    student = Features(draw(4, DIM), draw(24, DIM, seed=1), GRIDS, kept=kept)
    dense = DenseFeatures(draw(4, DIM, seed=2, grad=False), draw(24, DIM, seed=3, grad=False))
    loss, logs = objective(student, dense, 0.0)
    slow = slow_loss(student, dense, 0.7, 3.0)
    torch.testing.assert_close(loss, slow, rtol=1e-12, atol=0)
    inputs = [student.view, student.regions, *kept.masks]
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert logs["kept_1"] == kept.masks[0].mean()
    assert set(logs) == {"loss_view", "loss_tokens", "loss_ratio", "kept_1", "kept_2"}


def test_without_kept_tokens_the_loss_is_finite() -> None:
    nothing = [torch.zeros(24).requires_grad_() for _ in range(2)]
    student = Features(draw(4, DIM).float(), draw(24, DIM).float(), GRIDS, kept=Kept(nothing, GRIDS, (0.05, 0.05)))
    dense = DenseFeatures(torch.zeros(4, DIM), torch.zeros(24, DIM))  # a feature of zeros, too
    loss, logs = Sparsify(DIM, configs.Objective())(student, dense, 0.0)
    assert loss.isfinite()
    assert logs["loss_tokens"] == 0
    loss.backward()
    assert all(mask.grad is not None and mask.grad.isfinite().all() for mask in nothing)


def test_tokens_of_another_map_are_all_compared() -> None:
    """Those of the last stage of a Swin, whose third stage prunes."""
    kept = Kept([torch.zeros(96)], [(4, 4, 6)], (0.5,))
    student = Features(draw(4, DIM), draw(24, DIM, seed=1), GRIDS, kept=kept)
    dense = DenseFeatures(draw(4, DIM, seed=2), draw(24, DIM, seed=3))
    _, logs = Sparsify(DIM, configs.Objective())(student, dense, 0.0)
    distances = (student.regions - dense.regions).square().sum(1) / dense.regions.square().sum(1)
    torch.testing.assert_close(logs["loss_tokens"], distances.mean())


def test_labels_add_their_cross_entropy() -> None:
    objective = Sparsify(DIM, configs.Objective(classes=3)).double()
    student = Features(draw(4, DIM), draw(0, DIM), [(4, 0, 0)])
    dense = DenseFeatures(draw(4, DIM, seed=2), draw(0, DIM))
    labels = torch.tensor([0, 2, 1, 1])
    joined = joined_targets(mix_labels(labels, None), dense)
    assert isinstance(joined, LabelsAndTargets)
    without, _ = objective(student, dense, 0.0)
    loss, logs = objective(student, joined, 0.0)
    logits = objective.targets(student)
    torch.testing.assert_close(loss - without, F.cross_entropy(logits, labels))
    assert logs["train_top1"] == (logits.argmax(1) == labels).double().mean()


def test_a_teacher_of_another_width_and_other_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r"objective\.teacher: its features have width 8, and the student's 5"):
        Sparsify(DIM, configs.Objective()).of_frozen_teacher(8, configs.Objective())
    with pytest.raises(UserError, match=r"sparsify cannot learn cosine; set objective\.targets=features"):
        conformance.networks(conformance.config_of("sparse:deit_s", "sparsify", objective__targets="cosine"))


def test_a_labelled_step_of_a_sparse_trunk_trains_every_parameter() -> None:
    config = conformance.config_of(
        "sparse:deit_s", "sparsify", objective__classes=3, data__global_crops={"size": 64, "count": 1}
    )
    student, teacher = conformance.networks(config)
    crops = conformance.crops_of(config)
    with torch.no_grad():
        dense = teacher(crops)
    keys = torch.arange(len(crops[0]))
    loss, logs, _ = student(crops, joined_targets(mix_labels(torch.arange(len(crops[0])) % 3, None), dense), keys, 0.0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert "train_top1" in logs
