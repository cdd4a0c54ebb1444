"""Images with depth maps: recognised layouts, checks, and reading.

A set is named by one of these paths:

    DIR    DIR/images/… and DIR/depth/… with the same names: PNG of 16 bits in 1/`scale` metres, or .npy in metres
    DIR    NYU Depth v2 as exported for monocular depth: rgb_*.jpg (or .png) with sync_depth_*.png beside it, in any
           subfolder, in 1/1000 metres

A depth map is as large as its image. Zero, and whatever is not a finite number, is a pixel without depth.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import get_worker_info

from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.data.loader import run_stages
from esvit_scale.data.masked_images import read_resized, upright_shape
from esvit_scale.errors import UserError

MILLIMETRES = 1000.0  # values of a PNG that make a metre
EIGEN_CROP = (45, 471, 41, 601)  # rows and columns of NYU's 480 × 640 images that published figures count
NYU_SHAPE = (480, 640)

Depth = NDArray[np.float32]  # [H, W], metres; 0 without depth


class DepthSet(NamedTuple):
    """The files of a depth set, in the order of their names."""

    source: Path
    layout: str
    keys: list[str]
    images: list[Path]
    depths: list[Path]
    scale: float  # values of a PNG that make a metre
    least: float  # metres: smallest and largest depth that counts
    most: float


class DepthImage(NamedTuple):
    """An image and its depth."""

    number: int  # place in the set
    pixels: NDArray[np.uint8]  # [H_r, W_r, 3], short side resized
    depth: Depth  # at the map's own resolution


def open_set(source: Path, scale: float = MILLIMETRES, least: float = 1e-3, most: float = 10.0) -> DepthSet:
    """Return the files of a depth set in one of the layouts of this module.

    Args:
        scale: values of a PNG that make a metre.
        least, most: range of depths that count, in metres.

    Raises:
        UserError: the path is in none of the layouts, or an image has no depth map.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    layout, images, depths = "images/ and depth/", source / "images", source / "depth"
    if images.is_dir() and depths.is_dir():
        maps = {p.relative_to(depths).with_suffix("").as_posix(): p for p in _files(depths, {"png", "npy"})}
        found = [(p.relative_to(images).with_suffix("").as_posix(), p) for p in _files(images, EXTENSIONS)]
        pairs = [(key, path, maps.get(key, depths / f"{key}.png")) for key, path in found]
    else:
        layout, scale = "NYU Depth v2", MILLIMETRES
        pairs = []
        for path in _files(source, {"jpg", "png"}):
            if path.name.startswith("rgb_"):
                beside = path.with_name(f"sync_depth_{path.stem.removeprefix('rgb_')}.png")
                pairs.append((path.relative_to(source).with_suffix("").as_posix(), path, beside))
        if not pairs:
            raise UserError(
                f"{source}: not a depth set; needed are images/ and depth/ in it, or NYU's rgb_*.jpg with "
                "sync_depth_*.png beside them"
            )
    if not pairs:
        raise UserError(f"{images}: holds no image")
    for _, path, depth in pairs:
        if not depth.is_file():
            raise UserError(f"{path}: has no depth map {depth}")
    keys, pictures, matched = (list(column) for column in zip(*pairs, strict=True))
    return DepthSet(source, layout, keys, pictures, matched, scale, least, most)


def check(found: DepthSet, workers: int) -> None:
    """Read all depth maps once, and compare their sizes with those of the images.

    Raises:
        UserError: a map is of another size than its image, is damaged, or has several channels; or no pixel counts.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        if not any([*pool.map(partial(_has_depth, found), range(len(found.keys)))]):
            raise UserError(
                f"{found.source}: no depth lies within {found.least:g} to {found.most:g} m; --depth-scale says how many "
                "values of a PNG make a metre"
            )


def depth_images(found: DepthSet, numbers: Sequence[int], size: int, workers: int) -> Iterator[DepthImage]:
    """Yield images and depths in the order of `numbers`; each image's short side is resized to `size` pixels (bicubic).

    Raises:
        UserError: an image or depth map cannot be read.
    """
    return run_stages([partial(_read_part, found, numbers, size)], min(workers, len(numbers)))


def read_depth(found: DepthSet, number: int) -> Depth:
    """Return a depth map in metres, 0 where there is none or it is out of range.

    Raises:
        UserError: it is damaged or has several channels.
    """
    path = found.depths[number]
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False).astype(np.float32)
        else:
            with Image.open(path) as image:
                values = np.asarray(image).astype(np.float32) / found.scale
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    if values.ndim != 2:
        raise UserError(f"{path}: a depth map has one channel, but this one has the shape {values.shape}")
    counts = np.isfinite(values) & (values >= found.least) & (values <= found.most)
    return np.where(counts, values, 0).astype(np.float32)


def counted(found: DepthSet, depth: Depth) -> NDArray[np.bool_]:
    """Return which pixels of a map count in an evaluation: bool [H, W]; of NYU only those of Eigen's crop."""
    inside = depth > 0
    if found.layout.startswith("NYU") and depth.shape == NYU_SHAPE:
        top, bottom, left, right = EIGEN_CROP
        cropped = np.zeros_like(inside)
        cropped[top:bottom, left:right] = inside[top:bottom, left:right]
        return cropped
    return inside


def _has_depth(found: DepthSet, number: int) -> bool:
    depth = read_depth(found, number)
    height, width = upright_shape(found.images[number])
    if depth.shape != (height, width):
        raise UserError(
            f"{found.depths[number]}: {depth.shape[1]}×{depth.shape[0]} pixels, but its image has {width}×{height}"
        )
    return bool(counted(found, depth).any())


def _files(folder: Path, extensions: "frozenset[str] | set[str]") -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in extensions and path.is_file())


def _read_part(found: DepthSet, numbers: Sequence[int], size: int) -> Iterator[DepthImage]:
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for number in numbers[worker::workers]:
        yield DepthImage(number, read_resized(found.images[number], size), read_depth(found, number))
