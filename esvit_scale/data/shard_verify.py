"""The check that the files of a shard set agree with its manifest."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data import checksums, pool
from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import BadImage
from esvit_scale.data.hashing import hash_all, repeated_indices
from esvit_scale.data.image_folder import printable
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.member_check import problems
from esvit_scale.data.picture import check_decodes
from esvit_scale.data.pixel_format import PixelFormat
from esvit_scale.data.remote.shard_cache import ShardFiles
from esvit_scale.data.shard_table import ShardTable
from esvit_scale.data.signal_members import TEXT, is_member
from esvit_scale.data.tar_names import parse_label
from esvit_scale.errors import UserError
from esvit_scale.files import sha256


class Checked(NamedTuple):
    """The result of checking one shard: its problems, and the hashes of its keys."""

    tar: list[str]  # problems of the tar, which has to be written again
    side_car: list[str]  # problems of the index, which can be made again from an undamaged tar
    keys: NDArray[np.uint64]  # hashes of the keys of its samples


def verify(root: Path, workers: int = 1) -> list[str]:
    """Return everything wrong with a shard set, one line per problem; empty when it agrees with its manifest.

    Sizes, sha256, indexes, counts, keys and classes are compared, and every image is decoded.

    Raises:
        UserError: there is no readable manifest.
    """
    manifest = manifests.load(root)
    checked = check_shards(manifest, workers)
    return [
        *_strangers(manifest),
        *(p for c in checked for p in c.tar + c.side_car),
        *_repeated_keys(manifest, checked),
    ]


def check_shards(manifest: Manifest, workers: int) -> list[Checked]:
    """Check every shard of a set and return the results in the manifest's order."""
    found: dict[int, Checked] = {}
    jobs = range(len(manifest.shards))
    for number, checked in pool.each(partial(_check, manifest), jobs, workers, manifest.samples, "images"):
        found[number] = checked
    return [found[number] for number in jobs]


def _strangers(manifest: Manifest) -> Iterator[str]:
    listed = {shard.name for shard in manifest.shards}
    for tar in sorted(manifest.root.glob("*.tar")):
        if tar.name not in listed:
            yield f"{tar}: not in the manifest"


def _repeated_keys(manifest: Manifest, checked: list[Checked]) -> Iterator[str]:
    starts = np.cumsum([0, *(len(c.keys) for c in checked)])
    for at in repeated_indices(np.concatenate([c.keys for c in checked])).tolist() if checked else []:
        number = int(np.searchsorted(starts, at, side="right")) - 1
        path, _ = ShardFiles(manifest).path(number)
        entry = manifests.scan(path)[at - int(starts[number])]
        yield f"{path}: {printable(entry.key)}: this key is in the set twice"


def _check(manifest: Manifest, number: int, tick: Callable[[], None]) -> Checked:
    shard = manifest.shards[number]
    none = np.empty(0, np.uint64)
    try:
        path, _ = ShardFiles(manifest).path(number)  # a remote shard is kept while it is checked
    except UserError as error:  # its object is not what the manifest says
        return Checked([str(error)], [], none)
    problems = list(manifests.size_problems(Manifest(manifest.root, ShardTable([shard]))))
    if not path.is_file():
        return Checked(problems, [], none)
    try:
        if not problems and sha256(path) != shard.sha256:
            problems.append(f"{path}: its sha256 differs from the manifest's")
        entries = (checksums.scan if shard.index_sha256 else manifests.scan)(path)
        if len(entries) != shard.samples:
            problems.append(f"{path}: holds {len(entries)} samples; the manifest says {shard.samples}")
        with path.open("rb") as file:
            for entry in entries:
                tick()
                found = _sample_problems(file, entry, manifest)
                problems += [f"{path}: {printable(entry.key)}: {problem}" for problem in found]
    except OSError as error:
        return Checked([*problems, f"{path}: {error.strerror or error}"], [], none)
    # The index of a remote shard was made here, from the tar, where the cache had room for it.
    indexes = [] if manifest.remote else list(_index_problems(path, entries, shard.index_sha256))
    return Checked(problems, indexes, hash_all((e.key for e in entries), len(entries)))


def _index_problems(path: Path, entries: list[manifests.Entry], recorded: str) -> Iterator[str]:
    """Yield the problems of a tar's index; `recorded` is its sha256 in the manifest, "" where that has none."""
    index = manifests.index_path(path)
    try:
        found = [entry if recorded else entry._replace(checksums={}) for entry in manifests.read_side_car(path)]
        if found != entries or (recorded and sha256(index) != recorded):
            yield f"{index}: does not agree with the tar"
    except FileNotFoundError:
        yield f"{index}: missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        yield f"{index}: cannot be used: {error}"


def _sample_problems(file: BinaryIO, entry: manifests.Entry, manifest: Manifest) -> Iterator[str]:
    classes = len(manifest.classes)
    image = manifests.image_member(entry)
    beside = [
        extension for extension in entry.members if is_member(extension) or (manifest.modalities and extension in TEXT)
    ]
    yield from problems({extension: _pread(file, *entry.members[extension]) for extension in beside})
    if image is None:
        if not beside:
            yield "no image"
    else:
        try:
            check_decodes(_pread(file, *image), PixelFormat(manifest.channels, manifest.bits))
        except BadImage as error:
            yield str(error)
    label = parse_label(_pread(file, *entry.members["cls"])) if "cls" in entry.members else -1
    if classes and not 0 <= label < classes:
        yield f"label {label} is not one of {classes} classes"


def _pread(file: BinaryIO, offset: int, size: int) -> bytes:
    return os.pread(file.fileno(), size, offset)
