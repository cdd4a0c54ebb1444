"""Shards → batches of crops, made in loader processes: `batches`.

The order of samples is order.py's: slot s of S belongs to rank ⌊s / (S/world)⌋ and, within the rank, to one worker, so
a global batch of an indexed set, or of several that are mixed (mix.py), is bit for bit the same at any world size and
worker count. Sets of plain tars without our index are streamed (url_stream.py): exact at the same world size only.
"""

import glob
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import mix, photometric, photometric_8bit
from esvit_scale.data import order as orders
from esvit_scale.data.evaluation import EvaluationBatch, centre_crop, evaluation_batches, evaluation_side
from esvit_scale.data.loader import LoaderAssignment, check_division, run_stages, translate_worker_errors
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.photometric import BatchAugmentationParams
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.data.shard_stream import ShardSamples
from esvit_scale.data.url_stream import UrlSamples, UrlSets
from esvit_scale.data.worker_batch import DecodedSample, WorkerBatch, make_worker_batch
from esvit_scale.errors import UserError

__all__ = [
    "Batch",
    "EvaluationBatch",
    "MicroBatch",
    "batches",
    "centre_crop",
    "evaluation_batches",
    "evaluation_side",
    "images_of_sets",
    "micro_batches",
    "open_data",
    "steps_per_epoch",
]

log = logging.getLogger(__name__)

Source = Manifest | MixedSets | UrlSets


class Batch(NamedTuple):
    """One rank's part of a global batch; its B images are in the order of their positions."""

    crops: list[
        Tensor
    ]  # uint8 or uint16 [V_g, B, channels, S_g, S_g] (channels last in memory), a resolution group each, globals first
    photometric: BatchAugmentationParams  # of every crop, leading shape [V, B], on the host
    positions: Tensor  # int64 [B]: place in the global batch, 0..global_batch-1, the same at any world size
    keys: list[str]
    labels: Tensor  # int64 [B], -1 without a class; for looking at, never for training
    bad: list[dict[str, Any]]  # samples replaced while this batch was made: shard, key, reason, epoch, position
    batch_index: int  # epoch · steps per epoch + step
    worker_rates: tuple[float, ...] = ()  # images/s of each worker while it made its part


class MicroBatch(NamedTuple):
    """One rank's images of one forward and backward: on its device, augmented and normalised."""

    crops: list[Tensor]  # one [V_g·B, channels, S_g, S_g] per resolution group, the two globals first
    positions: Tensor  # int64 [B]: places in the global batch


def open_data(config: Config) -> Source:
    """What `data.train` and `data.mix` name.

    Raises:
        UserError: not there, not whole, or not described completely.
    """
    if MixedSets.wanted(config.data):
        check_pixels(config)
        return MixedSets.open(config.data)
    if UrlSets.wanted(config.data):
        for urls in (mixed.urls for mixed in config.data.mix if manifests.is_shard_set(Path(mixed.urls))):
            log.warning(
                "data.mix: %s is a shard set, but beside plain tars it is read as they are: a resume is exact at the same "
                "number of ranks and workers only; write the others with `esvit-scale shards create` to mix shard sets",
                urls,
            )
        return UrlSets.open(config.data)
    if glob.has_magic(config.data.train) and not Path(config.data.train).exists():
        raise UserError(
            f"data.train: {config.data.train}: a pattern can name tars (…/*.tar) but not sets; give one set's folder, or "
            "make one set of several: `esvit-scale shards create --from tars FOLDER_OF_SETS DST`"
        )
    check_pixels(config)
    manifest = manifests.load(Path(config.data.train))
    manifests.check_sizes(manifest)
    return manifest


def check_pixels(config: Config) -> None:
    """Raise UserError where a manifest of the config's sets names other channels or bits, or statistics are missing."""
    pixels = pixel_format(config.data)
    for train in (config.data.train, *(mixed.urls for mixed in config.data.mix)):
        if train and manifests.is_shard_set(Path(train)):
            manifests.check_pixels(manifests.load(Path(train)), pixels)


def steps_per_epoch(config: Config, data: Source) -> int:
    """⌊samples / global_batch⌋.

    Raises:
        UserError: the set is smaller than one batch.
    """
    return orders.steps_per_epoch(data.samples, config.train.global_batch)


def images_of_sets(config: Config, data: Source) -> Callable[[int], dict[str, int]]:
    """How many images of each set of a mix of shard sets a number of global batches hold, by the sets' names; nothing
    of other data."""
    if not isinstance(data, MixedSets):
        return lambda batches: {}
    names, order = [one.name for one in data.sets], mix.order_of(config, data)
    return lambda batches: dict(zip(names, order.images(batches), strict=True))


