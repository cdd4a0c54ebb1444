"""Images with masks of class numbers for semantic segmentation: recognised layouts, checks, and reading.

A set is named by one of these paths:

    DIR                                        DIR/images/… and DIR/masks/… with the same names; optional DIR/classes.txt
    ADEChallengeData2016/images/SPLIT          masks in annotations/SPLIT; 0 is ignored, 1 … 150 are the classes
    leftImg8bit/SPLIT                          Cityscapes; masks in gtFine/SPLIT, *_gtFine_labelIds.png, 19 classes
    VOC2012/ImageSets/Segmentation/SPLIT.txt   JPEGImages/ and SegmentationClass/, 255 is ignored, 21 classes

A mask is an image of one channel or with a palette whose pixel values are class numbers, as large as its image.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import get_worker_info

from esvit_scale.data import crops, image_folder
from esvit_scale.data.decode import EXTENSIONS, BadImage, decode, exif_orientation
from esvit_scale.data.loader import reason, run_stages
from esvit_scale.errors import UserError

IGNORED = -1  # class of a pixel that does not count
CITYSCAPES = {  # labelIds → the 19 classes of the benchmark
    **{7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"},
}
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ADE_CLASSES = 150


class MaskedSet(NamedTuple):
    """The files of a segmentation set, in the order of their names."""

    source: Path
    layout: str
    keys: list[str]
    images: list[Path]
    masks: list[Path]
    classes: tuple[str, ...]  # empty: as many as the numbers in the masks
    table: dict[int, int]  # value in a mask → class number or IGNORED; values that are not in it are class numbers
    others_ignored: bool = False  # whether values that are not in the table are ignored


class MaskedImage(NamedTuple):
    """An image and its mask."""

    number: int  # place in the set
    pixels: NDArray[np.uint8]  # [H_r, W_r, 3], short side resized
    mask: NDArray[np.int32]  # [H, W] at the mask's own resolution, class numbers or IGNORED


def open_set(source: Path, ignore: int = 255) -> MaskedSet:
    """Return the files of a segmentation set in one of the layouts of this module.

    Args:
        ignore: value in masks of the general layout and of VOC that does not count.

    Raises:
        UserError: the path is in none of the layouts, or an image has no mask.
    """
    if source.suffix == ".txt" and source.parent.parent.name == "ImageSets":
        return _voc(source, ignore)
    beside = source.parent.parent
    if source.parent.name == "images" and (beside / "annotations" / source.name).is_dir():
        names = _ade_names(beside / "objectInfo150.txt")
        table = {0: IGNORED, **{i + 1: i for i in range(ADE_CLASSES)}}
        return _matched(source, "ADE20K", source, beside / "annotations" / source.name, names, table)
    if source.parent.name == "leftImg8bit" and (beside / "gtFine" / source.name).is_dir():
        table = {value: i for i, value in enumerate(CITYSCAPES)}
        ends = ("_leftImg8bit", "_gtFine_labelIds")
        masks = beside / "gtFine" / source.name
        found = _matched(source, "Cityscapes", source, masks, tuple(CITYSCAPES.values()), table, ends)
        return found._replace(others_ignored=True)
    if not source.exists():
        raise UserError(f"{source}: no such folder or list")
    if not ((source / "images").is_dir() and (source / "masks").is_dir()):
        raise UserError(
            f"{source}: not a segmentation set; needed are images/ and masks/ in it, or ADEChallengeData2016/images/SPLIT, "
            "leftImg8bit/SPLIT, or VOC2012/ImageSets/Segmentation/SPLIT.txt"
        )
    classes: tuple[str, ...] = ()
    if (source / "classes.txt").is_file():
        classes = tuple(line.strip() for line in (source / "classes.txt").read_text().splitlines() if line.strip())
    return _matched(source, "images/ and masks/", source / "images", source / "masks", classes, {ignore: IGNORED})


def count_classes(found: MaskedSet, workers: int) -> NDArray[np.int64]:
    """Read all masks once and return how many pixels every class has; also compare sizes with those of the images.

    Raises:
        UserError: a mask is of another size than its image, is damaged, has several channels, or holds a number that is
            not a class.
    """
    total = np.zeros(max(1, len(found.classes)), np.int64)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for counts in pool.map(partial(_checked_counts, found), range(len(found.keys))):
            if len(counts) > len(total):
                total = np.pad(total, (0, len(counts) - len(total)))
            total[: len(counts)] += counts
    return total


def masked_images(found: MaskedSet, numbers: Sequence[int], size: int, workers: int) -> Iterator[MaskedImage]:
    """Yield images and masks in the order of `numbers`; each image's short side is resized to `size` pixels (bicubic).

    Raises:
        UserError: an image or mask cannot be read.
    """
    return run_stages([partial(_read_part, found, numbers, size)], min(workers, len(numbers)))


def read_mask(found: MaskedSet, number: int) -> NDArray[np.int32]:
    """Return a mask as class numbers, IGNORED where it does not count: int32 [H, W].

    Raises:
        UserError: it is damaged, has several channels, or holds a number that is not a class.
    """
    path = found.masks[number]
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise UserError(
                    f"{path}: a mask has one channel of class numbers or a palette, but this one is {image.mode}"
                )
            values = np.asarray(image).astype(np.int32)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    present = np.unique(values)
    mapped = np.array([found.table.get(int(v), IGNORED if found.others_ignored else int(v)) for v in present], np.int32)
    if len(found.classes) and mapped.max(initial=-1) >= len(found.classes):
        worst = int(present[mapped.argmax()])
        raise UserError(
            f"{path}: holds the number {worst}, but there are {len(found.classes)} classes (0 to {len(found.classes) - 1}) "
            "and the number to ignore"
        )
    return mapped[np.searchsorted(present, values)]


# --- layouts ---------------------------------------------------------------------------------------------------------


def _matched(
    source: Path,
    layout: str,
    images: Path,
    masks: Path,
    classes: tuple[str, ...],
    table: dict[int, int],
    ends: tuple[str, str] = ("", ""),
) -> MaskedSet:
    """Match images and masks below two folders by their paths without extension; `ends` are what their names end in."""
    of_masks = {path.relative_to(masks).with_suffix("").as_posix(): path for path in _files(masks)}
    keys, pictures, matched = [], [], []
    for path in _files(images):
        name = path.relative_to(images).with_suffix("").as_posix()
        if not name.endswith(ends[0]):
            continue
        key = name.removesuffix(ends[0])
        if key + ends[1] not in of_masks:
            raise UserError(f"{path}: has no mask {masks / (key + ends[1])}.png")
        keys.append(key)
        pictures.append(path)
        matched.append(of_masks[key + ends[1]])
    if not keys:
        raise UserError(f"{images}: holds no image")
    return MaskedSet(source, layout, keys, pictures, matched, classes, table)


def _voc(source: Path, ignore: int) -> MaskedSet:
    if not source.is_file():
        raise UserError(f"{source}: no such list")
    root = source.parent.parent.parent
    keys = source.read_text().split()
    images = [root / "JPEGImages" / f"{key}.jpg" for key in keys]
    masks = [root / "SegmentationClass" / f"{key}.png" for key in keys]
    if not keys:
        raise UserError(f"{source}: names no image")
    for path in (*images, *masks):
        if not path.is_file():
            raise UserError(f"{path}: no such file, but {source.name} names it")
    return MaskedSet(source, "PASCAL VOC", keys, images, masks, VOC, {ignore: IGNORED})


def _ade_names(path: Path) -> tuple[str, ...]:
    """Return ADE20K's class names from its table if that is there, else their numbers."""
    with suppress(OSError, IndexError):
        rows = [line.split("\t") for line in path.read_text(errors="replace").splitlines()[1:] if line.strip()]
        if len(rows) == ADE_CLASSES:
            return tuple(row[-1].split(",")[0].strip() for row in rows)
    return tuple(str(i + 1) for i in range(ADE_CLASSES))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in EXTENSIONS and path.is_file())


