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


def paint_masked(root: Path, n: int, seed: int) -> Path:
    """Images of several shapes with a red square on blue noise; the pixels around the square are ignored."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        height, width = 40 + 4 * (i % 3), 48 + 7 * (i % 2)
        pixels = np.clip(np.array((40, 60, 200)) + rng.normal(0, 30, (height, width, 3)), 0, 255)
        y, x, side = rng.integers(2, height - 22), rng.integers(2, width - 22), 20
        pixels[y : y + side, x : x + side] = np.clip(
            np.array((210, 50, 40)) + rng.normal(0, 30, (side, side, 3)), 0, 255
        )
        mask = np.zeros((height, width), np.uint8)
        mask[y - 1 : y + side + 1, x - 1 : x + side + 1] = 255
        mask[y : y + side, x : x + side] = 1
        for kind, values in (("images", pixels.astype(np.uint8)), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / kind / f"{i:02d}.png")
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


def paint_depth(root: Path, n: int, seed: int) -> Path:
    """Images with a ramp of brightness along the rows whose depth is 1 to 5 m with it; the first rows have no depth."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        height, width = 40 + 4 * (i % 3), 48 + 7 * (i % 2)
        metres = np.broadcast_to(np.linspace(1, 5, height)[:, None], (height, width))
        if i % 2:
            metres = metres[::-1]
        pixels = (40 * metres[..., None] + rng.normal(0, 10, (height, width, 3))).clip(0, 255).astype(np.uint8)
        stored = (1000 * metres).astype(np.uint16)
        stored[:4] = 0
        for kind, values in (("images", pixels), ("depth", stored)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / kind / f"{i:02d}.png")
    return root


def paint_videos(root: Path, videos: int, frames: int, seed: int) -> Path:
    """Videos in the DAVIS layout of a red and a green square that move over blue noise; some pixels are void."""
    rng = np.random.default_rng(seed)
    for v in range(videos):
        height, width = 64, 80 + 16 * (v % 2)
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / "480p" / f"video{v}").mkdir(parents=True)
        for i in range(frames):
            pixels = np.array((40, 60, 200)) + rng.normal(0, 20, (height, width, 3))
            mask = np.zeros((height, width), np.uint8)
            for label, y, x, colour in ((1, 8, 4 + 6 * i, (210, 50, 40)), (2, 40 - 2 * i, 50, (50, 200, 60))):
                pixels[y : y + 20, x : x + 20] = np.array(colour) + rng.normal(0, 20, (20, 20, 3))
                mask[y : y + 20, x : x + 20] = label
            mask[:2] = 255
            name = f"480p/video{v}/{i:05d}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(root / "Annotations" / f"{name}.png")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("".join(f"video{v}\n" for v in range(videos)))
    return root
