import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from esvit_scale.models.heads import ProjectionHead, Prototypes


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
