"""From shards to this rank's batches of crops. Start reading here: `batches` ties the files of the pipeline together.

A worked example: 10 samples in 3 shards, `train.global_batch` 4, `data.slots` 4, `data.shuffle_window` 2, seed 0, on 2
ranks with 2 loader processes (workers) each. 2/1 stands for sample 1 of shard-000002.tar.

    shard-000000.tar  0/0 0/1 0/2 0/3        each tar has an index of where its members lie: manifest.py
    shard-000001.tar  1/0 1/1 1/2 1/3
    shard-000002.tar  2/0 2/1

order.py permutes the shards, here to 1, 2, 0, and shuffles the samples of every 2 consecutive ones. Each slot reads a
stretch of the result, and a batch takes an equal share of every slot; the last 10 mod 4 samples are dropped:

    position   0   1    2   3    4   5    6   7    8   9
    sample    1/0 1/1  1/2 2/1  2/0 1/3  0/3 0/1  0/0 0/2
    slot       ── 0 ──  ── 1 ──  ── 2 ──  ── 3 ──  dropped
    batch 0   1/0      1/2      2/0      0/3
    batch 1       1/1      2/1      1/3      0/1

loader.py (`LoaderAssignment`) deals out the images of a batch: the first two to rank 0, of which worker 1 gets the second,
that of slot 1. In batch 0 it makes:

    file               makes                     of sample 1/2
    shard_stream.py    SampleAddress             epoch 0, position 2
    reader.py          bytes                     the image file: one pread of shard-000001.tar
    worker_batch.py    DecodedSample             batch_position 1; 2 + 8 crop boxes, the image [H, W, 3] they are cut from
    worker_batch.py    WorkerBatch               crops [2, 1, 224, 224, 3] and [8, 1, 96, 96, 3], positions [1]
    stream.py          Batch                     both workers' parts: [2, 2, 3, 224, 224] and [8, 2, 3, 96, 96], positions
                                                 [0, 1]; page-locked where there is a GPU
    stream.py          MicroBatch                on the training device, augmented by photometric.py and normalised: float
                                                 [4, 3, 224, 224] and [16, 3, 96, 96]; train.grad_accum of them

crops.py draws the boxes from (seed, epoch, key, crop), picture.py decodes the file no larger than they need. Who reads
a sample decides nothing else, so a global batch is bit for bit the same at any number of ranks and workers.

Several shard sets are mixed by mix.py, which then gives the addresses. Plain tars without our index are read by
url_stream.py in the place of shard_stream.py; their batches are the same only at the same number of ranks and workers.
"""

import glob
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esvit_scale import ranges
from esvit_scale.config import Config, Data
from esvit_scale.data import manifest as manifests
from esvit_scale.data import mix, mixing, photometric, photometric_8bit, signals
from esvit_scale.data import order as orders
from esvit_scale.data.batch_memory import BatchMemory, places_for
from esvit_scale.data.evaluation import EvaluationBatch, evaluation_batches
from esvit_scale.data.evaluation_crop import centre_crop, evaluation_side, whole_image
from esvit_scale.data.loader import (
    LoaderAssignment,
    check_division,
    pixel_dtype,
    reason,
    run_stages,
    translate_worker_errors,
)
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.mixing import Mixture, SoftLabels, mix_images, mix_labels
from esvit_scale.data.photometric import BatchAugmentationParams
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.data.remote import place, working_set
from esvit_scale.data.shard_stream import ShardSamples
from esvit_scale.data.signals import Signal
from esvit_scale.data.url_stream import UrlSamples, UrlSets
from esvit_scale.data.worker_batch import DecodedSample, WorkerBatch, crop_shapes, make_worker_batch
from esvit_scale.errors import UserError
from esvit_scale.store_urls import is_set_url

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
    "whole_image",
]

log = logging.getLogger(__name__)

TrainingData = Manifest | MixedSets | UrlSets


class Batch(NamedTuple):
    """One rank's part of a global batch; its B images are in the order of their positions."""

    crops: list[
        Tensor
    ]  # per resolution group, globals first: uint8 or uint16 [V_g, B, channels, S_g, S_g], channels last
    photometric: BatchAugmentationParams  # of every crop, leading shape [V, B], on the host
    positions: Tensor  # int64 [B]: place in the global batch, 0..global_batch-1, the same at any world size
    keys: list[str]
    labels: Tensor  # int64 [B], -1 without a class; only an objective that takes labels learns from them
    bad: list[dict[str, Any]]  # quarantine rows from making this batch: shard, key, reason, epoch, position
    batch_index: int  # epoch · steps per epoch + step
    worker_rates: Mapping[int, float] = {}  # loader process → images/s while it made its part
    signals: Mapping[str, tuple[Tensor, Tensor]] = {}  # by modality, as signals.py sends it: [V, B, …], lengths [V, B]
    has_image: Tensor | None = None  # bool [B]; None where no signals are read: all samples have one


