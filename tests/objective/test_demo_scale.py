"""benchmarks/objectives.py: its recipes build, and (slow) what they train beats the untrained trunk."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from esvit_scale.objective.network import build_network
from esvit_scale.objective.registry import OBJECTIVES
from tests import launcher


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("objectives", launcher.REPOSITORY / "benchmarks" / "objectives.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_objective_builds_at_demo_scale(tmp_path: Path) -> None:
    module = benchmark()
    assert {name.split()[0] for name in module.RECIPES} <= OBJECTIVES.keys()
    for name in module.RECIPES:
        config = module.recipe(tmp_path, name, seed=0, steps=3, overrides=[])
        assert config.objective.name == name.split()[0]
        with torch.device("meta"):
            build_network(config)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_two_hundred_steps_beat_the_untrained_trunk() -> None:
    """Of one objective; the whole table is the script's."""
    command = [sys.executable, "benchmarks/objectives.py", "--only", "moco_v3", "--steps", "200", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=launcher.REPOSITORY)
    (row,) = json.loads(done.stdout[done.stdout.index("[") :])
    assert row["after"] > row["before"] + 5
    assert row["feature_std"] > 0.1
