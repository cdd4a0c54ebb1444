"""Shards → batches of crops, through webdataset pipelines in loader processes.

The order of samples is order.py's: slot s of S belongs to rank ⌊s / (S/world)⌋ and, within the rank, to one worker
(whole contiguous runs of slots). A worker yields its part of every batch, and the parts in worker order are the rank's
batch in the order of positions, so a global batch is bit for bit the same at any world size and worker count. Samples
are read through their shard's index, so starting at any batch index costs nothing.
"""

import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.config import Config, nearest_multiple
from esvit_scale.data import manifest as manifests
from esvit_scale.data import order as orders
from esvit_scale.data import photometric
from esvit_scale.data.crops import keyed_generator, random_crop
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.image_folder import ImageFolder, list_images, printable, read_file
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.order import Order
from esvit_scale.data.photometric import Photometric
from esvit_scale.data.reader import ShardReader
from esvit_scale.errors import UserError

T = TypeVar("T")
log = logging.getLogger(__name__)

SUBSTITUTES = 16  # tried in turn for one bad sample before the run stops
PREFETCH = 2  # batches that every worker prepares ahead


class Batch(NamedTuple):
    """One rank's part of a global batch; its B images are in the order of their positions."""

    crops: list[Tensor]  # uint8 [V_g, B, 3, S_g, S_g], one tensor per resolution group, the two globals first
    photometric: Photometric  # of every crop, leading shape [V, B], on the host
    positions: Tensor  # int64 [B]: place in the global batch, 0..global_batch-1, the same at any world size
    keys: list[str]
    labels: Tensor  # int64 [B], -1 without a class; for looking at, never for training
    bad: list[dict[str, Any]]  # samples replaced while this batch was made: shard, key, reason, epoch, position
    batch_index: int  # epoch · steps per epoch + step


def steps_per_epoch(config: Config, manifest: Manifest) -> int:
    """⌊samples / global_batch⌋.

    Raises:
        UserError: the set is smaller than one batch.
    """
    return orders.steps_per_epoch(manifest.samples, config.train.global_batch)


def batches(config: Config, manifest: Manifest, rank: int, world_size: int, start: int, stop: int) -> Iterator[Batch]:
    """This rank's part of the global batches start..stop-1, over as many epochs as that spans.

    Call it, and iterate, in the main thread: the loader processes end with the thread that starts them.

    Raises:
        UserError: at once, when the batch, the slots, the ranks and the set do not fit together.
        RuntimeError: while iterating, when SUBSTITUTES samples in a row are bad or a worker dies.
    """
    slots = _slots_of_rank(config, rank, world_size)
    steps = steps_per_epoch(config, manifest)
    job = _Job(config, manifest, slots, start, stop, steps)
    workers = min(config.data.workers, len(slots))
    if workers < config.data.workers:
        log.warning(
            "data.workers: %d, but this rank has %d data slots; using %d workers",
            config.data.workers,
            len(slots),
            workers,
        )
    return _joined(_loader([partial(_places, job), partial(_read, job), partial(_crop, job)], workers), max(workers, 1))


