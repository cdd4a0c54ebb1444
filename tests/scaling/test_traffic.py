"""What `plan` says that ranks communicate in a step, against real engines whose collectives are wrapped."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from esvit_scale.scaling import memory, step_trace, traffic
from tests import launcher, tiny

RANKS = 2
CASES = {  # name, which begins with the DeepSpeed file → what differs from the tiny run
    "zero0": {"train__precision": "fp32", "train__grad_accum": 2},
    "zero1": {"optim__clip_by": "global"},
    "zero1-lamb": {"train__precision": "fp32", "optim__name": "lamb", "train__grad_accum": 2},
    "zero2-sinkhorn": {
        "objective__centering": "sinkhorn",
        "objective__koleo_weight": 0.1,
        "objective__koleo_across_ranks": True,
        "train__grad_accum": 2,
    },
    "zero3": {"train__grad_accum": 2, "optim__clip_by": "global"},
    "zero3-byol": {"objective__name": "byol", "data__local_crops": []},
}


def config_of(name, folder):
    odd = {"model__embed_dim": 18, "model__heads": [1, 2, 3], "objective__prototypes": 65, "objective__bottleneck": 15}
    odd |= {
        "train__global_batch": 4 * RANKS,
        "optim__freeze_last_layer_epochs": 0,
        "train__precision": "bf16",
        "train__ds_config": name[:5],
    }
    return tiny.config(folder / name, folder, **odd | CASES[name])


def totals(calls):
    """Bytes by kind of collective."""
    found = defaultdict(int)
    for kind, count in calls:
        found[kind] += count
    return dict(found)


@pytest.mark.slow
def test_planned_traffic_equals_that_of_real_steps(tmp_path):
    """To the byte, by kind, at every stage, with odd sizes that have to be padded."""
    configs = {}
    for name in CASES:
        configs[name] = config_of(name, tmp_path)
        tiny.write_config(tmp_path / f"{name}.yaml", configs[name])
    files = [tmp_path / f"{name}.yaml" for name in CASES]
    launcher.run(Path(__file__).with_name("measured_traffic.py"), tmp_path / "said", *files, ranks=RANKS)
    measured = json.loads((tmp_path / "said.0").read_text())
    planned = {}
    for name, config in configs.items():
        step = step_trace.trace(config, RANKS, "none", step_trace.ON_CPU)
        said = traffic.of_step(config, memory.network_of(config), int(name[4]), RANKS, step)
        planned[name] = totals((one.kind, one.bytes) for one in said if one.bytes)
    assert {name: totals(calls) for name, calls in measured.items()} == planned