class MicroBatch(NamedTuple):
    """One rank's images for one forward and backward pass: on the rank's device, augmented and normalised."""

    crops: list[Tensor]  # one [V_g·B, channels, S_g, S_g] per resolution group, the two globals first
    positions: Tensor  # int64 [B]: places in the global batch
    labels: SoftLabels | None = None  # where the run learns labels (objective.classes)
    signals: Mapping[str, Signal] = {}  # by modality (`data.audio`, …); those of which the config reads views
    has_image: Tensor | None = None  # bool [B]: the crops of a sample without an image are zeros; None: all have one


def open_data(config: Config) -> TrainingData:
    """Open what `data.train` or `data.mix` names: one shard set, several mixed ones, or plain tars.

    Raises:
        UserError: the data is missing, is damaged, or does not fit the config.
    """
    signals.require(config.data)
    if MixedSets.wanted(config.data):
        check_pixels(config)
        mixed = MixedSets.open(config.data)
        _warn_of_absent(config.data, [one.manifest for one in mixed.sets])
        return mixed
    if UrlSets.wanted(config.data):
        for urls in (mixed.urls for mixed in config.data.mix if manifests.is_shard_set(Path(mixed.urls))):
            log.warning(
                "data.mix: %s is a shard set, but it is mixed with plain tars and therefore streamed like them: a resume is "
                "exact only at the same number of ranks and workers; write the tars with `esvit-scale shards create` to mix "
                "shard sets",
                urls,
            )
        return UrlSets.open(config.data)
    if not is_set_url(config.data.train) and glob.has_magic(config.data.train) and not Path(config.data.train).exists():
        raise UserError(
            f"data.train: {config.data.train}: a pattern can name tars (…/*.tar) but not shard sets; give the folder of one "
            "set, or make one set of several: `esvit-scale shards create --from tars FOLDER_OF_SETS DST`"
        )
    check_pixels(config)
    manifest = place.open_set(config.data.train, config.data)
    manifests.check_sizes(manifest)
    _warn_of_absent(config.data, [manifest])
    return manifest


def _warn_of_absent(data: Data, sets: Sequence[Manifest]) -> None:
    """Log a warning for each modality that a config reads and no sample of the sets has, by the counts of their manifests."""
    for name in signals.wanted(data):
        if name == "text" and not all(manifest.modalities for manifest in sets):
            continue  # captions of sets that were written as images alone are not counted
        if not any(manifest.modalities.get(name) for manifest in sets):
            log.warning(
                "data.%s.views: no sample of %s has %s, so nothing is learned of it; name a set that has some, or set "
                "data.%s.views=0",
                name,
                ", ".join(manifests.address(manifest.root) for manifest in sets),
                name,
                name,
            )


def check_pixels(config: Config) -> None:
    """Raise UserError when a shard set has other channels or bits than the config, or `data.mean` and `data.std` are missing."""
    pixels = pixel_format(config.data)
    for train in (config.data.train, *(mixed.urls for mixed in config.data.mix)):
        folder = place.local_folder(train, config.data)
        if train and manifests.is_shard_set(folder):
            manifests.check_pixels(manifests.load(folder), pixels)


def steps_per_epoch(config: Config, data: TrainingData) -> int:
    """Return the number of steps in an epoch: ⌊samples / global_batch⌋.

    Raises:
        UserError: the data holds fewer samples than one batch.
    """
    return orders.steps_per_epoch(data.samples, config.train.global_batch)


def images_of_sets(config: Config, data: TrainingData) -> Callable[[int], dict[str, int]]:
    """Return a function that counts the images of each mixed set in the first n global batches, by the sets' names.

    For data other than a mix of shard sets, the function returns an empty dict.
    """
    if not isinstance(data, MixedSets):
        return lambda batches: {}
    names, order = [one.name for one in data.sets], mix.order_of(config, data)
    return lambda batches: dict(zip(names, order.images(batches), strict=True))


