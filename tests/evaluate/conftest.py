"""A checkpoint that no training had to make, and photographs whose class is their colour."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale.checkpoint import safetensors_file
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network
from tests import tiny

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny.config(folder / "run", folder)
    network = build_network(config)
    initialize(network, 0)
    tensors = {name: p.detach() for name, p in network.named_parameters() if name.startswith("trunk.")}
    safetensors_file.write(folder / "t.safetensors", Weights(config, {"teacher": tensors}, {}), "teacher")
    return folder / "t.safetensors"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ with 20 images of each of three colours, test/ with 8."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 20), ("test", 8)):
        paint(root / split, count, seed=len(split))
    return root


def paint(folder: Path, count: int, seed: int, colours: dict[str, tuple[int, int, int]] = COLOURS) -> None:
    generator = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.clip(colour + generator.normal(0, 60, (37, 41, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
