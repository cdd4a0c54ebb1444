"""Videos as folders of frames with object masks: the DAVIS layout, its checks, and reading frame by frame.

A set is named by one of these paths:

    DAVIS/ImageSets/2017/val.txt   the sequences that the list names
    DIR                            all sequences of a folder with JPEGImages/ and Annotations/

Frames are JPEGImages/[480p/]SEQUENCE/00000.jpg (or .png), their masks Annotations/[480p/]SEQUENCE/00000.png: one channel
or a palette of object numbers, 0 for the background, 255 for pixels that do not count, as large as the frame.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import get_worker_info

from esvit_scale.data import image_folder
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.loader import reason, run_stages
from esvit_scale.data.masked_images import upright_shape
from esvit_scale.errors import UserError

VOID = 255  # number in masks of pixels that do not count
RESOLUTION = "480p"  # folder between JPEGImages/ and the sequences in DAVIS
FEWEST_FRAMES = 3  # the first frame is given, and the last does not count

Mask = NDArray[np.uint8]  # [H, W]: object numbers, 0 background, VOID


class Video(NamedTuple):
    """A video: its frames and their masks, in order."""

    name: str
    frames: list[Path]
    masks: list[Path]


class Frame(NamedTuple):
    """A frame of a video."""

    sequence: int  # place in the set
    number: int  # place in the sequence
    pixels: NDArray[np.uint8]  # [h, w, 3], resized
    mask: Mask  # at its own resolution


def open_set(source: Path) -> list[Video]:
    """Return the sequences of a set, in the order of the list or of their names; masks are found but not read.

    Raises:
        UserError: the path is in no known layout, a sequence has fewer than three frames, a frame or mask is missing, or
            a mask is of another size than its frame.
    """
    if source.suffix == ".txt":
        if not source.is_file():
            raise UserError(f"{source}: no such list")
        roots = [folder.parent for folder in source.parents if folder.name == "ImageSets"]
        if not roots:
            raise UserError(f"{source}: a list of sequences lies below ImageSets/, beside JPEGImages/ and Annotations/")
        root, names = roots[0], source.read_text().split()
        if not names:
            raise UserError(f"{source}: names no sequence")
    else:
        root, names = source, []
    frames, masks = (_resolution(root / name) for name in ("JPEGImages", "Annotations"))
    if not (frames.is_dir() and masks.is_dir()):
        what = "no such folder" if not root.is_dir() else "not a set of videos"
        raise UserError(
            f"{root}: {what}; needed are JPEGImages/ and Annotations/ in it, or a list below its ImageSets/"
        )
    names = names or sorted(path.name for path in frames.iterdir() if path.is_dir())
    if not names:
        raise UserError(f"{frames}: holds no folder of frames")
    return [_sequence(frames / name, masks / name) for name in names]


def frames_of(
    sequences: Sequence[Video], numbers: Sequence[int], size: int, unit: int, workers: int
) -> Iterator[Frame]:
    """Yield all frames of some sequences in order; only those that the loaders prepare are in memory.

    Args:
        numbers: which sequences.
        size: pixels of the short side, to which frames are resized (bicubic).
        unit: both sides are rounded to multiples of it.

    Raises:
        UserError: a frame or mask cannot be read.
    """
    jobs = [(s, i) for s in numbers for i in range(len(sequences[s].frames))]
    return run_stages([partial(_read_part, sequences, jobs, size, unit)], min(workers, len(jobs)))


def read_mask(path: Path) -> Mask:
    """Return a mask: uint8 [H, W].

    Raises:
        UserError: it is damaged or has several channels.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("1", "L", "P"):
                raise UserError(f"{path}: a mask has one channel of object numbers or a palette, not {image.mode}")
            return np.asarray(image).astype(np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def _resolution(folder: Path) -> Path:
    return folder / RESOLUTION if (folder / RESOLUTION).is_dir() else folder


def _sequence(frames: Path, masks: Path) -> Video:
    if not frames.is_dir():
        raise UserError(f"{frames}: no such folder of frames")
    found = sorted(path for path in frames.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(found) < FEWEST_FRAMES:
        raise UserError(f"{frames}: {len(found)} frames; a sequence needs {FEWEST_FRAMES} or more")
    if all(path.stem.isdecimal() for path in found):
        found.sort(key=lambda path: int(path.stem))
        for before, after in pairwise(found):
            if int(after.stem) != int(before.stem) + 1:
                raise UserError(f"{frames}: frames are missing between {before.name} and {after.name}")
    matched = [masks / f"{path.stem}.png" for path in found]
    for path, mask in zip(found, matched, strict=True):
        if not mask.is_file():
            raise UserError(f"{path}: has no mask {mask}")
        if upright_shape(mask) != (shape := upright_shape(path)):
            height, width = upright_shape(mask)
            raise UserError(f"{mask}: {width}×{height} pixels, but its frame has {shape[1]}×{shape[0]}")
    return Video(frames.name, found, matched)


def _read_part(sequences: Sequence[Video], jobs: list[tuple[int, int]], size: int, unit: int) -> Iterator[Frame]:
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for s, i in jobs[worker::workers]:
        path = sequences[s].frames[i]
        try:
            image = decode(image_folder.read_file(path))
        except (BadImage, OSError) as error:
            raise UserError(f"{path}: cannot be read: {reason(error)}") from None
        scale = size / min(image.size)
        width, height = (max(unit, round(side * scale / unit) * unit) for side in image.size)
        small = np.array(image.resize((width, height), Image.Resampling.BICUBIC))
        yield Frame(s, i, small, read_mask(sequences[s].masks[i]))
