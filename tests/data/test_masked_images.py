"""Segmentation sets: the recognised layouts, and errors that name the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale.data import masked_images
from esvit_scale.errors import UserError


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pair(image: Path, mask: Path, values: tuple[int, ...], size: tuple[int, int] = (20, 24)) -> None:
    save(image, np.full((*size, 3), 90, np.uint8))
    save(mask, np.resize(np.array(values, np.uint8), size))


def labels(path: Path) -> set[int]:
    found = masked_images.open_set(path)
    return set(np.unique(masked_images.read_mask(found, 0)).tolist())


def test_general_layout(tmp_path: Path) -> None:
    pair(tmp_path / "images" / "a" / "1.jpg", tmp_path / "masks" / "a" / "1.png", (0, 1, 255))
    pair(tmp_path / "images" / "2.png", tmp_path / "masks" / "2.png", (2,))
    found = masked_images.open_set(tmp_path)
    assert (found.keys, found.classes) == (["2", "a/1"], ())
    assert masked_images.count_classes(found, 2).tolist() == [160, 160, 480]
    numbered = list(masked_images.masked_images(found, [0, 1], 10, 0))
    assert [image.pixels.shape for image in numbered] == [(10, 12, 3)] * 2
    assert set(np.unique(numbered[1].mask)) == {masked_images.IGNORED, 0, 1}
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    assert masked_images.open_set(tmp_path).classes == ("sky", "sea", "land")
    assert masked_images.open_set(tmp_path, ignore=2).table == {2: masked_images.IGNORED}


def test_ade20k(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    pair(root / "images" / "training" / "x.jpg", root / "annotations" / "training" / "x.png", (0, 1, 150))
    found = masked_images.open_set(root / "images" / "training")
    assert (found.layout, len(found.classes)) == ("ADE20K", 150)
    assert labels(root / "images" / "training") == {masked_images.IGNORED, 0, 149}
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(f"{i}\t.1\t1\t1\t1\tthing {i}, t\n" for i in range(150))
    (root / "objectInfo150.txt").write_text(table)
    assert masked_images.open_set(root / "images" / "training").classes[3] == "thing 3"


def test_cityscapes(tmp_path: Path) -> None:
    image = tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_1_leftImg8bit.png"
    pair(image, tmp_path / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_labelIds.png", (0, 3, 7, 33))
    save(tmp_path / "gtFine" / "val" / "ulm" / "ulm_1_gtFine_color.png", np.zeros((20, 24, 3), np.uint8))
    found = masked_images.open_set(tmp_path / "leftImg8bit" / "val")
    assert (found.layout, found.keys, len(found.classes)) == ("Cityscapes", ["ulm/ulm_1"], 19)
    assert labels(tmp_path / "leftImg8bit" / "val") == {masked_images.IGNORED, 0, 18}
    assert (found.classes[0], found.classes[18]) == ("road", "bicycle")


def test_voc_masks_with_a_palette(tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    pair(root / "JPEGImages" / "a.jpg", root / "SegmentationClass" / "a.png", (0, 15, 255))
    mask = Image.open(root / "SegmentationClass" / "a.png").copy()
    mask.putpalette(list(range(256)) * 3)
    mask.save(root / "SegmentationClass" / "a.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("a\n")
    found = masked_images.open_set(lists / "val.txt")
    assert (found.layout, found.classes[15]) == ("PASCAL VOC", "person")
    assert labels(lists / "val.txt") == {masked_images.IGNORED, 0, 15}
    (lists / "val.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"b\.jpg: no such file, but val\.txt names it"):
        masked_images.open_set(lists / "val.txt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: save(r / "masks" / "a.png", np.zeros((20, 25), np.uint8)), "25×20 pixels, but its image has 24×20"),
        (lambda r: save(r / "masks" / "a.png", np.full((20, 24), 2, np.uint8)), "number 2, but there are 2 classes"),
        (lambda r: save(r / "masks" / "a.png", np.zeros((20, 24, 3), np.uint8)), "one channel of class numbers"),
        (lambda r: (r / "masks" / "a.png").write_bytes(b"no"), r"masks/a\.png: cannot be read"),
        (lambda r: (r / "masks" / "a.png").unlink(), r"images/a\.png: has no mask .*masks/a\.png"),
        (lambda r: (r / "images" / "a.png").unlink(), "holds no image"),
        (lambda r: (r / "masks").rename(r / "labels"), "not a segmentation set"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    pair(tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png", (0, 1, 255))
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        masked_images.count_classes(masked_images.open_set(tmp_path), 1)
