"""The Python examples of docs/using_weights.md, run as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale.checkpoint import state
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from tests import launcher, tiny

PAGE = launcher.REPOSITORY / "docs" / "using_weights.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
DETECTED = r"detections: \['boxes', 'labels', 'scores'\]"
PRINTS = [
    r"",
    r"cosine similarity -?\d\.\d{3}",
    r"(stride \d+: \(1, \d+, \d+, \d+\)\n?){3}",
    DETECTED,
    r"loss \d\.\d{3}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples name: a run and two pictures."""
    folder = tmp_path_factory.mktemp("user")
    config = tiny.config(folder / "runs" / "photos", folder)
    network = build_network(config)
    initialize(network, 0)
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    checkpoints = folder / "runs" / "photos" / "checkpoints"
    state.write_weights(checkpoints / "step-00000000", Weights(config, {"student": tensors, "teacher": tensors}, {}))
    (checkpoints / "latest").write_text("step-00000000\n")
    for i, name in enumerate(("cat.jpg", "dog.jpg")):
        pixels = np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_every_example_has_an_expected_output() -> None:
    assert len(EXAMPLES) == len(PRINTS)


@pytest.mark.parametrize("number", range(len(PRINTS)))
def test_example_prints_the_expected_output(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    exec(compile(EXAMPLES[number], str(PAGE), "exec"), {})
    assert re.fullmatch(PRINTS[number], capsys.readouterr().out.strip())
