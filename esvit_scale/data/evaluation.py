"""Batches for frozen-feature evaluation: every image of a source once, resized, centre-cropped and normalised."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.data import manifest as manifests
from esvit_scale.data import photometric
from esvit_scale.data.decode import BadImage
from esvit_scale.data.evaluation_crop import decode_centre_crop, decode_whole
from esvit_scale.data.image_folder import ImageFolder, list_images, printable, read_file
from esvit_scale.data.loader import pixel_dtype, pixel_memory, reason, run_stages
from esvit_scale.data.manifest import Entry, Manifest, image_member
from esvit_scale.data.pixel_format import RGB8, PixelFormat
from esvit_scale.data.reader import ShardReader
from esvit_scale.division import share

log = logging.getLogger(__name__)


class EvaluationBatch(NamedTuple):
    """A batch of images for evaluation, with their keys, labels and numbers."""

    images: Tensor  # float32 [B, C, S, S], normalised
    keys: list[str]
    labels: Tensor  # int64 [B], -1 without classes
    numbers: Tensor  # int64 [B]: place in the source, counting the images that are left out


def evaluation_batches(
    source: Path,
    size: int,
    batch: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    most: int | None = None,
    pixels: PixelFormat = RGB8,
    whole: bool = False,
) -> Iterator[EvaluationBatch]:
    """Yield this rank's share of the images of a shard set (manifest order) or image folder (path order), each once.

    The crops are those of evaluation_crop.py, normalised. Rank r takes the r-th of `world_size` contiguous parts, so the
    ranks' outputs in rank order are in the source's order. Labels are class numbers (subfolders by name), -1 without
    classes. Bad images are left out and counted in a warning.

    Args:
        size: pixels on a side of the crop.
        batch: images per batch.
        most: read at most this many images, spread evenly over the source; None: all.
        whole: resize the whole image to the crop's square, instead of its short side, and crop nothing.

    Raises:
        UserError: the source is neither a shard set nor a folder with images, or a shard is missing or truncated.
    """
    items = items_of(Path(source), pixels=pixels)
    everything: Sequence[int] = range(len(items))
    if most is not None and most < len(items):
        everything = np.linspace(0, len(items) - 1, most).round().astype(int).tolist()
    numbers = everything[share(len(everything), rank, world_size)]
    parts = run_stages(
        [partial(_evaluation_parts, items, numbers, size, batch, pixels, whole)],
        min(workers, -(-len(numbers) // batch)),
    )
    return _evaluation_joined(parts, str(source), len(numbers), pixels)


class Items:
    """Access to the images of a shard set or folder by number: 0 to len-1, in the order of the source."""

    def __init__(self, source: Manifest | ImageFolder) -> None:
        self._source = source
        self._reader = ShardReader(source) if isinstance(source, Manifest) else None
        counts = [s.samples for s in source.shards] if isinstance(source, Manifest) else [len(source.files)]
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, number: int) -> tuple[str, int, bytes]:
        """Return an image's key, label (-1 without one) and bytes. Raises BadImage or OSError."""
        if isinstance(self._source, ImageFolder):
            file = self._source.files[number]
            return printable(file.path), file.label, read_file(self._source.root / file.path)
        assert self._reader is not None
        shard, entry = self._entry(number)
        return entry.key, self._reader.label(shard, entry), self._reader.image(shard, entry)

    def close(self) -> None:
        """Close all open files, and let go of remote shards; a later read opens them again."""
        if self._reader is not None:
            self._reader.close()

    def key(self, number: int) -> str:
        """Return an image's key without reading it. Raises BadImage or OSError."""
        if isinstance(self._source, ImageFolder):
            return printable(self._source.files[number].path)
        return self._entry(number)[1].key

    def labels(self) -> dict[int, int]:
        """Return the labels that occur (-1: no class), each with the number of its first sample; no image is read.

        Damaged samples are skipped.
        """
        found: dict[int, int] = {}
        if isinstance(self._source, ImageFolder):
            for number, file in enumerate(self._source.files):
                found.setdefault(file.label, number)
            return found
        assert self._reader is not None
        for number in range(len(self)):
            try:
                found.setdefault(self._reader.label(*self._entry(number)), number)
            except (BadImage, OSError):
                continue
        return found

    def size(self, number: int) -> int | None:
        """Return the size in bytes of an image file without reading it; None when it is missing."""
        try:
            if isinstance(self._source, ImageFolder):
                return (self._source.root / self._source.files[number].path).stat().st_size
            place = image_member(self._entry(number)[1])
        except (BadImage, OSError):
            return None
        return place[1] if place else None

    def name(self, number: int) -> str:
        """Return where an image lies, for messages: its path in the folder, or its shard and number in the shard."""
        if isinstance(self._source, ImageFolder):
            return printable(self._source.files[number].path)
        shard = self._shard(number)
        return f"{self._source.shards[shard].name}: sample {number - int(self._starts[shard])}"

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _entry(self, number: int) -> tuple[int, Entry]:
        assert self._reader is not None
        shard = self._shard(number)
        return shard, self._reader.entry(shard, number - int(self._starts[shard]))


