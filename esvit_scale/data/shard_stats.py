"""Statistics of a shard set: samples per shard, bytes, image sizes, formats, classes, and mean and std of the pixels."""

import io
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esvit_scale.data import manifest as manifests
from esvit_scale.data import pool
from esvit_scale.data.decode import BadImage
from esvit_scale.data.manifest import Manifest, image_member
from esvit_scale.data.picture import open_picture
from esvit_scale.data.pixel_format import PixelFormat
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.set_folder import QUARANTINE
from esvit_scale.data.signal_members import FRAME, IMAGE, MODALITIES, member_of

MEASURED = 20_000  # images whose headers are read, evenly over the set
DECODED = 256  # images whose pixels are read, evenly over the set


@dataclass
class Stats:
    """The statistics of one shard set."""

    root: Path
    classes: tuple[str, ...]
    shard_samples: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    image_bytes: NDArray[np.int64]  # size of every image file
    sides: NDArray[np.int64]  # [M, 2]: width and height of the images whose headers were read
    class_counts: NDArray[np.int64]  # per class; empty without classes
    members: dict[str, int] = field(default_factory=dict)  # extension → number of members
    modalities: dict[str, int] = field(default_factory=dict)  # samples that have sound, video, text, an image
    quarantined: int = 0  # files named in the quarantine
    channels: tuple[int, int] = (3, 8)  # of every image: number of channels, bits of each
    moments: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 3)))  # [3, C]: pixels, Σx, Σx²; x in 0..1

    @property
    def mean(self) -> list[float]:
        """Return the mean of every channel over the decoded images, with pixel values scaled to 0..1."""
        return [round(float(v), 6) for v in self.moments[1] / np.maximum(self.moments[0], 1)]

    @property
    def std(self) -> list[float]:
        """Return the standard deviation of every channel, measured like `mean`."""
        n, total, squares = self.moments
        variance = squares / np.maximum(n, 1) - (total / np.maximum(n, 1)) ** 2
        return [round(float(v), 6) for v in np.sqrt(np.maximum(variance, 0))]

    def summary(self) -> dict[str, Any]:
        """Return the statistics as JSON values; a list of three numbers is [smallest, median, largest]."""
        short = self.sides.min(1) if len(self.sides) else self.sides.reshape(-1)
        return {
            "samples": int(self.shard_samples.sum()),
            "shards": len(self.shard_samples),
            "bytes": int(self.shard_bytes.sum()),
            "samples_per_shard": _range(self.shard_samples),
            "bytes_per_shard": _range(self.shard_bytes),
            "bytes_per_image": _range(self.image_bytes),
            "short_side": _range(short),
            "images_measured": len(self.sides),
            "members": dict(sorted(self.members.items(), key=lambda item: -item[1])),
            **({"modalities": self.modalities} if self.modalities else {}),
            "classes": len(self.classes),
            "samples_per_class": _range(self.class_counts),
            "empty_classes": int((self.class_counts == 0).sum()),
            "quarantined": self.quarantined,
            "channels": self.channels[0],
            "bits": self.channels[1],
            "mean": self.mean,
            "std": self.std,
        }


