"""Sinkhorn centring against the dense algorithm, alone and inside EsViT's loss."""

import pytest
import torch
from torch.nn import functional as F

from esvit_scale.objective.esvit import region_pairs, view_pairs
from esvit_scale.objective.objective import unit
from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.objective.sinkhorn import sinkhorn_center
from tests.objective import cases


def dense(logits: torch.Tensor) -> torch.Tensor:
    """[n, K] targets of logits that are divided by the temperature."""
    p = torch.exp(logits)
    for _ in range(3):
        p = p / p.sum(0)
        p = p / p.sum(1, keepdim=True)
    return p


@pytest.mark.parametrize("tile", [1, 7, 64, None])
def test_targets_match_dense_sinkhorn(tile: int | None) -> None:
    z, rows = unit(torch.randn(30, 8, dtype=torch.float64)), torch.randn(64, 8, dtype=torch.float64)
    center = sinkhorn_center(z, rows, 0.05, TilePasses(tile))
    assert center.dtype == torch.float64
    logits = z @ rows.T
    torch.testing.assert_close(torch.softmax((logits - center) / 0.05, 1), dense(logits / 0.05), rtol=0, atol=1e-12)


def test_every_prototype_is_used_when_all_tokens_prefer_one() -> None:
    rows = unit(torch.randn(16, 8, dtype=torch.float64))
    z = unit(rows[0] + 0.1 * torch.randn(200, 8, dtype=torch.float64))
    usage = torch.softmax((z @ rows.T - sinkhorn_center(z, rows, 0.1)) / 0.1, 1).mean(0)
    assert torch.softmax(z @ rows.T / 0.1, 1).mean(0).max() > 0.5
    assert usage.max() < 2 / 16
    assert usage.min() > 0.5 / 16


def test_half_precision_rows_and_a_sharp_temperature_stay_finite() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        z, rows = unit(torch.randn(20, 8)).to(dtype), unit(torch.randn(50, 8)).to(torch.bfloat16)
        center = sinkhorn_center(z, rows, 0.001)
        assert center.dtype == torch.float32
        assert center.isfinite().all()


@pytest.mark.parametrize("case", ["dino-sinkhorn", "esvit-sinkhorn"])
def test_loss_and_gradients_match_definition(case: str) -> None:
    given = cases.inputs(case)
    found = cases.step(case, given, given.features, given.teacher_features)
    student, teacher = cases.module(case, given.student), cases.module(case, given.teacher)
    leaf = given.features._replace(
        view=given.features.view.clone().requires_grad_(), regions=given.features.regions.clone().requires_grad_()
    )

    def logits(head, x):
        last = head.last_layer
        rows = last.weight_g * last.weight_v / last.weight_v.norm(dim=1, keepdim=True)
        return F.normalize(head.mlp(x), dim=1) @ rows.T

    def term(part, x, y, pairs):
        p = dense(logits(getattr(teacher, f"{part}_head"), y) / cases.TEMP).detach()
        q = F.log_softmax(logits(getattr(student, f"{part}_head"), x) / 0.1, dim=1)
        match, weight = pairs
        return sum(-(w * p[t] * q[s]).sum() for s in range(len(q)) for t, w in zip(match[s], weight[s], strict=True))

    views = len(leaf.view) // cases.B
    loss = term("view", leaf.view, given.teacher_features.view, view_pairs(views, cases.B, leaf.view))
    if case.startswith("esvit"):
        maps = unit(given.teacher_features.regions).view(2 * cases.B, -1, cases.C)
        pairs = region_pairs(leaf, maps, cases.B)
        loss = 0.5 * loss + 0.5 * term("region", leaf.regions, given.teacher_features.regions, pairs)
    cases.assert_same(found, loss, cases.gradients(loss, student, leaf))


def test_sinkhorn_keeps_no_state() -> None:
    module = cases.module("esvit-sinkhorn")
    module.load_extra_state({"view.values": torch.ones(20)})  # of a run that had centres
    module.commit()
    assert module.extra_state() == {}
    assert module.empty_extra_state(torch.device("cpu")) == {}
