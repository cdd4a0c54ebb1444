"""Image folder → WebDataset tars with a manifest; and the check that a set is what its manifest says.

A set is written aside, in `.partial` inside its folder, flushed to disk, and moved into place file by file, the
manifest last: whatever interrupts the writing, no file that looks whole is left that is not. The same source gives the
same bytes.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import webdataset as wds
from tqdm import tqdm

from esvit_scale import files
from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import EXTENSIONS, BadImage, decode
from esvit_scale.data.image_folder import ImageFolder, list_images, printable, read_file
from esvit_scale.data.manifest import MANIFEST, Manifest, Shard
from esvit_scale.data.order import permutation
from esvit_scale.errors import UserError

SAMPLES_PER_SHARD = 1000
PARTIAL = ".partial"
QUARANTINE = "quarantine.jsonl"

T = TypeVar("T")


class Sample(NamedTuple):
    key: str  # unique in the set; letters, digits, `_`, `-`, and `/` between parts
    label: int | None  # index of its class
    ext: str  # jpg, png, …
    data: bytes


def create(source: Path, destination: Path, samples_per_shard: int = SAMPLES_PER_SHARD, seed: int = 0) -> Manifest:
    """Write the images of a folder (class subfolders, or flat; nested folders are fine) as a shard set.

    Files keep their bytes; they are put into shards in an order shuffled by `seed`, so that a shard mixes the classes.
    Each file that does not decode is named in one line on stderr and a row of DST/quarantine.jsonl, and left out. A
    destination that already holds the set of the same files (by name and size) is left as it is.

    Raises:
        UserError: source missing or without usable images, destination in use or holding something else.
    """
    source, destination = Path(source), Path(destination)
    folder = list_images(source)
    if samples_per_shard < 1:
        raise UserError(f"samples per shard: {samples_per_shard} is not a count; nearest: 1")
    if folder.ignored:
        held = ", ".join(f"{n} {ext}" for ext, n in sorted(folder.ignored.items()))
        _say(f"{source}: left out {sum(folder.ignored.values())} files that do not end like images: {held}")
    quarantined: list[dict[str, str]] = []
    samples = _read_images(folder, seed, quarantined)
    try:
        return _write_set(
            samples,
            destination,
            folder.classes,
            samples_per_shard,
            _fingerprint(folder, samples_per_shard, seed),
            quarantined,
        )
    except _NoSamples:
        first = quarantined[0]
        raise UserError(
            f"{source}: none of its {len(folder.files)} image files can be used (first: {first['file']}: {first['reason']})"
        ) from None


def write_samples(
    samples: Iterable[Sample],
    destination: Path,
    classes: Sequence[str] = (),
    samples_per_shard: int = SAMPLES_PER_SHARD,
    source: str = "",
) -> Manifest:
    """Write samples that a program made, in their order, as a shard set.

    Args:
        source: says what the samples are; a destination that holds a set of the same source is left as it is.

    Raises:
        UserError: no samples, or a destination in use or holding something else.
    """
    try:
        return _write_set(samples, Path(destination), classes, samples_per_shard, source, [])
    except _NoSamples:
        raise UserError(f"{destination}: no samples to write") from None


def verify(root: Path) -> list[str]:
    """Everything wrong with a shard set, one line a problem; empty when all of it is as its manifest says: sizes,
    sha256, index against tar, counts, keys, classes, and every image decodes.

    Raises:
        UserError: there is no readable manifest.
    """
    manifest = manifests.load(root)
    problems: list[str] = []
    listed = {shard.name for shard in manifest.shards}
    for tar in sorted(manifest.root.glob("*.tar")):
        if tar.name not in listed:
            problems.append(f"{tar}: not in the manifest")
    keys: set[str] = set()
    for shard in _progress(manifest.shards, "shards"):
        problems.extend(_shard_problems(manifest, shard, keys))
    return problems


# --- writing ---------------------------------------------------------------------------------------------------------


class _NoSamples(Exception):
    pass


def _write_set(
    samples: Iterable[Sample],
    destination: Path,
    classes: Sequence[str],
    samples_per_shard: int,
    source: str,
    quarantined: list[dict[str, str]],
) -> Manifest:
    try:
        with _held(destination):
            _settle(destination)
            if manifests.is_shard_set(destination):
                return _existing(destination, source)
            with _partial(destination) as partial:
                shards = _write_shards(samples, partial, samples_per_shard)
                if quarantined:
                    rows = "".join(json.dumps(row) + "\n" for row in quarantined)
                    files.write_bytes(partial / QUARANTINE, rows.encode())
                files.write_bytes(partial / MANIFEST, manifests.dump(shards, classes, source, _tool()))
                _commit(partial)
    except OSError as error:
        raise UserError(f"{error.filename or destination}: {error.strerror or error}") from error
    return manifests.load(destination)


@contextmanager
def _held(destination: Path) -> Iterator[None]:
    """The destination folder, made if need be, locked against a second writer, and removed again if nothing came."""
    made = not destination.exists()
    destination.mkdir(parents=True, exist_ok=True)
    handle = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{destination}: another process is writing this shard set; wait for it to end") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        if made:
            with suppress(OSError):  # not empty: the set is there
                destination.rmdir()
        os.close(handle)


def _settle(destination: Path) -> None:
    """Finish or clear away what an interrupted run left, and refuse a folder that holds something else."""
    partial = destination / PARTIAL
    if (partial / MANIFEST).is_file():  # it was interrupted while moving a finished set into place
        _commit(partial)
    elif partial.exists():
        shutil.rmtree(partial)
    if not manifests.is_shard_set(destination):
        held = sorted(p.name for p in destination.iterdir() if not p.name.startswith("."))
        if held:
            raise UserError(
                f"{destination}: holds other files ({', '.join(held[:3])}, …); choose an empty or new folder"
            )


def _existing(destination: Path, source: str) -> Manifest:
    manifest = manifests.load(destination)
    if not source or manifest.source != source:
        raise UserError(
            f"{destination}: already holds another shard set ({manifest.samples} samples); "
            "choose a new folder, or delete this one first"
        )
    manifests.check_sizes(manifest)
    _say(f"{destination}: already holds this set ({manifest.samples} samples); nothing to do")
    return manifest


@contextmanager
def _partial(destination: Path) -> Iterator[Path]:
    partial = destination / PARTIAL
    partial.mkdir()
    try:
        yield partial
    except BaseException:
        if not (partial / MANIFEST).exists():  # else finished: the next run moves the rest into place
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _commit(partial: Path) -> None:
    """Move a finished set out of `.partial`, the manifest last."""
    for path in sorted(partial.iterdir(), key=lambda p: (p.name == MANIFEST, p.name)):
        if path.name == MANIFEST:
            files.sync_folder(partial.parent)
        path.rename(partial.parent / path.name)
    partial.rmdir()
    files.sync_folder(partial.parent)


def _write_shards(samples: Iterable[Sample], folder: Path, samples_per_shard: int) -> list[Shard]:
    shards: list[Shard] = []
    keys: set[str] = set()
    stream = iter(samples)
    for number in count():
        first = next(stream, None)
        if first is None:
            break
        path = folder / f"shard-{number:06d}.tar"
        shards.append(_write_shard(path, chain([first], islice(stream, samples_per_shard - 1)), keys))
    if not shards:
        raise _NoSamples
    return shards


def _write_shard(path: Path, samples: Iterable[Sample], keys: set[str]) -> Shard:
    written = 0
    with path.open("wb") as file:
        hashed = _Hashed(file)
        with wds.TarWriter(hashed, encoder=False, mtime=0, user="", group="") as tar:
            for sample in samples:
                tar.write(_members(sample, keys))
                written += 1
        file.flush()
        os.fsync(file.fileno())
    entries = manifests.scan(path)
    if len(entries) != written:
        raise RuntimeError(f"{path}: {written} samples written, {len(entries)} found")
    files.write_bytes(manifests.index_path(path), manifests.dump_index(path.name, entries))
    return Shard(path.name, written, hashed.bytes, hashed.sha256.hexdigest())


def _members(sample: Sample, keys: set[str]) -> dict[str, Any]:
    if sample.key in keys or not _SAFE_KEY.fullmatch(sample.key) or sample.ext not in EXTENSIONS:
        raise ValueError(f"sample {sample.key!r}.{sample.ext}: the key is repeated or not safe, or no image's ending")
    keys.add(sample.key)
    members: dict[str, Any] = {"__key__": sample.key, sample.ext: sample.data}
    if sample.label is not None:
        members["cls"] = b"%d" % sample.label
    return members


class _Hashed:
    """A file that knows the sha256 and length of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self._file.write(data)


