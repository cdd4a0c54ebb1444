"""Every shipped config with every shipped DeepSpeed config: validates and builds; the tiny ones step."""

import itertools
import re
from importlib import resources

import pytest
import torch

from esvit_scale import config as configs
from esvit_scale.checkpoint import carried
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initial_values
from esvit_scale.objective import costs
from esvit_scale.objective.network import build_network
from esvit_scale.objective.param_groups import parameter_groups
from esvit_scale.parallel import ds_config
from esvit_scale.resources import ds_config_names


@pytest.mark.parametrize("preset", configs.preset_names())
def test_preset_initializes_and_groups_every_parameter(preset: str) -> None:
    with torch.device("meta"):
        network = build_network(configs.resolve(preset))
    names = {name for name, _ in network.named_parameters()}
    trainable = {name for name, p in network.named_parameters() if p.requires_grad}
    assert set(initial_values(network)) == names
    assert set(parameter_groups(network)) == trainable
    assert names - trainable <= {  # gains kept at 1, a frozen patch projection
        name for name in names if name.endswith(".weight_g") or ".patch_embed." in name
    }
    heads = [p for p in network.objective.parameters() if p.ndim == 2]
    assert not heads or heads[0].shape[1] == network.trunk.dim


def test_every_preset_fits_every_deepspeed_config() -> None:
    """All combinations are tried before the test fails; the message lists those that are wrong."""
    failures = []
    for preset, name in itertools.product(configs.preset_names(), ds_config_names()):
        overrides = [f"train.ds_config={name}", *(["train.precision=fp32"] if name == "zero0" else [])]
        try:
            values = ds_config.fill(configs.resolve(preset, overrides), world_size=8)
        except UserError as error:
            failures.append(f"{preset} × {name}: {error}")
            continue
        if "'auto'" in str(values):
            failures.append(f"{preset} × {name}: a value is still 'auto': {values}")
        if ds_config.zero_stage(values) != int(name.removeprefix("zero")[0]):
            failures.append(f"{preset} × {name}: ZeRO stage {ds_config.zero_stage(values)}")
    assert not failures, "\n".join(failures)


PRESETS = [name for name in configs.preset_names() if name != "demo"]
# Those whose FLOPs are counted by running the network, for seconds; deit_s and simsiam_resnet50 stay among the fast ones.
TRACED = {
    *("cvt_s1", "focal_t", "vil_2262", "byol_resnet50", "dino_resnet50", "swav_resnet50"),
    *(
        "moco_v3_vit_s",
        "stability_frozen",
        "stability_trained",
        "vatt_medium",
        "vatt_small",
        "sparsify",
        "sparsify_swin",
    ),
}


def header_of(preset: str) -> str:
    return (resources.files("esvit_scale") / "configs" / f"{preset}.yaml").read_text().split("\n\n")[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_header_states_source_size_and_result(preset: str) -> None:
    header = header_of(preset)
    assert f"({costs.parameters(configs.resolve(preset)).trunk:,} parameters without" in header
    assert re.search(r"Expected[,:]", header)
    assert "Source:" in header


@pytest.mark.parametrize("preset", [pytest.param(p, marks=pytest.mark.slow) if p in TRACED else p for p in PRESETS])
def test_preset_header_states_the_computed_cost(preset: str) -> None:
    stated = re.search(r"Cost: ([\d,.]+) GFLOPs per image", header_of(preset))
    assert stated
    flops = stated[1].replace(",", "")
    digits = len(flops.partition(".")[2])
    first, *later = configs.resolve(preset).of_stages
    assert f"{costs.image_flops(first) / 1e9:.{digits}f}" == flops
    for config in later:
        assert f"and {costs.image_flops(config) / 1e9:,.1f} GFLOPs in the last stage" in header_of(preset)


@pytest.mark.parametrize("preset", [name for name in PRESETS if configs.resolve(name).stages])
def test_every_stage_of_a_preset_can_start_from_the_one_before(preset: str) -> None:
    carried.check(configs.resolve(preset).of_stages)
