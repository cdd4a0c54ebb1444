"""An on-disk cache of features: computed once for a trunk, a data set and a transform, then memory-mapped.

The folder DIR/<key>/ holds features.npy [N, …], labels.npy (int64 [N], or [N, P] for pixels), numbers.npy (int64 [N]), keys.jsonl (one JSON string per
line) and about.json with the values that were hashed to <key>. Every rank writes its part sequentially; rank 0 joins
the parts and renames the folder into place. Therefore a folder that exists is complete. If two processes compute the
same features, those of the first are kept. Ranks on several nodes need DIR on a shared file system.
"""

import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esvit_scale import files
from esvit_scale.data import image_folder
from esvit_scale.data import manifest as manifests
from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
COPIED_AT_ONCE = 64 << 20  # bytes


class FeatureSet(NamedTuple):
    """The features of a whole data set (N images), in the order of the data set."""

    features: Tensor  # float32 or float16 [N, …] on the CPU; mapped copy-on-write when it comes from a cache
    keys: list[str]  # N keys of the samples
    labels: Tensor  # int64 [N], or [N, P] for P pixels of every image; −1 without a label
    numbers: Tensor | None = None  # int64 [N], each image's index in the source
    left_out: int = 0  # number of images of the source that could not be read


class FeatureBatch(NamedTuple):
    """A batch of rows of a FeatureSet: the same fields for a few images."""

    features: Tensor
    keys: list[str]
    labels: Tensor
    numbers: Tensor


def load_or_compute(
    cache: Path, key: dict[str, Any], source: Path, images: int, compute: Callable[[], Iterable[FeatureBatch]]
) -> FeatureSet:
    """Return the features that `key` describes from the folder `cache`; compute and store them if they are missing.

    All ranks call it, and all get the whole set.

    Args:
        key: all values that the features depend on, by name; it is hashed.
        source: the data set, for messages and about.json.
        images: number of images in the source, readable or not.
        compute: function that yields this rank's part of the features.

    Raises:
        UserError: no image could be read, or the cache's folder is not shared by the ranks.
    """
    key = {"format_version": FORMAT_VERSION, **key}
    folder = cache / _digest(json.dumps(key, sort_keys=True).encode())[:20]
    cached = collectives.run_on_rank0_and_broadcast(lambda: (folder / "about.json").is_file())
    if not cached:
        _fill(folder, {**key, "source": str(source)}, images, compute())
    found = load(folder)
    if cached and found.left_out and collectives.rank() == 0:  # while features are computed, the reader logs it itself
        log.warning(
            "%s: %d of %d images could not be read when its features were computed", source, found.left_out, images
        )
    return found


def load(folder: Path) -> FeatureSet:
    """Return the features in a complete folder of the cache, memory-mapped (copy-on-write), so read only when used."""
    arrays = [torch.from_numpy(np.load(folder / f"{n}.npy", mmap_mode="c")) for n in ("features", "labels", "numbers")]
    keys = [json.loads(line) for line in (folder / "keys.jsonl").read_bytes().splitlines()]
    about = json.loads((folder / "about.json").read_text())
    return FeatureSet(arrays[0], keys, arrays[1], arrays[2], about["left_out"])


def trunk_digest(trunk: nn.Module) -> str:
    """Return a hash of a trunk's weights and of the plain attributes of all its modules (window, heads, …).

    The digest does not depend on the file that the trunk was loaded from.
    """
    found = hashlib.sha256()
    for name, module in trunk.named_modules():
        numbers = {k: v for k, v in vars(module).items() if k != "training" and _is_plain(v)}
        found.update(f"{name} {type(module).__qualname__} {sorted(numbers.items())}\n".encode())
    for name, tensor in trunk.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def source_digest(source: Path) -> str:
    """Return a hash that changes when the images of a data set change.

    For a shard set it is the hash of the manifest, which holds every shard's checksum. For an image folder it is the
    hash of the names, sizes and modification times of all images.
    """
    if manifests.is_shard_set(source):
        return _digest((source / manifests.MANIFEST).read_bytes())
    found = hashlib.sha256()
    for file in image_folder.list_images(source, keep_loose=True).files:
        path = os.fsencode(file.path)
        try:
            status = os.stat(os.path.join(os.fsencode(source), path))  # noqa: PTH116, PTH118 (paths may be undecodable)
            found.update(path + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:  # a dangling link, which the reader reports
            found.update(path + b"\0missing\n")
    return found.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """Return a hash of the paths, sizes and modification times of files."""
    found = hashlib.sha256()
    for path in paths:
        status = path.stat()
        found.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return found.hexdigest()


# --- writing ---------------------------------------------------------------------------------------------------------


def _fill(folder: Path, about: dict[str, Any], images: int, rows: Iterable[FeatureBatch]) -> None:
    tmp = collectives.run_on_rank0_and_broadcast(lambda: _make_tmp_folder(folder))
    try:
        if collectives.all_reduce_flags(int(not tmp.is_dir())):
            raise UserError(
                f"{folder.parent}: not visible to every rank; --cache must name a folder on a shared file system"
            )
        run_on_all_ranks(lambda: _write_part(tmp / f"part-{collectives.rank():05d}", rows), about["source"])
        collectives.run_on_rank0_and_broadcast(lambda: _commit(tmp, folder, about, images))
    finally:
        if collectives.rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)


