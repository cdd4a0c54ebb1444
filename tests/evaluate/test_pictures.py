"""`evaluate attention` and `evaluate correspondence` from the command line: what they leave, and one line for mistakes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale import cli
from esvit_scale.checkpoint import state
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from tests import tiny


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step folder beside pictures."""
    folder = tmp_path_factory.mktemp("looked-at")
    config = tiny.config(folder / "run", folder)
    network = build_network(config)
    initialize(network, 0)
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    state.write_weights(folder / "step", Weights(config, {"student": tensors, "teacher": tensors}, {}))
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 255, (40, 50 + 10 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    Image.new("RGB", (4000, 10)).save(folder / "ribbon.png")
    (folder / "words.png").write_text("no picture")
    (folder / "empty").mkdir()
    return folder / "step"


def run(*words: object) -> int:
    return cli.main(["evaluate", *map(str, words)])


def test_attention(step: Path, tmp_path: Path) -> None:
    picture = step.parent / "pictures" / "0.png"
    assert run("attention", picture, "--checkpoint", step, "--out", tmp_path / "new" / "a", "--size", 64) == 0
    names = {p.name for p in (tmp_path / "new" / "a").iterdir()}
    assert names == {"attention.npz", "attention.png", "components.png"}
    arrays = np.load(tmp_path / "new" / "a" / "attention.npz")
    assert arrays["image"].shape == (64, 80, 3)
    shapes = {name: arrays[name].shape for name in arrays.files if name.startswith("stage")}
    assert shapes == {
        "stage1_block1": (1, 16, 20),
        "stage2_block1": (2, 8, 10),
        "stage3_block1": (4, 4, 5),
        "stage3_block2": (4, 4, 5),
    }
    assert arrays["components_stage3"].shape == (3, 4, 5)
    for name in ("attention.png", "components.png"):
        assert np.asarray(Image.open(tmp_path / "new" / "a" / name).convert("L")).std() > 10


@pytest.mark.parametrize("data", ["pictures", "pictures/1.png"])
def test_correspondence(step: Path, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--checkpoint", step, "--data", step.parent / data, "--out", tmp_path, "--workers", 0)
    assert run("correspondence", *words) == 0
    result = json.loads((tmp_path / "correspondence.json").read_text())
    assert result["images"] == (3 if data == "pictures" else 1)
    assert result["measures"]["mirrored"]["chance"] == 25
    assert "flipped" not in capsys.readouterr().err
    for name in ("best", "stereo"):
        assert Image.open(tmp_path / f"correspondence-{name}.png").width > 1000


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("attention", "words.png"), "words.png: not an image"),
        (("attention", "nowhere.png"), "nowhere.png: no such image"),
        (("attention", "pictures"), "pictures: is a folder; name one image"),
        (
            ("attention", "ribbon.png", "--size", "1000"),
            "400000×1000 pixels .* over the limit of 4,194,304; nearest: --size 102",
        ),
        (("correspondence", "--data", "empty"), "empty: no image files"),
        (("correspondence", "--data", "words.png"), "words.png: not an image"),
        (("correspondence", "--data", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    step: Path, tmp_path: Path, words: tuple[str, ...], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [step.parent / w if w in {p.name for p in step.parent.iterdir()} or "nowhere" in w else w for w in words]
    assert run(*places, "--checkpoint", step, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(match, said), said
    assert not (tmp_path / "out").exists()