def batches(config: Config, data: Source, rank: int, world_size: int, start: int, stop: int) -> Iterator[Batch]:
    """This rank's part of the global batches start..stop-1, over as many epochs as that spans.

    Call it, and iterate, in the main thread: the loader processes end with the thread that starts them.

    Raises:
        UserError: at once, when the batch, the slots, the ranks and the set do not fit together; while iterating, when
            nothing good can be read in place of a bad sample.
        RestartCanHelp: while iterating, when a loader process dies or the storage is gone.
    """
    check_division(config, world_size)
    if config.data.channels != 3 and rank == 0:
        log.info(
            "data.channels=%d: crops, flips, blur, and brightness and contrast of each channel; no saturation, hue, "
            "grayscale and solarisation, which are defined for RGB",
            config.data.channels,
        )
    if config.data.photometric == "workers":
        photometric_8bit.require()
    assignment = LoaderAssignment(config, rank, world_size, start, stop, steps_per_epoch(config, data))
    workers = min(config.data.workers, len(assignment.slots_of_rank))
    if workers < config.data.workers:
        log.warning(
            "data.workers: %d, but this rank has %d data slots; using %d workers",
            config.data.workers,
            len(assignment.slots_of_rank),
            workers,
        )
    samples: ShardSamples | UrlSamples
    if isinstance(data, UrlSets):
        data.check_consumers(world_size * max(workers, 1))
        samples = UrlSamples(assignment, data)
    else:
        if isinstance(data, MixedSets):
            mix.order_of(config, data)  # says at once what does not fit
        samples = ShardSamples(assignment, data)
    return _joined(run_stages([samples, partial(_make_worker_batches, assignment)], workers), max(workers, 1))


def micro_batches(config: Config, batch: Batch, device: torch.device, dtype: torch.dtype) -> list[MicroBatch]:
    """Move a batch to the device, augment it, and cut it into `train.grad_accum` equal parts, in the order of positions."""
    crops, first = [], 0
    for group in batch.crops:
        views, images = group.shape[:2]
        params = batch.photometric.crops(first, first + views)
        pixels = group.to(device, non_blocking=True).flatten(0, 1)  # [V_g·B, channels, S_g, S_g]
        augmented = photometric.apply(pixels, params, pixel_format(config.data)).to(dtype)
        crops.append(augmented.unflatten(0, (views, images)))
        first += views
    accum = config.train.grad_accum
    parts = zip(*(group.chunk(accum, dim=1) for group in crops), strict=True)
    positions = batch.positions.to(device).chunk(accum)
    return [
        MicroBatch([group.flatten(0, 1) for group in groups], position)
        for groups, position in zip(parts, positions, strict=True)
    ]


def _make_worker_batches(assignment: LoaderAssignment, samples: Iterable[DecodedSample]) -> Iterator[WorkerBatch]:
    samples, size = iter(samples), assignment.images_per_batch
    for batch_index in range(assignment.start, assignment.stop):
        yield make_worker_batch(assignment.config, batch_index, islice(samples, size), size)


def _joined(parts: Iterator[WorkerBatch], workers: int) -> Iterator[Batch]:
    """The loader hands out the workers' parts in turn; `workers` of them make a batch."""
    pin = torch.cuda.is_available()  # page-locked: copied to the device while it computes
    while True:
        with translate_worker_errors():
            group = list(islice(parts, workers))
            if not group:
                return
            batch = _batch(group, pin)
        yield batch


def _batch(group: list[WorkerBatch], pin: bool) -> Batch:
    params = [BatchAugmentationParams(*map(torch.from_numpy, part.photometric)) for part in group]
    crops = zip(*(part.crops for part in group), strict=True)
    return Batch(
        crops=[_concatenated(c, pin).permute(0, 1, 4, 2, 3) for c in crops],
        photometric=photometric.concatenate(params, 1),
        positions=torch.from_numpy(np.concatenate([part.positions for part in group])),
        keys=[key for part in group for key in part.keys],
        labels=torch.from_numpy(np.concatenate([part.labels for part in group])),
        bad=[row for part in group for row in part.bad],
        batch_index=group[0].batch_index,
        worker_rates=tuple(len(part.keys) / max(part.seconds, 1e-9) for part in group),
    )


def _concatenated(parts: tuple[Tensor, ...], pin: bool) -> Tensor:
    """[V, B, S, S, C] of parts of B."""
    if len(parts) == 1 and not pin:
        return parts[0]
    views, _, *rest = parts[0].shape
    whole = torch.empty((views, sum(p.shape[1] for p in parts), *rest), dtype=parts[0].dtype, pin_memory=pin)
    return torch.cat(parts, 1, out=whole)
