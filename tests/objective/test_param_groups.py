from typing import Any

import pytest
import torch

from esvit_scale.config import Optim, validate
from esvit_scale.models.registry import TRUNKS
from esvit_scale.objective.network import build_network
from esvit_scale.objective.param_groups import (
    hidden_matrices,
    lr_scale,
    optimizer_groups,
    parameter_groups,
    part_of,
    trunk_depths,
)

SMALL = {
    "model": {"embed_dim": 8, "depths": [1, 1], "heads": [1, 2], "window": 4},
    "data": {"global_crops": {"size": 32}},
    "objective": {"prototypes": 16, "head_hidden": 8, "bottleneck": 4},
}


def network(**objective):
    return build_network(validate({**SMALL, "objective": {**SMALL["objective"], **objective}}, where="test"))


def test_every_parameter_has_the_expected_group():
    module = network()
    groups = parameter_groups(module)
    assert groups.keys() == {name for name, _ in module.named_parameters()}
    block = "trunk.layers.0.blocks.0"
    assert groups[f"{block}.attn.relative_position_bias_table"] == "decay"  # 2-D: decays in the official code
    assert groups[f"{block}.attn.qkv.weight"] == groups["trunk.patch_embed.proj.weight"] == "decay"
    assert groups["trunk.layers.0.downsample.reduction.weight"] == "decay"
    assert groups[f"{block}.attn.qkv.bias"] == groups[f"{block}.norm1.weight"] == "no_decay"
    assert groups["objective.view_head.mlp.0.weight"] == "decay"
    for head in ("view_head", "region_head"):
        for name in ("weight_g", "weight_v"):  # the gains are 2-D: frozen with the last layer, and decayed
            assert groups[f"objective.{head}.last_layer.{name}"] == "last_layer"
    assert set(groups.values()) == {"decay", "no_decay", "last_layer"}
    for name, parameter in module.named_parameters():
        assert (groups[name] == "no_decay") == (name.endswith(".bias") or parameter.ndim == 1)


def test_swin_v2_temperatures_and_position_bias_do_not_decay():
    values = {**SMALL, "model": {**SMALL["model"], "trunk": "swinv2_t"}}
    groups = parameter_groups(build_network(validate(values, where="test")))
    attention = "trunk.layers.0.blocks.0.attn"
    for name in ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.0.bias", "cpb_mlp.2.weight", "q_bias", "v_bias"):
        assert groups[f"{attention}.{name}"] == "no_decay", name
    assert groups[f"{attention}.qkv.weight"] == groups[f"{attention}.proj.weight"] == "decay"


def test_frozen_gains_are_in_no_group():
    groups = parameter_groups(network(norm_last_layer=True))
    assert "objective.view_head.last_layer.weight_g" not in groups
    assert groups["objective.view_head.last_layer.weight_v"] == "last_layer"


def test_decay_all_puts_every_parameter_in_a_decaying_group():
    module = network()
    some, all_of_them = parameter_groups(module), parameter_groups(module, "all")
    assert all_of_them == {name: "decay" if group == "no_decay" else group for name, group in some.items()}
    assert "no_decay" in some.values()


def test_parts_are_stages_or_blocks() -> None:
    parts = {
        "trunk.patch_embed.proj.weight": "patch_embed",
        "trunk.layers.2.blocks.3.attn.qkv.weight": "stage3",
        "trunk.layer4.0.conv1.weight": "stage4",
        "trunk.stage0.0.proj.weight": "stage1",
        "trunk.blocks.11.norm1.weight": "block12",
        "trunk.network.stages.1.blocks.0.conv_dw.weight": "stage2",
        "trunk.network.blocks.0.attn.qkv.weight": "block1",
        "trunk.network.stem.0.weight": "stem",
        "trunk.cls_token": "cls_token",
        "objective.projector.layers.0.weight": "projector",
        "objective.view_head.mlp.0.weight": "view_head",
    }
    assert {name: part_of(name) for name in parts} == parts


def on_meta(trunk: str) -> Any:
    with torch.device("meta"):
        return build_network(validate({"model": {"trunk": trunk}, "objective": {"prototypes": 16}}, where="test"))


@pytest.mark.parametrize("name", [*TRUNKS, pytest.param("timm:convnext_atto", marks=pytest.mark.slow)])
def test_depths_grow_from_the_patch_embedding_over_the_blocks_to_the_final_norm(name: str) -> None:
    trunk = on_meta(name).trunk
    depths, deepest = trunk_depths(trunk)
    of = {id(p): depths[name] for name, p in trunk.named_parameters()}
    assert depths.keys() == {name for name, _ in trunk.named_parameters()}
    assert deepest == len(trunk.blocks) + 1 == sum(trunk.depths) + 1
    assert {of[id(p)] for p in trunk.patch_projection.parameters()} == {0}
    for i, block in enumerate(trunk.blocks, start=1):
        assert {of[id(p)] for p in block.parameters()} == {i}
    norm = getattr(trunk, "norm", None)  # timm's networks have theirs inside
    assert all(of[id(p)] == deepest for p in (norm.parameters() if norm is not None else ()))
    last_stage = sum(trunk.depths[:-1])  # what lies between stages learns no faster than the stage after it
    assert all(d <= last_stage or d > deepest - 1 - trunk.depths[-1] for d in depths.values())


def test_groups_have_one_rate_a_depth() -> None:
    network = on_meta("swin_t")
    trunk, decay = network.trunk, Optim(layer_decay=0.5)
    matrices = {m.name for m in hidden_matrices([trunk], network)}
    for muons in (set(), matrices):
        groups = optimizer_groups(network, trunk, decay, muons)
        names = [name for members in groups.values() for name in members]
        assert sorted(names) == sorted(name for name, _ in network.named_parameters())  # each in one group
        kinds = parameter_groups(network, matrices=muons)
        rates = {name: lr_scale(group, trunk, decay) for group, members in groups.items() for name in members}
        assert all(kinds[name] == group.split(".")[-1] for group, members in groups.items() for name in members)
        assert rates["trunk.patch_embed.proj.weight"] == 0.5**13
        assert (
            rates["trunk.layers.1.blocks.1.attn.qkv.weight"] == rates["trunk.layers.1.downsample.norm.weight"] == 0.5**9
        )
        assert rates["trunk.norm.bias"] == rates["objective.view_head.mlp.0.weight"] == 1
    for optim, expected in (
        (Optim(), {"decay", "no_decay", "last_layer"}),
        (Optim(freeze_trunk_steps=1), {"trunk.decay", "trunk.no_decay", "decay", "no_decay", "last_layer"}),
    ):
        groups = optimizer_groups(network, trunk, optim)
        assert groups.keys() == expected
        assert {lr_scale(group, trunk, optim) for group in groups} == {1.0}