def gather(root: Path, workers: int = 1) -> Stats:
    """Return the statistics of a set from all indexes and labels, about MEASURED headers and DECODED decoded images.

    Raises:
        UserError: the manifest cannot be read, or a shard is missing or truncated.
    """
    manifest = manifests.load(root)
    manifests.check_sizes(manifest)
    every = max(-(-manifest.samples // MEASURED), 1)
    numbers = range(len(manifest.shards))
    work = partial(_read, manifest, every, max(manifest.samples // DECODED, 1))
    parts = dict(pool.each(work, numbers, workers, manifest.samples, "images"))
    members, modalities = Counter[str](), Counter[str]()
    for part in parts.values():
        members.update(part[3])
        modalities.update(part[5])
    labels = _joined(parts[number][2] for number in numbers)
    rows = 0
    with suppress(OSError):
        rows = len((root / QUARANTINE).read_bytes().splitlines())
    return Stats(
        root,
        manifest.classes,
        manifest.shards.samples,
        manifest.shards.bytes,
        _joined(parts[number][0] for number in numbers),
        _joined(parts[number][1] for number in numbers).reshape(-1, 2),
        np.bincount(labels[labels >= 0], minlength=len(manifest.classes))[: len(manifest.classes)],
        dict(members),
        dict(modalities) if manifest.modalities else {},
        rows,
        (manifest.channels, manifest.bits),
        sum((part[4] for part in parts.values()), np.zeros((3, manifest.channels))),
    )


def table(stats: Stats) -> str:
    """Return the statistics as a table to print; three numbers with slashes are smallest / median / largest."""
    s = stats.summary()
    rows = [
        ("samples", f"{s['samples']:,} in {s['shards']:,} shards, {_bytes(s['bytes'])}"),
        ("per shard", f"{_three(s['samples_per_shard'])} samples, {_three(s['bytes_per_shard'], _bytes)}"),
        ("per image", _three(s["bytes_per_image"], _bytes)),
        ("short side", f"{_three(s['short_side'])} pixels (of {s['images_measured']:,} images)"),
        ("members", ", ".join(f"{n:,} .{ext}" for ext, n in s["members"].items())),
    ]
    if stats.modalities:
        rows.append(("have", ", ".join(f"{name} {n:,}" for name, n in sorted(stats.modalities.items()))))
    if stats.classes:
        empty = f"; {s['empty_classes']} have none" if s["empty_classes"] else ""
        rows.append(("classes", f"{s['classes']:,}, {_three(s['samples_per_class'])} samples each{empty}"))
    rows += [
        (
            "pixels",
            f"{PixelFormat(*stats.channels)}; mean and std over a sample of the images, 1 being the largest value:",
        ),
        ("", "data.mean=" + json.dumps(stats.mean)),
        ("", "data.std=" + json.dumps(stats.std)),
    ]
    if stats.quarantined:
        rows.append(("left out", f"{stats.quarantined:,} files; {QUARANTINE} names them"))
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


_Part = tuple[list[int], list[int], list[int], Counter[str], NDArray[np.float64], Counter[str]]


def _read(manifest: Manifest, every: int, decode_every: int, number: int, tick: Callable[[], None]) -> _Part:
    """Return the image bytes, sides, labels, members (by extension), pixel moments and modalities of a shard.

    The sides (width, height, width, …) are those of every `every`-th image, and the moments are summed over every
    `decode_every`-th image.
    """
    pixels, moments = PixelFormat(manifest.channels, manifest.bits), np.zeros((3, manifest.channels))
    reader = ShardReader(manifest)
    sizes: list[int] = []
    sides: list[int] = []
    labels: list[int] = []
    members, modalities = Counter[str](), Counter[str]()
    try:
        for i in range(manifest.shards[number].samples):
            tick()
            with suppress(BadImage):
                entry = reader.entry(number, i)
                place = image_member(entry)
                members.update("frame-*." + e.rpartition(".")[2] if FRAME.fullmatch(e) else e for e in entry.members)
                modalities[IMAGE] += place is not None
                modalities.update(m for m in MODALITIES if member_of(entry.members, m))
                if place is not None or not manifest.modalities:
                    sizes.append(place[1] if place else 0)
                if manifest.classes:
                    labels.append(reader.label(number, entry))
                if i % every == 0:
                    sides += _sides(reader.image(number, entry), pixels)
                if i % decode_every == 0:
                    moments += _moments(reader.image(number, entry), pixels)
    finally:
        reader.close()
    return sizes, sides, labels, members, moments, modalities


def _moments(data: bytes, pixels: PixelFormat) -> NDArray[np.float64]:
    """Return [3, C] for an image: per channel the number of pixels, their sum and sum of squares. Raises BadImage."""
    decoded, _ = open_picture(data, pixels).pixels()
    x = decoded.reshape(-1, decoded.shape[2]).astype(np.float64) / pixels.largest
    return np.stack([np.full(x.shape[1], float(len(x))), x.sum(0), (x * x).sum(0)])


def _sides(data: bytes, pixels: PixelFormat) -> list[int]:
    if not pixels.is_rgb8:
        with suppress(BadImage):
            picture = open_picture(data, pixels)
            return [picture.width, picture.height]
        return []
    try:
        return list(Image.open(io.BytesIO(data)).size)
    except Exception:  # a header that Pillow cannot read: `verify` says so
        return []


def _joined(parts: Any) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(part, np.int64) for part in parts)])


def _range(values: NDArray[np.int64]) -> list[int]:
    return [int(values.min()), int(np.median(values)), int(values.max())] if len(values) else []


def _three(values: list[int], show: Callable[[int], str] = "{:,}".format) -> str:
    return " / ".join(dict.fromkeys(map(show, values))) or "unknown"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:,.4g} TB"


def as_json(stats: Stats) -> str:
    """Return the statistics as JSON, with the number of samples of every class."""
    counts = dict(zip(stats.classes, stats.class_counts.tolist(), strict=True))
    return json.dumps({**stats.summary(), "class_counts": counts}, indent=2)