def _tool() -> str:
    try:
        return f"esvit-scale {metadata.version('esvit-scale')}"
    except metadata.PackageNotFoundError:
        return "esvit-scale"


# --- reading a folder ------------------------------------------------------------------------------------------------


def _read_images(folder: ImageFolder, seed: int, quarantined: list[dict[str, str]]) -> Iterator[Sample]:
    keys = keys_of([file.path for file in folder.files])
    for i in _progress(permutation(len(keys), seed, "files").tolist(), "images"):
        file = folder.files[i]
        try:
            data = read_file(folder.root / file.path)
            decode(data)
        except (BadImage, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            _say(f"{printable(str(folder.root / file.path))}: left out: {reason}")
            quarantined.append({"file": printable(file.path), "reason": reason})
            continue
        ext = file.path.rpartition(".")[2].lower()
        yield Sample(keys[i], file.label if folder.classes else None, ext, data)


_SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_KEY_LENGTH = 90  # tar's plain header holds names of 100 bytes, with the extension


def keys_of(paths: Sequence[str]) -> list[str]:
    """A unique, safe key for every path: the path without its extension; where that needs other characters than
    `A-Za-z0-9_-/`, is too long or taken, those are replaced and a hash of the path is added."""
    keys: list[str] = []
    taken: set[str] = set()
    for path in paths:
        stem = path.rpartition(".")[0]
        key = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in stem.split("/"))
        if key != stem or not _SAFE_KEY.fullmatch(key) or len(key) > _KEY_LENGTH or key in taken:
            digest = hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()
            key = f"{key[: _KEY_LENGTH - 17].rstrip('/')}-{digest}"
        if key in taken or not _SAFE_KEY.fullmatch(key):
            raise ValueError(f"no safe key for {printable(path)}")
        taken.add(key)
        keys.append(key)
    return keys


