"""Randomly cropped and flipped images of a labelled source, for linear probes that are trained over images."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.data import photometric
from esvit_scale.data.crops import crop_box, keyed_generator
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.evaluation import Items, items_of
from esvit_scale.data.loader import loader

SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop, as the official probe uses it: bilinear


class AugmentedBatch(NamedTuple):
    images: Tensor  # float32 [B, 3, S, S], ImageNet-normalised
    numbers: Tensor  # int64 [B]: place in the source


def augmented_batches(
    source: Path, numbers: Sequence[Tensor], size: int, seed: int, epoch: int, workers: int = 0
) -> Iterator[AugmentedBatch]:
    """A batch of random resized crops (area .08–1, bilinear) and flips (p ½) for each of `numbers`: int64 [B], places
    in the source. A crop is a function of (seed, epoch, sample key). Images that cannot be read are left out, so that
    a batch may be short, or empty."""
    items = items_of(Path(source))
    parts = loader([partial(_augmented_parts, items, list(numbers), size, seed, epoch)], min(workers, len(numbers)))
    for pixels, good in parts:
        yield AugmentedBatch(
            photometric.normalize_(torch.from_numpy(pixels).to(torch.float32).mul_(1 / 255)), torch.from_numpy(good)
        )


def _augmented_parts(
    items: Items, batches: list[Tensor], size: int, seed: int, epoch: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for numbers in batches[worker::workers]:
        crops, good = [], []
        for number in numbers.tolist():
            try:
                key, _, data = items.read(number)
                image = decode(data)
            except (BadImage, OSError):
                continue
            crops.append(_random_crop(keyed_generator(seed, epoch, key, 0), image, size))
            good.append(number)
        pixels = np.stack(crops) if crops else np.empty((0, 3, size, size), np.uint8)
        yield pixels, np.array(good, np.int64)


def _random_crop(rng: np.random.Generator, image: Image.Image, size: int) -> NDArray[np.uint8]:
    """[3, S, S]: cropped, then resized (antialiased bilinear), and mirrored with p ½."""
    crop = image.crop(crop_box(rng, *image.size, SCALE)).resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(crop).transpose(2, 0, 1)
    return pixels[:, :, ::-1] if rng.random() < 0.5 else pixels