def run_on_all_ranks(work: Callable[[], None], source: str) -> None:
    """Call `work` on every rank; if it fails on any rank, raise an error on all, so that no rank waits for another."""
    problem: Exception | None = None
    try:
        work()
    except Exception as error:
        problem = error
    if collectives.all_reduce_flags(int(problem is not None)):
        raise problem or UserError(f"{source}: could not be read on another rank, whose log says why")


def _make_tmp_folder(folder: Path) -> Path:
    """Create and return a temporary folder next to `folder`; remove those that dead processes of this machine left."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    for old in folder.parent.glob(f".{folder.name}.{host}.*.partial"):
        pid = int(old.name.split(".")[-2])
        if pid == os.getpid() or not _is_alive(pid):
            shutil.rmtree(old, ignore_errors=True)
    tmp = folder.with_name(f".{folder.name}.{host}.{os.getpid()}.partial")
    tmp.mkdir()
    return tmp


def _write_part(part: Path, rows: Iterable[FeatureBatch]) -> None:
    """Write this rank's features, labels, numbers and keys as raw files, and their row count, shape and type as JSON.

    Args:
        part: path of the files without suffix.
    """
    count, shape, dtype, of_labels = 0, [0], "float32", [0]
    names = ("features", "labels", "numbers", "keys")
    features, labels, numbers, keys = (part.with_suffix(f".{name}").open("wb") for name in names)
    with features, labels, numbers, keys:
        for some in rows:
            array = some.features.numpy()
            count, shape, dtype = count + len(array), list(array.shape[1:]), array.dtype.name
            of_labels = list(some.labels.shape[1:])
            features.write(np.ascontiguousarray(array).data)
            labels.write(some.labels.numpy().astype(np.int64).data)
            numbers.write(some.numbers.numpy().astype(np.int64).data)
            keys.write("".join(json.dumps(key) + "\n" for key in some.keys).encode("ascii"))
    files.write_json(part.with_suffix(".json"), {"rows": count, "shape": shape, "dtype": dtype, "labels": of_labels})


def _commit(tmp: Path, folder: Path, about: dict[str, Any], images: int) -> None:
    """Join the parts of all ranks into .npy files, write about.json, and rename the temporary folder to `folder`."""
    parts = [(path.with_suffix(""), json.loads(path.read_text())) for path in sorted(tmp.glob("part-*.json"))]
    parts = [(path, held) for path, held in parts if held["rows"]]
    n = sum(held["rows"] for _, held in parts)
    if not n:
        raise UserError(f"{about['source']}: holds no readable image (see the warnings above)")
    shape, dtype = tuple(parts[0][1]["shape"]), np.dtype(parts[0][1]["dtype"])
    for name, row, kind in (
        ("features", shape, dtype),
        ("labels", tuple(parts[0][1]["labels"]), np.dtype("int64")),
        ("numbers", (), np.dtype("int64")),
    ):
        _join(tmp / f"{name}.npy", [path.with_suffix(f".{name}") for path, _ in parts], (n, *row), kind)
    with (tmp / "keys.jsonl").open("wb") as out:
        for path, _ in parts:
            out.write(path.with_suffix(".keys").read_bytes())
        out.flush()
        os.fsync(out.fileno())
    for path in tmp.glob("part-*"):
        path.unlink()
    files.write_json(tmp / "about.json", about | {"images": n, "left_out": images - n})
    try:
        files.commit_folder(tmp, folder)
    except OSError:
        if not (folder / "about.json").is_file():
            raise  # otherwise another process has computed the same folder first, which is no error


def _join(path: Path, parts: list[Path], shape: tuple[int, ...], dtype: "np.dtype[Any]") -> None:
    """Concatenate raw files into one .npy file of the given shape and type; remove each raw file once it is copied."""
    with path.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, out, COPIED_AT_ONCE)
            part.unlink()
        out.flush()
        os.fsync(out.fileno())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def chunks(array: Tensor, bytes_at_once: int = COPIED_AT_ONCE) -> Iterator[Tensor]:
    """Split a memory-mapped tensor into chunks of consecutive rows, so that it is never in memory as a whole."""
    rows = max(1, bytes_at_once // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        yield array[start : start + rows]