def items_of(source: Path, notes: bool = True, pixels: PixelFormat | None = None) -> Items:
    """Open a shard set or an image folder and return its images.

    Args:
        notes: log the notes of a folder's listing (`ImageFolder.notes`) as warnings.
        pixels: the pixel format that a shard set must have; None: any.

    Raises:
        UserError: the source is neither, a shard is missing or truncated, or a set has another pixel format.
    """
    if not manifests.is_shard_set(source):
        if any(source.glob("*.tar")):
            manifests.load(source)  # raises UserError about tars without a manifest
        folder = list_images(source, keep_loose=True)
        for note in folder.notes if notes else ():
            log.warning(note)
        return Items(folder)
    manifest = manifests.load(source)
    manifests.check_sizes(manifest)
    if pixels is not None:
        manifests.check_pixels(manifest, pixels)
    return Items(manifest)


class _EvaluationPart(NamedTuple):
    images: Tensor  # uint8 or uint16 [B, C, S, S], channels last
    keys: list[str]
    labels: list[int]
    numbers: list[int]
    bad: list[str]


def _evaluation_parts(
    items: Items, numbers: Sequence[int], size: int, batch: int, pixels: PixelFormat, whole: bool
) -> Iterator[_EvaluationPart]:
    decode_crop = decode_whole if whole else decode_centre_crop
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    with closing(items):
        for start in range(worker * batch, len(numbers), workers * batch):
            shape = (min(batch, len(numbers) - start), size, size, pixels.channels)
            crops = pixel_memory(pixel_dtype(pixels.bits), *shape, shared=info is not None)
            keys: list[str] = []
            labels: list[int] = []
            good: list[int] = []
            bad: list[str] = []
            rows = crops.numpy()
            for number in numbers[start : start + batch]:
                try:
                    key, label, data = items.read(number)
                    rows[len(good)] = decode_crop(data, size, pixels)
                except (BadImage, OSError) as error:
                    bad.append(f"{items.name(number)}: {reason(error)}")
                else:
                    keys.append(key)
                    labels.append(label)
                    good.append(number)
            yield _EvaluationPart(crops[: len(good)].permute(0, 3, 1, 2), keys, labels, good, bad)


def _evaluation_joined(parts: Iterator[Any], source: str, total: int, pixels: PixelFormat) -> Iterator[EvaluationBatch]:
    bad: list[str] = []
    for part in parts:
        bad.extend(part.bad)
        if part.keys:
            images = photometric.normalize_(photometric.unit(part.images, pixels), pixels)
            yield EvaluationBatch(images, part.keys, torch.tensor(part.labels), torch.tensor(part.numbers))
    if bad:
        log.warning("%s: left out %d bad images of %d (first: %s)", source, len(bad), total, bad[0])
