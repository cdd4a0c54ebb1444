"""Atomic writing of files and folders: write under a temporary name, sync, rename."""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NO_LINKS_ERRNOS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV})


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: at any time, also after a crash, `path` holds the whole old or the whole new content.

    When the write fails (on a full disk, say), the old file is untouched and nothing else is left.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with tmp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    except OSError:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Sync a folder (fsync), so that renames inside it survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file to write to; rename it to `path` when the block succeeds, and remove it otherwise.

    The file gets the permissions of any new file (0666 less the umask), even when a library replaces it by a temporary
    file of its own that only its owner may read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        tmp.unlink(missing_ok=True)
        tmp.touch()
        usual = stat.S_IMODE(tmp.stat().st_mode)
        yield tmp
        tmp.chmod(usual)
        with tmp.open("rb") as file:
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


def commit_folder(tmp: Path, path: Path, replace: bool = False) -> None:
    """Rename the finished folder `tmp` to `path`, so that a crash leaves the old or the new folder, never a part.

    Args:
        replace: a folder that is at `path` is replaced as a whole; otherwise it is an error.

    Raises:
        OSError: the rename failed, or `path` exists, is not empty and is not to be replaced.
    """
    sync_folder(tmp)
    replaced = path.with_name(f".{path.name}.replaced.partial")
    if replace and path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    tmp.rename(path)
    sync_folder(path.parent)
    if replace:
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; rename it to `path`, which must not exist, when the block succeeds, and remove
    it otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
        commit_folder(tmp, path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
