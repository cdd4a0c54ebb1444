"""Selective activation checkpointing: the same numbers, fewer products in the backward, the bytes that `plan` counts."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from esvit_scale.config import Config
from esvit_scale.models import recomputation
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.recomputation import MIN_INNER_DIMENSION, KeepResults, is_kept
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Trunk
from esvit_scale.parallel import activation_checkpointing
from tests.test_conformance import FAMILIES, config_of

IMAGES = 3


@pytest.fixture
def few_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trunks of few channels keep some of their products, and compute others again."""
    monkeypatch.setattr(recomputation, "MIN_INNER_DIMENSION", 16)


def built(config: Config, implementation: activation_checkpointing.Implementation) -> Trunk:
    trunk = build_trunk(config)
    initialize(trunk, 0)
    activation_checkpointing.apply(trunk, implementation)
    return trunk


def outputs_and_gradients(trunk: Trunk, config: Config, precision: str) -> dict[str, Tensor]:
    """Of one forward and backward with stochastic depth, with running statistics."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    trunk.to(dtype)
    sizes = config.crop_sizes
    crops = [torch.randn(IMAGES * sizes.count(s), 3, s, s, generator=generator).to(dtype) for s in dict.fromkeys(sizes)]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        features = trunk(crops, drop_keys(0, 0, torch.arange(IMAGES), len(sizes)))
    (features.view.float().square().sum() + features.regions.float().sin().sum()).backward()
    found = {"view": features.view.detach(), "regions": features.regions.detach(), **dict(trunk.named_buffers())}
    return found | {f"gradient of {n}": p.grad for n, p in trunk.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("trunk", FAMILIES)
def test_selective_checkpointing_has_the_same_outputs_and_gradients(
    trunk: str, precision: str, few_channels: None
) -> None:
    """Bit for bit, with stochastic depth: a product that is kept is the one of the forward."""
    config = config_of(trunk, "esvit", model__drop_path=0.5)
    plain, selective = (
        outputs_and_gradients(built(config, implementation), config, precision)
        for implementation in ("none", "selective")
    )
    assert plain.keys() == selective.keys()
    for name, expected in plain.items():
        assert torch.equal(selective[name], expected), name


class Products(TorchDispatchMode):
    """Count the products with a weight that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.convolution.default):
            self.counts["in recomputations"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trunk", "again"), [("swin_t", 3), ("swinv2_t", 3 + 4)])
def test_backward_computes_only_cheap_products_again(trunk: str, again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of width 8, 16 and 32: qkv, proj and fc1 of the first stage, and V2's first layer of the position bias."""
    monkeypatch.setattr(recomputation, "MIN_INNER_DIMENSION", 16)
    config = config_of(trunk, "esvit")
    counts = {}
    for implementation in ("none", "selective", "torch"):
        module = built(config, implementation)
        sizes = config.crop_sizes
        crops = [torch.randn(2 * sizes.count(s), 3, s, s) for s in dict.fromkeys(sizes)]
        loss = module(crops).regions.square().sum()
        with Products() as products:
            loss.backward()
        counts[implementation] = products.counts["in recomputations"]
    assert counts["none"] == 0
    assert counts["selective"] == again
    assert counts["torch"] > counts["selective"]


def gradients(function: Any, x: Tensor, kept: KeepResults | None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    if kept is None:
        out = function(x)
    else:
        out = checkpoint(function, x, use_reentrant=False, context_fn=lambda: (kept, kept.reused()))
    out.square().sum().backward()
    return out.detach(), x.grad


def test_products_changed_in_place_are_computed_again(few_channels: None) -> None:
    """The same product, changed by the forward after it was kept, is not what the recomputation needs."""
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, dtype=torch.float64) for _ in range(2))

    def block(x: Tensor) -> Tensor:
        return torch.tanh((x @ a).relu_() @ b)

    x, kept = torch.randn(4, 16, dtype=torch.float64), KeepResults()
    for got, expected in zip(gradients(block, x, kept), gradients(block, x, None), strict=True):
        assert torch.equal(got, expected)


def test_random_operations_around_a_kept_product_draw_the_same(few_channels: None) -> None:
    """Nothing random is kept, so that the restored generator gives every operation the numbers of the forward."""
    torch.manual_seed(0)
    a = torch.randn(16, 16, dtype=torch.float64)

    def block(x: Tensor) -> Tensor:
        return torch.tanh((x * torch.rand_like(x)) @ a) * torch.randn_like(x)

    x, found = torch.randn(4, 16, dtype=torch.float64), []
    for kept in (None, KeepResults()):
        torch.manual_seed(1)
        found.append(gradients(block, x, kept))
    for got, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(got, expected)


def test_recomputation_with_other_products_is_an_error(few_channels: None) -> None:
    layer, calls = nn.Linear(16, 16), []

    def block(x: Tensor) -> Tensor:
        calls.append(1)
        x = layer(x)
        return (
            layer(x) if len(calls) == 1 else nn.functional.conv1d(x[None], torch.ones(3, 3, 16), padding=8)[0, :, :16]
        ).sin()

    kept, x = KeepResults(), torch.randn(3, 16, requires_grad=True)
    out = checkpoint(block, x, use_reentrant=False, context_fn=lambda: (kept, kept.reused()))
    with pytest.raises(RuntimeError, match="must compute the same products again"):
        out.sum().backward()


def test_backward_gives_away_what_was_kept(few_channels: None) -> None:
    layer, kept = nn.Linear(16, 16), KeepResults()
    x = torch.randn(3, 16, requires_grad=True)
    out = checkpoint(lambda x: layer(x).sin(), x, use_reentrant=False, context_fn=lambda: (kept, kept.reused()))
    assert [x.shape for x in kept.tensors] == [(3, 16)]
    out.sum().backward()
    assert kept.tensors == []


def test_which_products_are_kept() -> None:
    aten, few, many = torch.ops.aten, MIN_INNER_DIMENSION // 2, MIN_INNER_DIMENSION
    for inner, kept in ((few, False), (many, True)):
        x, weight, bias = torch.empty(7, inner), torch.empty(inner, 24), torch.empty(24)
        assert is_kept(aten.mm.default, (x, weight)) is kept
        assert is_kept(aten.addmm.default, (bias, x, weight)) is kept
    assert not is_kept(aten.bmm.default, (torch.empty(2, 3, many), torch.empty(2, many, 3)))
    fused = aten._scaled_dot_product_flash_attention_for_cpu.default
    for length, kept in ((few // 2, False), (many // 2, True)):  # of 2 · length multiply-adds per value
        q, k = torch.empty(2, 3, many, 32), torch.empty(2, 3, length, 32)
        assert is_kept(fused, (q, k, k)) is kept
    assert not is_kept(aten.bernoulli.default, (torch.empty(many),))
    for groups, kept in ((1, True), (few, False)):  # a depthwise convolution is cheap
        weight = torch.empty(few, few // groups, 3, 3)
        args = (torch.empty(1, few, 5, 5), weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], groups)
        assert is_kept(aten.convolution.default, args) is kept
