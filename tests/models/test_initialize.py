import math

import pytest
import torch
from torch import nn

from esvit_scale.models.distributions import normal
from esvit_scale.models.heads import ProjectionHead
from esvit_scale.models.initialize import initial_value, initial_values, initialize
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.swin import Swin
from esvit_scale.models.swin_variants import SHAPES
from tests import tiny


def trunk():
    return Swin(16, (1, 1), (2, 2), window=4, size=64)


@pytest.mark.parametrize("name", SHAPES)
def test_initialization_sets_every_parameter(name):
    """Every preset's parameters by name; heads included. Widths are cut so that the large ones fit a small machine."""
    shape = SHAPES[name]
    config = tiny.model_config({"trunk": name, "embed_dim": shape.heads[0] * 4})
    network = nn.ModuleDict({"trunk": build_trunk(config), "head": ProjectionHead(64, 32, 16, 48)})
    for p in network.parameters():
        p.data.fill_(math.nan)
    initialize(network, seed=1)
    assert all(p.isfinite().all() for p in network.parameters())
    with torch.device("meta"):
        whole = build_trunk(tiny.model_config({"trunk": name}))
    assert set(initial_values(whole)) == {n for n, _ in whole.named_parameters()}


def test_values_of_a_seed_are_the_same_with_every_torch():
    values = normal(1.0)([64], torch.Generator().manual_seed(3))
    assert values.abs().max() <= 2
    assert values[:3].tolist() == pytest.approx([-0.07664429, 0.35988152, -0.78201681], rel=1e-5)
    assert values[[25, 30, 49, 53]].tolist() == pytest.approx(
        [0.3323023, -0.6851149, 0.5052344, -0.3071051], rel=1e-5
    )  # again


def test_initial_values_follow_their_distributions():
    module = nn.ModuleDict({"trunk": Swin(96, (2,), (3,)), "head": ProjectionHead(96, 512, 256, 2048)})
    initialize(module, seed=0)
    p = dict(module.named_parameters())
    for name, std in (("trunk.layers.0.blocks.0.mlp.fc1.weight", 0.02), ("head.mlp.2.weight", 0.02)):
        assert p[name].std().item() == pytest.approx(std, rel=0.03)
    assert p["trunk.layers.0.blocks.1.attn.relative_position_bias_table"].std().item() == pytest.approx(0.02, rel=0.1)
    assert p["trunk.patch_embed.proj.weight"].abs().max().item() == pytest.approx(48**-0.5, rel=0.01)
    assert 0 < p["trunk.patch_embed.proj.bias"].abs().max().item() <= 48**-0.5
    v = p["head.last_layer.weight_v"]  # torch's Linear default: the row norm 0.577 sets Adam's angular rate
    assert v.abs().max().item() == pytest.approx(1 / 16, rel=0.001)
    assert v.norm(dim=1).mean().item() == pytest.approx(0.577, abs=0.002)
    assert (p["head.last_layer.weight_g"] == 1).all()
    assert (p["trunk.norm.weight"] == 1).all()
    assert (p["head.mlp.0.bias"] == 0).all()


def test_value_depends_only_on_name_shape_and_seed():
    first, second = trunk(), nn.ModuleDict({"other": nn.Linear(3, 3), "trunk": trunk()})
    initialize(nn.ModuleDict({"trunk": first}), seed=5)
    torch.manual_seed(123)
    initialize(second, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second["trunk"].parameters(), strict=True))
    initialize(second, seed=6)
    assert not torch.equal(first.patch_embed.proj.weight, second["trunk"].patch_embed.proj.weight)
    twins = Swin(16, (2,), (2,), window=4, size=64)
    initialize(twins, seed=5)
    assert not torch.equal(twins.blocks[0].attn.qkv.weight, twins.blocks[1].attn.qkv.weight)


def test_bf16_parameters_get_rounded_fp32_values():
    module = trunk().bfloat16()
    initialize(module, seed=0)
    inits = initial_values(module)
    for name, p in module.named_parameters():
        shape = tuple(p.shape)
        p.data = torch.empty(0)  # as a partitioned parameter looks from outside
        value = initial_value(name, inits[name], shape, 0)
        assert value.shape == shape
        assert value.dtype == torch.float32
    with torch.device("meta"):
        assert initial_value(name, inits[name], shape, 0).device.type == "cpu"


def test_parameter_without_a_rule_is_an_error():
    with pytest.raises(LookupError, match=r"odd\.scale"):
        initial_values(nn.ModuleDict({"odd": nn.ParameterDict({"scale": nn.Parameter(torch.ones(1))})}))
