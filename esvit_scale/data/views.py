"""One sample's crops, and a worker's part of a batch made of them."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.config import Config
from esvit_scale.data import photometric, photometric_8bit
from esvit_scale.data.crops import Box, Levels, crop_box, crop_groups, keyed_generator, reductions
from esvit_scale.data.photometric import Draw
from esvit_scale.data.picture import open_picture
from esvit_scale.data.pixel_format import pixel_format

SLOW_S = 20.0  # seconds to read and decode one sample, from which on it is reported


class View(NamedTuple):
    """Everything random about one crop."""

    box: Box
    flip: bool
    draw: Draw


class Sample(NamedTuple):
    """A decoded picture with its crops placed."""

    batch_position: int  # in the global batch
    key: str
    label: int
    views: list[View]
    reductions: list[int]  # of each view
    levels: Levels
    bad: list[dict[str, Any]]  # what was tried before it, and failed


def place_views(config: Config, epoch: int, key: str, width: int, height: int) -> list[View]:
    """The crops of a sample whose picture is width × height: a pure function of seed, epoch, key and crop."""
    views: list[View] = []
    for group in crop_groups(config.data):
        for _ in range(group.views):
            number = len(views)
            rng = keyed_generator(config.seed, epoch, key, number)
            box = crop_box(rng, width, height, group.scale)
            flip = rng.random() < 0.5
            views.append(View(box, flip, photometric.draw(rng, number)))
    return views


def decode_for_views(config: Config, epoch: int, key: str, data: bytes) -> tuple[list[View], list[int], Levels]:
    """Places a sample's crops, then decodes its file as large as they need.

    Raises:
        BadImage: the file is no usable picture.
    """
    picture = open_picture(data, pixel_format(config.data))
    views = place_views(config, epoch, key, picture.width, picture.height)
    scales = reductions([v.box for v in views], config.crop_sizes, picture.width, picture.height)
    return views, scales, Levels(*picture.pixels(min(scales)))


class Part(NamedTuple):
    """A worker's part of a batch. Small arrays travel as NumPy: a tensor would cost a shared-memory file each."""

    crops: list[Tensor]  # uint8 or uint16 [V_g, B, S_g, S_g, channels] a resolution group
    photometric: tuple[NDArray[Any], ...]
    positions: NDArray[np.int64]
    keys: list[str]
    labels: NDArray[np.int64]
    bad: list[dict[str, Any]]
    batch_index: int
    seconds: float  # that its worker took for it


def make_part(config: Config, batch_index: int, samples: Iterable[Sample], size: int) -> Part:
    """Crops written straight into the part's arrays, one decoded image in memory at a time."""
    began = time.monotonic()
    groups, in_worker = crop_groups(config.data), config.data.photometric == "workers"
    dtype = torch.uint8 if config.data.bits == 8 else torch.uint16
    pixels = [_empty(dtype, g.views, size, g.size, g.size, config.data.channels) for g in groups]
    crops = [p.numpy() for p in pixels]
    draws: list[list[Draw]] = [[] for _ in config.crop_sizes]
    positions, labels = np.empty(size, np.int64), np.empty(size, np.int64)
    keys: list[str] = []
    bad: list[dict[str, Any]] = []
    for b, sample in enumerate(samples):
        places = (out[v, b] for out in crops for v in range(len(out)))
        for number, (view, reduction, out) in enumerate(zip(sample.views, sample.reductions, places, strict=True)):
            sample.levels.cut(view.box, reduction, view.flip, out)
            if in_worker:
                photometric_8bit.apply(out, view.draw)
            draws[number].append(photometric_8bit.NOTHING if in_worker else view.draw)
        positions[b], labels[b] = sample.batch_position, sample.label
        keys.append(sample.key)
        bad.extend(sample.bad)
    fields = tuple(field.numpy() for field in photometric.stack(draws))
    return Part(pixels, fields, positions, keys, labels, bad, batch_index, time.monotonic() - began)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return memory for pixels; in a loader process what it shares with its parent, so that sending it copies nothing."""
    empty = torch.empty(shape, dtype=dtype)
    return empty.share_memory_() if get_worker_info() else empty
