"""One start of two ranks for the tests of all objectives: importing torch and starting a group costs seconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import launcher, tiny
from tests.objective import cases, distillation

Ranks = Callable[[str], tuple[cases.Inputs, tuple[Any, ...]]]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Case → its inputs, and what two ranks found with half of the images each."""
    folder = tmp_path_factory.mktemp("ranks")
    inputs = {case: cases.inputs(case, images=24) for case in cases.CASES}
    plain = {case: tuple(tuple(x) if isinstance(x, tuple) else x for x in given) for case, given in inputs.items()}
    torch.save(plain, folder / "inputs.pt")
    launcher.run("-m", "tests.objective.ranks", folder, ranks=2)
    found = torch.load(folder / "results.pt", weights_only=True)
    inputs["koleo"] = inputs["dino"]  # its features
    return lambda case: (inputs[case], found[case])


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a teacher for distillation."""
    return distillation.write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")