def batches(config: Config, data: TrainingData, rank: int, world_size: int, start: int, stop: int) -> Iterator[Batch]:
    """Return an iterator over this rank's part of the global batches start..stop-1, over as many epochs as these span.

    Call it, and iterate, in the main thread: the loader processes end with the thread that starts them.

    Raises:
        UserError: at once, when the batch, the slots, the ranks and the data do not fit together; while iterating, when
            no valid sample can be read in place of a bad one.
        RestartCanHelp: while iterating, when a loader process dies or the storage does not answer.
    """
    check_division(config, world_size)
    if config.data.channels != 3 and rank == 0:
        log.info(
            "data.channels=%d: images are augmented by crops, flips, blur, and brightness and contrast of each channel; "
            "saturation, hue, grayscale and solarisation are left out, because they are defined for RGB only",
            config.data.channels,
        )
    if config.data.photometric == "workers":
        photometric_8bit.require()
    assignment = LoaderAssignment(
        config, rank, world_size, start, stop, steps_per_epoch(config, data), isinstance(data, UrlSets)
    )
    workers = config.data.workers
    if isinstance(data, UrlSets) and workers > assignment.most_parts:
        workers = assignment.most_parts  # as many as ever, because the order of plain tars depends on their number
        log.warning(
            "data.workers: %d is more than the %d parts into which a rank's batch of plain tars can be divided; using %d workers",
            config.data.workers,
            workers,
            workers,
        )
    samples: ShardSamples | UrlSamples
    if isinstance(data, UrlSets):
        data.check_consumers(world_size * max(workers, 1))
        samples = UrlSamples(assignment, data)
    else:
        if isinstance(data, MixedSets):
            mix.order_of(config, data)  # raises UserError at once if the mix does not fit the config
        of_node = partial(place.of_node, cache_dir=config.data.cache_dir)
        ring = working_set.ring_bytes(config, data, rank, world_size)
        samples = ShardSamples(assignment, of_node(data) if isinstance(data, Manifest) else data.moved(of_node), ring)
    parts = min(max(workers, 1), assignment.most_parts)  # of a batch
    memory = _batch_memory(assignment, places_for(workers, parts)) if workers else None
    stages: list[Callable[..., Any]] = [samples, partial(_make_worker_batches, assignment, memory)]
    return _join_parts(run_stages(stages, workers), parts, memory)


@ranges.named("crops to the device")
def micro_batches(config: Config, batch: Batch, device: torch.device, dtype: torch.dtype) -> list[MicroBatch]:
    """Move a batch to the device, augment it, and cut it into `train.grad_accum` equal parts, in the order of positions.

    There is one transfer for each resolution, and one for positions and augmentation parameters together.
    """
    pixels, plans, first = pixel_format(config.data), [], 0
    for group in batch.crops:
        plans.append(photometric.plan(batch.photometric.crops(first, first + len(group)), pixels))
        first += len(group)
    small = [tensor for planned in plans for tensor in (planned.rows, planned.values)]
    mixture = _mixture(config, batch)
    there, labels, *small = photometric.send_together([batch.positions, batch.labels, *(mixture or ()), *small], device)
    if mixture is not None:
        mixture, small = Mixture(*small[:3]), small[3:]
    has_image = None if batch.has_image is None else batch.has_image.to(device, non_blocking=True)
    crops = []
    for group, planned, rows, values in zip(batch.crops, plans, small[::2], small[1::2], strict=True):
        stored = group.to(device, non_blocking=True).flatten(0, 1)  # [V_g·B, channels, S_g, S_g]
        augmented = photometric.run(stored, planned._replace(rows=rows, values=values), pixels)
        if mixture is not None:  # then there is one crop of an image
            augmented = mix_images(augmented, mixture)
        augmented = augmented.to(dtype).unflatten(0, group.shape[:2])
        if has_image is not None:
            augmented = augmented.masked_fill_(~has_image[None, :, None, None, None], 0)
        crops.append(augmented)
    accum = config.train.grad_accum
    parts = zip(*(group.chunk(accum, dim=1) for group in crops), strict=True)
    positions = there.chunk(accum)
    of_parts: list[SoftLabels | None] = [None] * accum
    if config.objective.classes:
        valid = labels.clamp(0, config.objective.classes - 1)  # labels.py ends the run because of others
        columns = (tensor.chunk(accum) for tensor in mix_labels(valid, mixture))
        of_parts = [SoftLabels(*part) for part in zip(*columns, strict=True)]
    found = [
        MicroBatch([group.flatten(0, 1) for group in groups], position, of_part)
        for groups, position, of_part in zip(parts, positions, of_parts, strict=True)
    ]
    if has_image is None:
        return found
    beside = zip(_signals(config, batch, device), has_image.chunk(accum), strict=True)
    return [micro._replace(signals=own, has_image=there) for micro, (own, there) in zip(found, beside, strict=True)]


def _signals(config: Config, batch: Batch, device: torch.device) -> list[dict[str, Signal]]:
    """Move a batch's signals to the device, and return those of each micro-batch."""
    accum, pixels = config.train.grad_accum, signals.video_pixels(config.data)
    found: list[dict[str, Signal]] = [{} for _ in range(accum)]
    for modality, both in batch.signals.items():
        values, lengths = (tensor.to(device, non_blocking=True).chunk(accum, dim=1) for tensor in both)
        for own, value, length in zip(found, values, lengths, strict=True):
            own[modality] = signals.finish(modality, value, length, pixels)
    return found