@dataclass(frozen=True)
class _Job:
    config: Config
    manifest: Manifest
    slots: range  # of this rank
    start: int
    stop: int
    steps: int  # per epoch

    def slots_of_worker(self) -> range:
        info = get_worker_info()
        n, worker, workers = len(self.slots), info.id if info else 0, info.num_workers if info else 1
        return self.slots[worker * n // workers : (worker + 1) * n // workers]

    @property
    def per_slot(self) -> int:
        return self.config.train.global_batch // self.config.slots

    def order(self, epoch: int) -> Order:
        c = self.config
        counts = [shard.samples for shard in self.manifest.shards]
        return Order(c.seed, epoch, counts, c.train.global_batch, c.slots, c.data.shuffle_window)


def _slots_of_rank(config: Config, rank: int, world_size: int) -> range:
    batch, slots, ranks = config.train.global_batch, config.slots, world_size * config.train.grad_accum
    if batch % ranks:
        raise UserError(
            f"train.global_batch: {batch} does not divide into {world_size} ranks × {config.train.grad_accum} micro-batches; "
            f"nearest: {nearest_multiple(batch, ranks)}"
        )
    if slots % world_size:
        valid = [s for s in range(world_size, batch + 1, world_size) if batch % s == 0]
        best = min(valid, key=lambda s: abs(s - slots))
        raise UserError(f"data.slots: {slots} slots do not divide over {world_size} ranks; nearest: {best}")
    share = slots // world_size
    return range(rank * share, (rank + 1) * share)


# --- stages that run in the workers ----------------------------------------------------------------------------------


class _Place(NamedTuple):
    batch_index: int
    epoch: int
    order: Order
    position: int  # in the epoch's order
    batch_position: int  # in the global batch


class _Read(NamedTuple):
    place: _Place
    key: str
    label: int
    image: Image.Image
    bad: list[dict[str, Any]]


class _Part(NamedTuple):
    """A worker's part of a batch. Small arrays travel as NumPy: a tensor would cost a shared-memory file each."""

    crops: list[Tensor]
    photometric: tuple[NDArray[Any], ...]
    positions: NDArray[np.int64]
    keys: list[str]
    labels: NDArray[np.int64]
    bad: list[dict[str, Any]]
    batch_index: int


def _places(job: _Job) -> Iterator[_Place]:
    epoch, order = -1, None
    slots, per_slot = job.slots_of_worker(), job.per_slot
    for batch_index in range(job.start, job.stop):
        if order is None or batch_index // job.steps != epoch:
            epoch = batch_index // job.steps
            order = job.order(epoch)
        for slot in slots:
            for i in range(per_slot):
                position = order.position(batch_index % job.steps, slot, i)
                yield _Place(batch_index, epoch, order, position, slot * per_slot + i)


def _read(job: _Job, places: Iterable[_Place]) -> Iterator[_Read]:
    reader = ShardReader(job.manifest)
    for place in places:
        yield _read_good(reader, job.manifest, place)


def _read_good(reader: ShardReader, manifest: Manifest, place: _Place) -> _Read:
    """The sample of a place, or the first good one among its substitutes."""
    bad: list[dict[str, Any]] = []
    position = place.position
    for attempt in range(SUBSTITUTES + 1):
        shard, i = place.order.locate(position)
        key = f"#{i}"
        try:
            entry = reader.entry(shard, i)
            key = entry.key
            image = decode(reader.image(shard, entry))
            return _Read(place, key, reader.label(shard, entry), image, bad)
        except (BadImage, OSError) as error:
            where = {"shard": manifest.shards[shard].name, "key": key, "reason": _reason(error)}
            bad.append({**where, "epoch": place.epoch, "position": position})
        position = place.order.substitute(place.position, attempt)
    raise _OnlyBad(
        f"{manifest.root}: {len(bad)} of {len(bad)} samples tried for one place of batch {place.batch_index} failed "
        f"(last: {bad[-1]['shard']}: {bad[-1]['key']}: {bad[-1]['reason']}); check the set with `esvit-scale shards verify`"
    )


def _crop(job: _Job, samples: Iterable[_Read]) -> Iterator[_Part]:
    samples = iter(samples)
    size = len(job.slots_of_worker()) * job.per_slot
    for batch_index in range(job.start, job.stop):
        yield _part(job.config, batch_index, islice(samples, size), size)


def _part(config: Config, batch_index: int, samples: Iterable[_Read], size: int) -> _Part:
    """Crops written straight into the part's arrays, one decoded image in memory at a time."""
    groups = _crop_groups(config)
    crops = [np.empty((g.views, size, 3, g.size, g.size), np.uint8) for g in groups]
    draws: list[list[photometric.Draw]] = [[] for _ in range(sum(g.views for g in groups))]
    part = _Part(
        [torch.from_numpy(c) for c in crops],
        (),
        np.empty(size, np.int64),
        [],
        np.empty(size, np.int64),
        [],
        batch_index,
    )
    for b, sample in enumerate(samples):
        number = 0
        for group, out in zip(groups, crops, strict=True):
            for v in range(group.views):
                rng = keyed_generator(config.seed, sample.place.epoch, sample.key, number)
                random_crop(rng, sample.image, group.scale, out[v, b])
                draws[number].append(photometric.draw(rng, number))
                number += 1
        part.positions[b], part.labels[b] = sample.place.batch_position, sample.label
        part.keys.append(sample.key)
        part.bad.extend(sample.bad)
    return part._replace(photometric=tuple(field.numpy() for field in photometric.stack(draws)))


class _CropGroup(NamedTuple):
    size: int
    views: int
    scale: tuple[float, float]


def _crop_groups(config: Config) -> list[_CropGroup]:
    data = config.data
    local = [_CropGroup(g.size, g.count, g.scale) for g in data.local_crops]
    return [_CropGroup(data.global_crops.size, 2, data.global_crops.scale), *local]


class _OnlyBad(Exception):
    pass


class _Failure(NamedTuple):
    """Travels instead of a part: an exception would arrive wrapped in the worker's traceback."""

    message: str


def _tell_failure(parts: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from parts
    except _OnlyBad as error:
        yield _Failure(str(error))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


# --- the loader ------------------------------------------------------------------------------------------------------


def _loader(stages: list[Callable[..., Any]], workers: int) -> Iterable[Any]:
    pipeline = wds.DataPipeline(*stages, _tell_failure)
    return wds.WebLoader(
        pipeline,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # the loader draws a seed nobody uses; not from the process's generator
    )


def _as_it_is(part: T) -> T:
    """Instead of the loader's default, which turns arrays into tensors."""
    return part


def _start_worker(parent: int, worker: int) -> None:
    """Signals are the training process's business, though ctrl-C and the scheduler send them to the whole process
    group: a worker ends when its parent says so, or is killed with it."""
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_sigterm_of, args=(parent,), daemon=True).start()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    torch.set_num_threads(1)


def _end_at_sigterm_of(parent: int) -> None:
    """The loader ends with SIGTERM what does not end by itself; anybody else's is ignored."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _parts(loader: Iterable[Any]) -> Iterator[Any]:
    for part in loader:
        if isinstance(part, _Failure):
            raise RuntimeError(part.message)
        yield part


def _joined(loader: Iterable[Any], workers: int) -> Iterator[Batch]:
    """The loader hands out the workers' parts in turn; `workers` of them make a batch."""
    parts = _parts(loader)
    while group := list(islice(parts, workers)):
        params = [Photometric(*map(torch.from_numpy, part.photometric)) for part in group]
        crops = list(zip(*(part.crops for part in group), strict=True))
        yield Batch(
            crops=[torch.cat(c, 1) if workers > 1 else c[0] for c in crops],
            photometric=photometric.concatenate(params, 1),
            positions=torch.from_numpy(np.concatenate([part.positions for part in group])),
            keys=[key for part in group for key in part.keys],
            labels=torch.from_numpy(np.concatenate([part.labels for part in group])),
            bad=[row for part in group for row in part.bad],
            batch_index=group[0].batch_index,
        )


# --- evaluation ------------------------------------------------------------------------------------------------------


class EvaluationBatch(NamedTuple):
    images: Tensor  # float32 [B, 3, S, S], ImageNet-normalised
    keys: list[str]
    labels: Tensor  # int64 [B], -1 without classes
    numbers: Tensor  # int64 [B]: place in the source, which images left out keep


def evaluation_batches(
    source: Path, size: int, batch: int, workers: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[EvaluationBatch]:
    """Every image of a shard set (manifest order) or image folder (path order) once, for frozen-feature evaluation.

    Resize of the short side to size·256/224 (bicubic), centre crop, ImageNet normalisation. Rank r takes the r-th of
    `world_size` contiguous parts, so the ranks' outputs in rank order are the source's order. Labels are the classes'
    indices (subfolders by name), -1 without classes. Bad images are left out and counted in a warning.

    Raises:
        UserError: the source is neither a shard set nor a folder with images, or a shard is missing or truncated.
    """
    items = _items(Path(source))
    numbers = range(rank * len(items) // world_size, (rank + 1) * len(items) // world_size)
    loader = _loader([partial(_evaluation_parts, items, numbers, size, batch)], min(workers, -(-len(numbers) // batch)))
    return _evaluation_joined(loader, str(source), len(numbers))


class _Items:
    """The images of a source by number: reads (key, label, bytes)."""

    def __init__(self, source: Manifest | ImageFolder) -> None:
        self._source = source
        self._reader = ShardReader(source) if isinstance(source, Manifest) else None
        counts = [s.samples for s in source.shards] if isinstance(source, Manifest) else [len(source.files)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, number: int) -> tuple[str, int, bytes]:
        if isinstance(self._source, ImageFolder):
            file = self._source.files[number]
            return printable(file.path), file.label, read_file(self._source.root / file.path)
        assert self._reader is not None
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        entry = self._reader.entry(shard, number - int(self._starts[shard]))
        return entry.key, self._reader.label(shard, entry), self._reader.image(shard, entry)

    def name(self, number: int) -> str:
        if isinstance(self._source, ImageFolder):
            return printable(self._source.files[number].path)
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return f"{self._source.shards[shard].name}: sample {number - int(self._starts[shard])}"


def _items(source: Path) -> _Items:
    if not manifests.is_shard_set(source):
        if any(source.glob("*.tar")):
            manifests.load(source)  # tars without a manifest: says what is wrong
        return _Items(list_images(source))
    manifest = manifests.load(source)
    manifests.check_sizes(manifest)
    return _Items(manifest)


class _EvaluationPart(NamedTuple):
    images: Tensor  # uint8 [B, 3, S, S]
    keys: list[str]
    labels: list[int]
    numbers: list[int]
    bad: list[str]


def _evaluation_parts(items: _Items, numbers: range, size: int, batch: int) -> Iterator[_EvaluationPart]:
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for start in range(worker * batch, len(numbers), workers * batch):
        images, keys, labels, good, bad = [], [], [], [], []
        for number in numbers[start : start + batch]:
            try:
                key, label, data = items.read(number)
                images.append(centre_crop(decode(data), size))
            except (BadImage, OSError) as error:
                bad.append(f"{items.name(number)}: {_reason(error)}")
            else:
                keys.append(key)
                labels.append(label)
                good.append(number)
        pixels = np.stack(images) if images else np.empty((0, 3, size, size), np.uint8)
        yield _EvaluationPart(torch.from_numpy(pixels), keys, labels, good, bad)


def _evaluation_joined(loader: Iterable[Any], source: str, total: int) -> Iterator[EvaluationBatch]:
    bad: list[str] = []
    for part in _parts(loader):
        bad.extend(part.bad)
        if part.keys:
            images = photometric.normalize_(part.images.to(torch.float32).mul_(1 / 255))
            yield EvaluationBatch(images, part.keys, torch.tensor(part.labels), torch.tensor(part.numbers))
    if bad:
        log.warning("%s: left out %d bad images of %d (first: %s)", source, len(bad), total, bad[0])


def evaluation_side(size: int) -> int:
    """Pixels that evaluation resizes the short side to before it crops the centre: images of this size stay as they
    are."""
    return round(size * 256 / 224)


def centre_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """[3, S, S]: the short side resized to size·256/224 (bicubic), then the central square; torchvision's
    `Resize` and `CenterCrop`."""
    short = evaluation_side(size)
    width, height = image.size
    if width <= height:
        image = image.resize((short, int(short * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(short * width / height), short), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
