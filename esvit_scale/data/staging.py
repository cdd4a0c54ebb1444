"""Staging of shards: copies on a node's own disk, for training where the shared file system is slow.

One process of a node copies while the others wait. A copy is used only when it is complete, and stays for the next start
on the node.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from esvit_scale.data.manifest import MANIFEST, Manifest, index_path
from esvit_scale.data.shard_table import Shard
from esvit_scale.errors import UserError
from esvit_scale.progress import Progress

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
THREADS = 8
PIECE = 16 << 20  # bytes copied at a time
SPARE = 1 << 30  # bytes that must stay free on the node's disk


def staged(manifest: Manifest, folder: str, progress: Callable[[], None] = lambda: None) -> Manifest:
    """Copy a set under `folder` on this node and return the copy's manifest; every process of the node calls this.

    Args:
        folder: may hold $VARIABLES of the node's environment, such as $SLURM_TMPDIR.
        progress: called, on several threads, for every piece that this process has copied.

    Raises:
        UserError: a variable is not set on this node, the folder cannot be written, or the disk has too little room.
    """
    root = _expanded(folder) / f"{manifest.root.resolve().name}-{_fingerprint(manifest)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".lock").open("w") as lock:
            if _locked(lock, root):
                for leftover in root.glob(".*.partial"):  # left by processes that were killed
                    leftover.unlink()
            _copy_missing(manifest, root, progress)
    except OSError as error:
        raise UserError(f"data.stage: {root}: {error.strerror or error}") from None
    return replace(manifest, root=root)


def _locked(lock: TextIO, root: Path) -> bool:
    """Wait for the lock and return True, or False on a file system without locks (Lustre without -o flock, NFS, …).

    Without a lock the processes of a node copy at the same time, each into files of its own, which are then renamed.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("data.stage: %s: this file system has no locks; every process of the node copies the set", root)
        return False


def _expanded(folder: str) -> Path:
    path = os.path.expandvars(folder)
    if unset := re.search(r"\$\w+|\$\{\w+\}", path):
        raise UserError(f"data.stage: {folder}: {unset[0]} is not set on this node")
    return Path(path)


def _fingerprint(manifest: Manifest) -> str:
    """Return a hash of the set's contents, so that another set of the same name is not mistaken for this one."""
    names = "".join(f"{shard.name} {shard.sha256}\n" for shard in manifest.shards)
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _copy_missing(manifest: Manifest, root: Path, progress: Callable[[], None]) -> None:
    missing = [shard for shard in manifest.shards if not _is_there(shard, root)]
    need, free = sum(shard.bytes for shard in missing), shutil.disk_usage(root).free
    if missing and need > free - SPARE:
        raise UserError(
            f"data.stage: {root}: the set needs {need / 2**30:.1f} GiB more, but {free / 2**30:.1f} GiB are free; "
            "name a folder on a larger disk, or leave data.stage out"
        )
    with ThreadPoolExecutor(THREADS) as pool, Progress(len(missing), "shards staged") as shown:
        copies = [pool.submit(_copy, shard, manifest.root, root, progress) for shard in missing]
        for number, copy in enumerate(as_completed(copies), 1):
            copy.result()
            shown.to(number)
    _copy_file(manifest.root / MANIFEST, root, progress)


def _is_there(shard: Shard, root: Path) -> bool:
    tar = root / shard.name
    return tar.is_file() and tar.stat().st_size == shard.bytes and index_path(tar).is_file()


def _copy(shard: Shard, source: Path, root: Path, progress: Callable[[], None]) -> None:
    _copy_file(index_path(source / shard.name), root, progress)
    _copy_file(source / shard.name, root, progress)  # last: where the tar is, its index is too


def _copy_file(path: Path, root: Path, progress: Callable[[], None]) -> None:
    tmp = root / f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial"  # a whole file or none
    try:
        with path.open("rb") as source, tmp.open("wb") as target:
            while piece := source.read(PIECE):
                target.write(piece)
                progress()
        tmp.replace(root / path.name)
    finally:
        tmp.unlink(missing_ok=True)
