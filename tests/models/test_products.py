"""Linear layers whose bf16 products a CPU computes in fp32, against the same layers in fp64."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esvit_scale.models import products
from esvit_scale.models.block_parts import GeluMlp
from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.objective.prototypes import prototype_cross_entropy
from esvit_scale.parallel import activation_checkpointing

ROUNDING = 2**-8  # rounding to bf16 changes a number by at most this share; sums in fp32 add little


@pytest.fixture
def fp32_products(monkeypatch):
    monkeypatch.setenv(products.KEY, "fp32")
    products.fp32_is_faster.cache_clear()
    yield
    products.fp32_is_faster.cache_clear()


def relative(found, true):
    return ((found.double() - true).norm() / true.norm()).item()


def bf16(*shape):
    return torch.randn(*shape).bfloat16().requires_grad_()


@pytest.mark.parametrize(
    ("rows", "bias", "gelu"), [((2500,), True, False), ((3, 700), False, False), ((2500,), True, True)]
)
def test_result_and_gradients_are_those_of_fp64_rounded_once(fp32_products, rows, bias, gelu):
    x, weight = bf16(*rows, 24), bf16(40, 24)
    b = bf16(40) if bias else None
    given = [t for t in (x, weight, b) if t is not None]
    true = [t.detach().double().requires_grad_() for t in given]
    if gelu:
        layer = GeluMlp(10).bfloat16().fc2
        layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(b)
        out, given = layer(x), [x, layer.weight, layer.bias]
    else:
        out = products.linear(x, weight, b)
    expected = F.linear(F.gelu(true[0]) if gelu else true[0], *true[1:])
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, given, grad)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.bfloat16] * len(given)
    pairs = zip((out, *gradients), (expected, *torch.autograd.grad(expected, true, grad.double())), strict=True)
    assert max(relative(found, wanted) for found, wanted in pairs) < ROUNDING


def test_only_required_gradients_are_computed(fp32_products):
    x, weight, b = bf16(5, 8).detach(), bf16(4, 8), bf16(4).detach()
    products.linear(x, weight, b).sum().backward()
    assert (x.grad, b.grad) == (None, None)
    assert weight.grad is not None
    assert products.linear(x[:0], weight, b).shape == (0, 4)


def test_other_precisions_are_left_as_they_are(fp32_products):
    layer, x = nn.Linear(8, 4), torch.randn(5, 8)
    expected = layer(x)
    products.replace(layer_list := nn.ModuleList([layer]))
    assert type(layer_list[0]) is products.Linear
    assert torch.equal(layer(x), expected)


def test_prototype_loss_multiplies_in_fp32(fp32_products):
    """Given the same bf16 numbers, its gradients are those of fp64, rounded once."""
    torch.manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape), dim=-1).bfloat16()  # noqa: E731
    z_s, rows_s, z_t, rows_t = unit(50, 16), unit(300, 16), unit(20, 16), unit(300, 16)
    rest: Any = (
        torch.randn(300) * 0.1,
        torch.randint(20, (50, 2)),
        torch.full((50, 2), 0.01),
        0.1,
        0.04,
        TilePasses(128),
    )
    gradients = []
    for dtype in (torch.bfloat16, torch.float64):
        student = [t.detach().to(dtype).requires_grad_() for t in (z_s, rows_s)]
        loss, _ = prototype_cross_entropy(student[0], student[1], z_t.to(dtype), rows_t.to(dtype), *rest)
        gradients.append(torch.autograd.grad(loss, student))
    assert max(relative(found, true) for found, true in zip(*gradients, strict=True)) < ROUNDING


def test_selective_checkpointing_keeps_wide_products(fp32_products, monkeypatch):
    """The gradients are those without checkpointing, to the bit, and the MLP's first product is not computed again."""
    torch.manual_seed(0)
    mlp, x = GeluMlp(256).bfloat16(), bf16(20, 256)
    products.replace(mlp)
    plain = torch.autograd.grad(mlp(x).square().sum(), [x, *mlp.parameters()])
    computed = []
    row_blocks = products._row_blocks
    monkeypatch.setattr(products, "_row_blocks", lambda *t: computed.append(len(t)) or row_blocks(*t))
    out = activation_checkpointing._run_selectively(mlp, x)
    kept = torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
    assert computed == [2, 2, 3, 3]  # two products, and two backwards of three tensors each


INTEL, AMD = "vendor_id : GenuineIntel\n", "vendor_id : AuthenticAMD\n"


@pytest.mark.parametrize(
    ("cpuinfo", "wide"),
    [
        (INTEL + "flags : avx2 avx512_bf16\n", True),
        (INTEL + "flags : avx2 avx512_bf16 amx_bf16\n", False),
        (INTEL + "flags : avx2\n", True),
        (AMD + "flags : avx2 avx512_bf16\n", False),
        (AMD + "flags : avx2\n", True),
        ("Features : asimd bf16\n", False),
    ],
)
def test_cpus_are_told_apart_by_their_flags(tmp_path, monkeypatch, cpuinfo, wide):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delenv(products.KEY, raising=False)
    assert products.fp32_is_faster.__wrapped__() is wide
    for asked in ("bf16", "fp32"):
        monkeypatch.setenv(products.KEY, asked)
        assert products.fp32_is_faster.__wrapped__() is (asked == "fp32")


def test_compiled_layers_are_one_graph(monkeypatch):
    monkeypatch.delenv(products.KEY, raising=False)
    products.fp32_is_faster.cache_clear()
    layer = products.Linear(8, 4).bfloat16()
    x = bf16(3, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")  # raises an error where a graph would break
    assert torch.equal(compiled(x), F.linear(x, layer.weight, layer.bias))