def _mixture(config: Config, batch: Batch) -> Mixture | None:
    """Draw how the images of a batch are mixed; None if they are not."""
    data = config.data
    if not (data.mixup or data.cutmix):
        return None
    size = data.global_crops.size
    return mixing.draw(config.seed, batch.batch_index, batch.positions, size, data.mixup, data.cutmix)


def _batch_memory(assignment: LoaderAssignment, places: int) -> BatchMemory | None:
    """Return memory for this rank's batches; None where there is too little for it, and processes send what they make."""
    config, images = assignment.config, len(assignment.images_of_rank)
    try:
        return BatchMemory(crop_shapes(config, images), pixel_dtype(config.data.bits), places)
    except RuntimeError as error:
        if assignment.rank == 0:
            log.info(
                "data: no shared memory for %d batches (%s); they are sent and copied instead", places, reason(error)
            )
        return None


def _make_worker_batches(
    assignment: LoaderAssignment, memory: BatchMemory | None, samples: Iterable[DecodedSample]
) -> Iterator[WorkerBatch]:
    samples = iter(samples)
    for batch_index, images in assignment.parts_of_worker():
        first, size = images.start - assignment.images_of_rank.start, len(images)
        rows = memory.claim(batch_index, slice(first, first + size)) if memory else None
        yield make_worker_batch(assignment.config, batch_index, islice(samples, size), size, rows)


def _join_parts(worker_batches: Iterator[WorkerBatch], count: int, memory: BatchMemory | None) -> Iterator[Batch]:
    """Yield the rank's batches, each joined from `count` parts: the loader yields one of every worker in turn."""
    pin = torch.cuda.is_available()  # page-locked memory is copied to the device while it computes
    while True:
        with translate_worker_errors():
            parts = list(islice(worker_batches, count))
            if not parts:
                return
            batch = _join(parts, pin, memory)
        yield batch
        del batch, parts  # so that their memory is free as soon as training has used them


def _join(parts: list[WorkerBatch], pin: bool, memory: BatchMemory | None) -> Batch:
    params = [BatchAugmentationParams(*map(torch.from_numpy, part.photometric)) for part in parts]
    return Batch(
        crops=[group.permute(0, 1, 4, 2, 3) for group in _join_crops(parts, pin, memory)],
        photometric=photometric.concatenate(params, 1),
        positions=torch.from_numpy(np.concatenate([part.positions for part in parts])),
        keys=[key for part in parts for key in part.keys],
        labels=torch.from_numpy(np.concatenate([part.labels for part in parts])),
        bad=[row for part in parts for row in part.bad],
        batch_index=parts[0].batch_index,
        worker_rates={part.worker: len(part.keys) / max(part.seconds, 1e-9) for part in parts},
        signals={modality: _join_signals(parts, modality, pin) for modality in parts[0].signals},
        has_image=None if not parts[0].signals else torch.cat([torch.from_numpy(p.has_image) for p in parts]),
    )


def _join_signals(parts: list[WorkerBatch], modality: str, pin: bool) -> tuple[Tensor, Tensor]:
    """Return a modality of all workers: values [V, B, …], in page-locked memory if `pin`, and lengths [V, B]."""
    values = _concatenate(tuple(part.signals[modality][0] for part in parts), pin)
    return values, torch.cat([torch.from_numpy(part.signals[modality][1]) for part in parts], 1)


def _join_crops(parts: list[WorkerBatch], pin: bool, memory: BatchMemory | None) -> list[Tensor]:
    """Return the crops of all workers, per resolution group [V, B, S, S, C], in page-locked memory if `pin`."""
    if memory is not None and not pin and not any(part.crops for part in parts):
        return memory.take(parts[0].batch_index)
    found, first = [], 0
    for part in parts:
        rows = slice(first, first + len(part.keys))
        found.append(part.crops if part.crops or memory is None else memory.rows(part.batch_index, rows))
        first = rows.stop
    return [_concatenate(group, pin) for group in zip(*found, strict=True)]


def _concatenate(parts: tuple[Tensor, ...], pin: bool) -> Tensor:
    """Concatenate the workers' views along the batch axis to [V, B, …], in page-locked memory if `pin`."""
    if len(parts) == 1 and not pin:
        return parts[0]
    views, _, *rest = parts[0].shape
    whole = torch.empty((views, sum(p.shape[1] for p in parts), *rest), dtype=parts[0].dtype, pin_memory=pin)
    return torch.cat(parts, 1, out=whole)
