"""Small image folders, shard sets and configs for the data tests."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esvit_scale.config import Config, validate
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.shard_writer import Sample, write_samples


def picture(seed: int, width: int = 20, height: int = 16) -> Image.Image:
    """A smooth random picture."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """53 samples of 3 classes in 6 shards of 10 (the last of 3). Read it only."""
    samples = [Sample(f"c{i % 3}/s{i:03d}", i % 3, "png", encoded(picture(i))) for i in range(53)]
    return write_samples(samples, tmp_path_factory.mktemp("shards") / "set", ("c0", "c1", "c2"), 10)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """12 PNGs in the class folders a and b."""
    root = tmp_path / "images"
    for i in range(12):
        path = root / "ab"[i % 2] / f"p{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))
    return root


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with four pictures, 0.png to 3.png."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i)))
    return tmp_path


@pytest.fixture
def images(image_folder: Path) -> dict[str, bytes]:
    """Path below the folder → bytes; 12 of them in a/ and b/."""
    return {p.relative_to(image_folder).as_posix(): p.read_bytes() for p in sorted(image_folder.rglob("*.png"))}


def config_with(**overrides: Any) -> Config:
    """Tiny crops, batch 8, window 2; `workers`, `slots`, `seed`, `batch`, `accum` override."""
    return validate(
        {
            "seed": overrides.get("seed", 0),
            "data": {
                "train": overrides.get("train", ""),
                "workers": overrides.get("workers", 0),
                "slots": overrides.get("slots"),
                "shuffle_window": 2,
                "global_crops": {"size": 12},
                "local_crops": [{"size": 8, "count": 2}, {"size": 6, "count": 1}],
            },
            "train": {"global_batch": overrides.get("batch", 8), "grad_accum": overrides.get("accum", 1)},
        },
        "test",
    )
