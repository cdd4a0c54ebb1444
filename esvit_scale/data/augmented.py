"""Batches of random crops of a shard set or image folder, for linear probes that are trained with augmentation."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.data import photometric
from esvit_scale.data.crops import crop_box, keyed_generator, resized
from esvit_scale.data.decode import BadImage
from esvit_scale.data.evaluation import Items, items_of
from esvit_scale.data.evaluation_crop import opened
from esvit_scale.data.loader import run_stages
from esvit_scale.data.pixel_format import RGB8, PixelFormat

SCALE = (
    0.08,
    1.0,
)  # range of a crop's area, as fractions of the image's area: torchvision's default, which the official probe uses


class AugmentedBatch(NamedTuple):
    """A batch of random crops, with the index of each crop's image in the source."""

    images: Tensor  # float32 [B, C, S, S], normalised
    numbers: Tensor  # int64 [B]: indices of the images in the source


def augmented_batches(
    source: Path,
    numbers: Sequence[Tensor],
    size: int,
    seed: int,
    epoch: int,
    workers: int = 0,
    pixels: PixelFormat = RGB8,
) -> Iterator[AugmentedBatch]:
    """Yield, for each tensor of `numbers`, a batch of random resized crops (area 0.08 to 1), mirrored with p ½.

    Crops are resized bilinearly. A crop depends only on (seed, epoch, sample key). Images that cannot be read are left
    out, so a batch may be short, or empty.

    Args:
        numbers: one int64 tensor [B] per batch: indices of images in the source.
        size: pixels on a side of a crop.
    """
    items = items_of(Path(source), pixels=pixels)
    part = partial(_augmented_parts, items, list(numbers), size, seed, epoch, pixels)
    for crops, good in run_stages([part], min(workers, len(numbers))):
        images = photometric.normalize_(photometric.unit(torch.from_numpy(crops), pixels), pixels)
        yield AugmentedBatch(images, torch.from_numpy(good))


def _augmented_parts(
    items: Items, batches: list[Tensor], size: int, seed: int, epoch: int, pixels: PixelFormat
) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for numbers in batches[worker::workers]:
        crops, good = [], []
        for number in numbers.tolist():
            try:
                key, _, data = items.read(number)
                image = opened(data, pixels)
            except (BadImage, OSError):
                continue
            crops.append(_random_crop(keyed_generator(seed, epoch, key, 0), image, size))
            good.append(number)
        some = np.stack(crops) if crops else np.empty((0, pixels.channels, size, size), pixels.dtype)
        yield some, np.array(good, np.int64)


def _random_crop(rng: np.random.Generator, image: Image.Image | NDArray[Any], size: int) -> NDArray[Any]:
    """Return a random crop of an image as [C, size, size]: resized (antialiased bilinear) and mirrored with p ½."""
    if isinstance(image, Image.Image):
        crop = image.crop(crop_box(rng, *image.size, SCALE)).resize((size, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(crop).transpose(2, 0, 1)
    else:
        left, top, right, bottom = crop_box(rng, image.shape[1], image.shape[0], SCALE)
        pixels = resized(image[top:bottom, left:right], size, size, "bilinear").transpose(2, 0, 1)
    return pixels[:, :, ::-1] if rng.random() < 0.5 else pixels