# --- reading ---------------------------------------------------------------------------------------------------------


def _checked_counts(found: MaskedSet, number: int) -> NDArray[np.int64]:
    mask = read_mask(found, number)
    height, width = upright_shape(found.images[number])
    if mask.shape != (height, width):
        raise UserError(
            f"{found.masks[number]}: {mask.shape[1]}×{mask.shape[0]} pixels, but its image has {width}×{height}"
        )
    return np.bincount(mask[mask >= 0], minlength=1)


def _read_part(found: MaskedSet, numbers: Sequence[int], size: int) -> Iterator[MaskedImage]:
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for number in numbers[worker::workers]:
        yield MaskedImage(number, read_resized(found.images[number], size), read_mask(found, number))


def read_resized(path: Path, size: int) -> NDArray[np.uint8]:
    """Return an image file upright, its short side resized to `size` pixels (bicubic): uint8 [H, W, 3].

    Raises:
        UserError: it cannot be read.
    """
    try:
        pixels = np.asarray(decode(image_folder.read_file(path)))
    except (BadImage, OSError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    return crops.resized(pixels, max(size, int(height * scale)), max(size, int(width * scale)))


def upright_shape(path: Path) -> tuple[int, int]:
    """Return the height and width of an image file after its EXIF orientation is undone; no pixel is decoded.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size if exif_orientation(image) < 5 else image.size[::-1]
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    return height, width
