import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from esvit_scale.models.heads import ROWS_AT_ONCE, ProjectionHead, Prototypes


def test_last_layer_equals_torch_weight_norm():
    prototypes = Prototypes(5, 11, norm_last_layer=False)
    with torch.no_grad():
        prototypes.weight_g.uniform_(0.5, 2)
    theirs = weight_norm(nn.Linear(5, 11, bias=False))
    theirs.parametrizations.weight.original0.data = prototypes.weight_g.data
    theirs.parametrizations.weight.original1.data = prototypes.weight_v.data
    x = torch.randn(3, 5)
    torch.testing.assert_close(prototypes(x, F.linear), theirs(x))


def test_bf16_weights_are_normalised_in_fp32():
    prototypes = Prototypes(64, 32, norm_last_layer=False).bfloat16()
    norms = prototypes(torch.zeros(1, 64), lambda _, rows: rows).norm(dim=1)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, torch.ones(32), rtol=0, atol=1e-6)


# Tolerances: a few roundings of the narrowest precision involved.
@pytest.mark.parametrize(
    ("of_parameters", "of_rows", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.bfloat16, 1e-2),
        (torch.float32, torch.bfloat16, 1e-2),
        (torch.float16, torch.bfloat16, 1e-2),
    ],
)
def test_weight_norm_and_its_gradients_equal_the_formula_in_float64(of_parameters, of_rows, tolerance):
    prototypes = Prototypes(32, ROWS_AT_ONCE + 100, norm_last_layer=False)  # more than one block of rows
    torch.nn.init.uniform_(prototypes.weight_g, 0.5, 2)
    prototypes.to(of_parameters)
    v, g = (p.detach().double().requires_grad_() for p in (prototypes.weight_v, prototypes.weight_g))
    slow = g * v / v.norm(dim=1, keepdim=True)
    rows = prototypes(torch.zeros(1, dtype=of_rows), lambda _, rows: rows)
    assert rows.dtype == of_rows
    torch.testing.assert_close(rows.double(), slow, rtol=tolerance, atol=tolerance)
    grad = torch.randn(slow.shape).to(of_rows)
    rows.backward(grad)
    slow.backward(grad.double())
    for mine, theirs in ((prototypes.weight_v.grad, v.grad), (prototypes.weight_g.grad, g.grad)):
        assert (mine - theirs).norm() < tolerance * theirs.norm()


def test_parameter_names_and_shapes_match_official_head():
    head = ProjectionHead(768, 2048, 256, 65536 // 64)
    assert {n: tuple(p.shape) for n, p in head.named_parameters()} == {
        "mlp.0.weight": (2048, 768),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight_g": (1024, 1),
        "last_layer.weight_v": (1024, 256),
    }
    z = head(torch.randn(4, 768))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("normed", [True, False])
def test_norm_last_layer_freezes_the_gains(normed):
    head = ProjectionHead(8, 8, 8, 8, norm_last_layer=normed)
    assert head.last_layer.weight_g.requires_grad is not normed
    assert (head.last_layer.weight_g == 1).all()
    assert head.last_layer.weight_v.requires_grad


def test_head_has_published_size():
    with torch.device("meta"):
        head = ProjectionHead(768, 2048, 256, 65536)
    assert sum(p.numel() for p in head.parameters()) == 23_073_024 + 65_536
