"""Exact and near duplicates against the slow obvious search."""

from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance

from esvit_scale.data.duplicates import find, near_duplicates, near_pairs, perceptual_hash, write_lists
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import write_source
from esvit_scale.data.sources import SourceOptions, open_source
from tests.data.conftest import encoded, picture


def random_hashes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Clusters of hashes that differ in a few bits, and repeats."""
    centres = rng.integers(0, 1 << 63, max(n // 6, 1), dtype=np.uint64)
    hashes = centres[rng.integers(len(centres), size=n)]
    for _ in range(5):
        flip = rng.random(n) < 0.6
        hashes = np.where(flip, hashes ^ (np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64)), hashes)
    return hashes[rng.integers(n, size=n)]  # some of them repeated


def slow_dropped(hashes: list[int], distance: int) -> set[int]:
    kept: list[int] = []
    dropped = set()
    for i, value in enumerate(hashes):
        if any((value ^ hashes[j]).bit_count() <= distance for j in kept):
            dropped.add(i)
        else:
            kept.append(i)
    return dropped


@pytest.mark.parametrize("distance", [0, 1, 3, 7])
def test_every_near_pair_is_found(distance: int) -> None:
    rng = np.random.default_rng()
    hashes = random_hashes(rng, 300)
    values = np.unique(hashes)
    pairs = {(i, j): bits for i, j, bits in near_pairs(values, distance).tolist()}
    slow = {
        (i, j): (int(values[i]) ^ int(values[j])).bit_count()
        for i in range(len(values))
        for j in range(i)
        if (int(values[i]) ^ int(values[j])).bit_count() <= distance
    }
    assert pairs == slow


@pytest.mark.parametrize("distance", [0, 2, 3])
def test_image_is_dropped_when_an_earlier_kept_one_is_near(distance: int) -> None:
    rng = np.random.default_rng()
    hashes = random_hashes(rng, 400)
    found = near_duplicates(hashes, distance)
    assert set(found[:, 0].tolist()) == slow_dropped([int(h) for h in hashes], distance)
    assert not set(found[:, 1].tolist()) & set(found[:, 0].tolist())


def photographs() -> list[Image.Image]:
    """Quarters of real photographs."""
    names = ("astronaut", "chelsea", "coffee")
    images = [Image.fromarray(getattr(skimage.data, name)()) for name in names]
    return [
        image.crop((x, y, x + image.width // 2, y + image.height // 2))
        for image in images
        for x in (0, image.width // 2)
        for y in (0, image.height // 2)
    ]


def test_perceptual_hash_survives_resizing_and_re_encoding() -> None:
    def bits(image: Image.Image, kind: str = "PNG", **options: int) -> int:
        return perceptual_hash(encoded(image, kind, **options)) or 0

    near, far, seen = [], [], []
    for image in photographs():
        for other in (
            bits(image, "JPEG", quality=60),
            bits(image.resize((150, 120))),
            bits(ImageEnhance.Brightness(image).enhance(0.9)),
        ):
            near.append((bits(image) ^ other).bit_count())
        far += [(bits(image) ^ other).bit_count() for other in seen]
        seen.append(bits(image))
    assert np.mean(np.array(near) <= 3) > 0.9
    assert min(far) > 8
    assert perceptual_hash(encoded(Image.new("RGB", (50, 50), "red"))) is None
    assert perceptual_hash(b"nothing") is None


@pytest.mark.parametrize("workers", [1, 2])
def test_keep_list_is_written_from_images(workers: int, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    files = {
        "a.png": encoded(picture(0, 200, 150)),
        "b.png": encoded(picture(1, 200, 150)),
        "c.png": encoded(picture(0, 200, 150)),  # the bytes of a
        "d.jpg": encoded(picture(0, 200, 150), "JPEG", quality=80),  # a's picture
        "red.png": encoded(Image.new("RGB", (50, 50), "red")),
        "blue.png": encoded(Image.new("RGB", (50, 50), "blue")),
        "broken.png": b"x",
    }
    for name, data in files.items():
        (tmp_path / "images" / name).write_bytes(data)
    [source] = open_source(str(tmp_path / "images"), SourceOptions()).values()
    for near, kept in ((None, set(files) - {"c.png"}), (3, set(files) - {"c.png", "d.jpg"})):
        write_lists(source, find(source, near, workers), tmp_path / "keep.txt")
        assert set((tmp_path / "keep.txt").read_text().splitlines()) == kept
    dropped = [line.split("\t") for line in (tmp_path / "keep.txt.dropped.tsv").read_text().splitlines()]
    assert [row[:2] for row in dropped] == [["c.png", "a.png"], ["d.jpg", "a.png"]]
    recipe = Recipe(keep=tmp_path / "keep.txt")
    [manifest] = write_source(str(tmp_path / "images"), tmp_path / "set", SourceOptions(), recipe).values()
    assert manifest.samples == 4
