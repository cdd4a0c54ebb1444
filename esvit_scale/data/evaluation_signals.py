"""Batches for the evaluation of several modalities: every sample of a shard set once, with one unaugmented view of each."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import photometric, signals
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.evaluation_crop import decode_centre_crop
from esvit_scale.data.loader import reason, run_stages
from esvit_scale.data.pixel_format import PixelFormat, pixel_format
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.signal_members import plain_image
from esvit_scale.data.signals import Signal
from esvit_scale.errors import UserError

log = logging.getLogger(__name__)


class SignalBatch(NamedTuple):
    """A batch of samples for evaluation, in the order of the set."""

    keys: list[str]
    labels: Tensor  # int64 [B], -1 without a class
    images: Tensor  # float32 [B, C, S, S]: the evaluation crop, normalised; zeros for a sample without an image
    has_image: Tensor  # bool [B]
    signals: Mapping[str, Signal]  # by modality, one view a sample: the centre of a recording or clip, the first text


def evaluation_signals(
    source: Path, config: Config, batch: int, workers: int = 0, size: int | None = None
) -> Iterator[SignalBatch]:
    """Yield the samples of a shard set in the order of its manifest, with their images and what the config reads beside.

    Samples of which nothing can be used are left out and counted in a warning, as are members that are damaged.

    Args:
        batch: samples per batch.
        size: pixels on a side of the image; None: that of the config's global crops.

    Raises:
        UserError: the source is no shard set, or a library is missing.
    """
    if not manifests.is_shard_set(source):
        raise UserError(
            f"{source}: no shard set; evaluations read sound, video and text from shard sets only: `esvit-scale shards create "
            "SRC DST --members audio,video,text` makes one, also of tars (--from tars)"
        )
    signals.require(config.data)
    manifest = manifests.load(source)
    manifests.check_sizes(manifest)
    pixels = pixel_format(config.data)
    manifests.check_pixels(manifest, pixels)
    work = partial(_parts, manifest, config, batch, size or config.data.global_crops.size, pixels)
    bad: list[str] = []
    for keys, labels, images, has_image, arrays, problems in run_stages(
        [work], min(workers, -(-manifest.samples // batch))
    ):
        bad += problems
        if keys:
            there = torch.from_numpy(has_image)
            crops = photometric.unit(torch.from_numpy(images).permute(0, 3, 1, 2), pixels)
            crops = photometric.normalize_(crops, pixels).masked_fill_(~there[:, None, None, None], 0)
            found = {
                name: signals.finish(
                    name, torch.from_numpy(values), torch.from_numpy(lengths), signals.video_pixels(config.data)
                )
                for name, (values, lengths) in arrays.items()
            }
            yield SignalBatch(keys, torch.tensor(labels), crops, there, found)
    if bad:
        log.warning("%s: left out %d damaged members and samples (first: %s)", source, len(bad), bad[0])


def _parts(
    manifest: manifests.Manifest, config: Config, batch: int, size: int, pixels: PixelFormat
) -> Iterator[tuple[Any, ...]]:
    """Yield the calling process's batches as NumPy arrays: every n-th of all, of n processes."""
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    reader, starts = ShardReader(manifest), np.cumsum([0, *manifest.shards.samples])
    with closing(reader):
        for first in range(worker * batch, manifest.samples, workers * batch):
            count = min(batch, manifest.samples - first)
            images = np.zeros((count, size, size, pixels.channels), pixels.dtype)
            arrays = signals.arrays(config.data, count, views=1)
            has_image = np.zeros(count, bool)
            keys: list[str] = []
            labels: list[int] = []
            problems: list[str] = []
            for number in range(first, first + count):
                shard = int(np.searchsorted(starts, number, side="right")) - 1
                name, b = f"{manifest.shards[shard].name}: sample {number - int(starts[shard])}", len(keys)
                try:
                    entry = reader.entry(shard, number - int(starts[shard]))
                    name = entry.key
                    read = partial(reader.member, shard, entry)
                    views, bad = signals.read_all(config, None, entry.key, list(entry.members), read)
                    if image := plain_image(entry.members):
                        try:
                            images[b], has_image[b] = decode_centre_crop(read(image), size, pixels), True
                        except BadImage as error:
                            bad.insert(0, f"image: {error}")
                    label = reader.label(shard, entry)
                except (BadImage, OSError) as error:
                    problems.append(f"{name}: {reason(error)}")
                    has_image[b] = False
                    continue
                problems += [f"{name}: {problem}" for problem in bad]
                if has_image[b] or views:
                    signals.fill(views, arrays, b)
                    keys.append(name)
                    labels.append(label)
            n = len(keys)
            cut = {modality: (values[:, :n], lengths[:, :n]) for modality, (values, lengths) in arrays.items()}
            yield keys, labels, images[:n], has_image[:n], cut, problems