def _fingerprint(folder: ImageFolder, samples_per_shard: int, seed: int) -> str:
    """Identifies what is to be written: names and sizes of the files, not their times, which copying changes."""
    digest = hashlib.sha256(f"{samples_per_shard}/{seed}".encode())
    for file in folder.files:
        try:
            size = (folder.root / file.path).stat().st_size
        except OSError:
            size = -1
        digest.update(b"\0%s\0%d" % (os.fsencode(file.path), size))
    return f"sha256:{digest.hexdigest()}"


# --- checking --------------------------------------------------------------------------------------------------------


def _shard_problems(manifest: Manifest, shard: Shard, keys: set[str]) -> Iterator[str]:
    path = manifest.root / shard.name
    size_problem = next(manifests.size_problems(Manifest(manifest.root, (shard,))), None)
    if size_problem:
        yield size_problem
    if not path.is_file():
        return
    try:
        if not size_problem and _sha256(path) != shard.sha256:
            yield f"{path}: its sha256 is not the manifest's"
        entries = manifests.scan(path)
    except OSError as error:
        yield f"{path}: {error.strerror}"
        return
    if len(entries) != shard.samples:
        yield f"{path}: holds {len(entries)} samples, the manifest says {shard.samples}"
    try:
        if list(manifests.read_side_car(path)) != entries:
            yield f"{manifests.index_path(path)}: does not agree with the tar"
    except FileNotFoundError:
        yield f"{manifests.index_path(path)}: missing"
    except (OSError, ValueError) as error:
        yield f"{manifests.index_path(path)}: cannot be used: {error}"
    with path.open("rb") as file:
        for entry in entries:
            yield from (f"{path}: {entry.key}: {p}" for p in _sample_problems(file, entry, len(manifest.classes)))
            if entry.key in keys:
                yield f"{path}: {entry.key}: this key is in the set twice"
            keys.add(entry.key)


def _sample_problems(file: BinaryIO, entry: manifests.Entry, classes: int) -> Iterator[str]:
    image = manifests.image_member(entry)
    if image is None:
        yield "no image"
    else:
        try:
            decode(_pread(file, *image))
        except BadImage as error:
            yield str(error)
    label = manifests.parse_label(_pread(file, *entry.members["cls"])) if "cls" in entry.members else -1
    if classes and not 0 <= label < classes:
        yield f"label {label} is not one of {classes} classes"


def _pread(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- telling the user ------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def _progress(items: Sequence[T], unit: str, every: float = 10.0) -> Iterator[T]:
    """The items, with a progress bar on a terminal and a plain line every `every` seconds elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, unit=f" {unit}", smoothing=0.05, file=sys.stderr)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= every:
            last, rate = now, done / (now - start)
            left = (len(items) - done) / rate if rate else float("inf")
            _say(f"{done}/{len(items)} {unit}, {rate:.0f}/s, {left:.0f} s left")
        yield item
