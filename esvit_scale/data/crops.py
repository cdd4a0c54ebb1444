"""Random crops: where they lie, and how they are cut from a decoded image.

Random numbers are derived from (seed, epoch, sample key, crop number), so a sample's crops are the same whichever
process reads it and whatever else is in its batch.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from esvit_scale.config import Data
from esvit_scale.data.photometric import Strengths, strengths
from esvit_scale.data.picture import Pixels

RATIO = (3 / 4, 4 / 3)  # width / height
TRIES = 10  # random boxes that are tried before a centred one is taken
REDUCTIONS = (1, 2, 4, 8)
# Smallest number of pixels of a reduced image per output pixel, along each axis. Crops cut from reduced images differ
# from those of the whole image by 0.6 to 2.7/255 on average (docs/data.md), and all crops together by 0.2/255.
SPARE = 1.5

Box = tuple[int, int, int, int]  # left, top, right, bottom


def keyed_generator(seed: int, epoch: int, key: str, crop: int) -> np.random.Generator:
    """Return the random generator of one crop of one sample. Use only its `random()`, whose values numpy keeps stable."""
    return generator_of(f"{seed}/{epoch}/{crop}/{key}")


def generator_of(text: str) -> np.random.Generator:
    """Return a random generator that depends on a text alone. Use only its `random()`, whose values numpy keeps stable."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def crop_box(rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]) -> Box:
    """Draw the box of a random resized crop, in pixels, from the distribution of torchvision's `RandomResizedCrop`.

    The area is uniform in `scale` (fractions of the image's area) and the aspect ratio log-uniform in RATIO. When ten tries
    give no box inside the image, the largest centred box of an allowed aspect ratio is returned.
    """
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            return left, top, left + w, top + h
    if width / height < RATIO[0]:
        w, h = width, round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w, h = round(height * RATIO[1]), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class CropGroup(NamedTuple):
    """The crops of one resolution: their size, their number per image, their range of areas and their augmentation."""

    size: int  # pixels on a side
    views: int  # crops per image
    scale: tuple[float, float]  # smallest and largest area, as fractions of the image's
    augment: list[Strengths]  # of each view


def crop_groups(data: Data) -> list[CropGroup]:
    """Return the groups of crops that a config asks for, the global crops first."""
    local = [CropGroup(g.size, g.count, g.scale, strengths(g.augment) * g.count) for g in data.local_crops]
    globals_ = data.global_crops
    augment = strengths(globals_.augment)[: globals_.count]
    return [CropGroup(globals_.size, globals_.count, globals_.scale, augment), *local]


# --- pixels ----------------------------------------------------------------------------------------------------------


def choose_reductions(boxes: Sequence[Box], sizes: Sequence[int], width: int, height: int) -> list[int]:
    """Return for each crop the reduction r (1, 2, 4 or 8) at which it is cut, from the image at 1/r of its size.

    A reduced image keeps at least SPARE pixels per output pixel of the crop along each axis. The crops get different
    reductions only if those above the smallest reduction cover more pixels in total than the image has; otherwise
    making the smaller images would cost more than it saves, and all crops get the smallest reduction.

    Args:
        boxes: in pixels of the whole image.
        sizes: output pixels on a side of each crop.
    """
    largest = [
        max(r for r in REDUCTIONS if r == 1 or _side(b) >= SPARE * r * s) for b, s in zip(boxes, sizes, strict=True)
    ]
    least = min(largest)
    gain = sum(_area(box) for box, r in zip(boxes, largest, strict=True) if r > least)
    return largest if gain > width * height else [least] * len(boxes)


class ImagePyramid:
    """A decoded image at several reductions, plain and mirrored; each version is computed when it is first needed."""

    def __init__(self, pixels: Pixels, reduction: int) -> None:
        self._levels = {(reduction, False): pixels}

    def cut(self, box: Box, reduction: int, flip: bool, out: Pixels) -> None:
        """Write a crop of the image, resized (antialiased bicubic) and, if `flip`, mirrored, into `out` [S, S, C].

        The box is in pixels of the whole image. It is cropped before it is resized, as in torchvision: the filter of the
        resize must not see pixels outside the crop.
        """
        level = self._level(reduction, flip)
        height, width, _ = level.shape
        left, right = _on_grid(box[0], box[2], reduction, width)
        top, bottom = _on_grid(box[1], box[3], reduction, height)
        if flip:
            left, right = width - right, width - left
        _resize(level[top:bottom, left:right], out)

    def _level(self, reduction: int, flip: bool) -> Pixels:
        found = self._levels.get((reduction, flip))
        if found is None:
            found = mirrored(self._level(reduction, False)) if flip else _halved(self._level(reduction // 2, False))
            self._levels[reduction, flip] = found
        return found


def _on_grid(low: int, high: int, reduction: int, length: int) -> tuple[int, int]:
    """Map two edges of a box to the nearest pixel edges of the reduced image, whose side is `length`."""
    return round(low / reduction), min(round(high / reduction), length)


def _side(box: Box) -> int:
    return min(box[2] - box[0], box[3] - box[1])


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def mirrored(pixels: Pixels) -> Pixels:
    """Return an image [H, W, C] with left and right exchanged; torch does this twenty times faster than NumPy."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].flip(3)[0].permute(1, 2, 0).numpy()


def _halved(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    half = np.empty((height, width, pixels.shape[2]), pixels.dtype)
    _resize(pixels[: 2 * height, : 2 * width], half)
    return half


def _resize(source: Pixels, out: Pixels) -> None:
    """Resize `source` [H, W, C] to the size of `out` and write it there, with Pillow's antialiased bicubic filter.

    8-bit pixels are resized by torch's AVX2 kernel for channels-last images; 16-bit pixels are resized in float32 and
    rounded once.
    """
    if source.shape == out.shape:
        np.copyto(out, source)
        return
    if source.dtype != np.uint8:
        np.copyto(out, resized(source, out.shape[0], out.shape[1]))
        return
    x, y = (torch.from_numpy(a).permute(2, 0, 1)[None] for a in (np.ascontiguousarray(source), out))
    torch.ops.aten._upsample_bicubic2d_aa.out(x, out.shape[:2], False, None, None, out=y)


def resized(source: Pixels, height: int, width: int, mode: str = "bicubic") -> Pixels:
    """Return an image [H, W, C] resized to `height` × `width` in float32 and rounded once to its own dtype.

    Args:
        mode: `bicubic` or `bilinear`; both are antialiased.
    """
    x = torch.from_numpy(source.astype(np.float32)).permute(2, 0, 1)[None]
    y = F.interpolate(x, (height, width), mode=mode, antialias=True).round_().clamp_(0, int(np.iinfo(source.dtype).max))
    return y[0].permute(1, 2, 0).numpy().astype(source.dtype)
