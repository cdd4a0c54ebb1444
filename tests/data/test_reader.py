"""Storage that fails for a while, and what a reader holds."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.data import reader as readers
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.reader import ShardReader, StorageGone
from tests.data.test_stream import damaged_copy


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "RETRY_DELAYS", (0.05, 0.1, 0.2, 0.4))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_transient_errors_are_retried(shard_set: Manifest, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    reader = ShardReader(shard_set)
    expected = reader.image(1, reader.entry(1, 2))
    failures, handles, pread = [0, 1], [], os.pread

    def flaky(handle: int, *rest: Any) -> bytes:
        handles.append(handle)
        if failures:
            failures.pop()
            raise OSError(number, os.strerror(number))
        return pread(handle, *rest)

    opened: list[str] = []
    real_open = os.open
    monkeypatch.setattr(os, "pread", flaky)
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)) or real_open(path, *rest))
    assert reader.image(1, reader.entry(1, 2)) == expected
    assert len(handles) == 3
    assert len(opened) == 2  # the file is opened anew: the descriptor of a lost mount stays bad


def test_lasting_errors_are_blamed_on_the_shard(
    shard_set: Manifest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pread, name = os.pread, shard_set.shards[0].name

    def fail(handle: int, *rest: Any) -> bytes:
        if name is None or Path(f"/proc/self/fd/{handle}").readlink().name == name:
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, *rest)

    monkeypatch.setattr(os, "pread", fail)
    reader = ShardReader(shard_set)
    for waited in (True, False):  # once for the shard, not for each of its samples
        began = time.monotonic()
        with pytest.raises(OSError, match="Input/output"):
            reader.image(0, reader.entry(0, 0))
        assert (time.monotonic() - began > 0.7) == waited
        assert reader.image(1, reader.entry(1, 0))
    name = None  # the whole disk
    with pytest.raises(StorageGone, match=r"nothing in it can be read \(.*Input/output error\), after waiting 1 s"):
        reader.image(1, reader.entry(1, 1))
    monkeypatch.setattr(os, "pread", pread)
    broken = damaged_copy(shard_set, tmp_path / "set")
    (broken.root / broken.shards[0].name).unlink()
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):  # one shard alone will not come back: its samples are replaced at once
        ShardReader(broken).image(0, reader.entry(0, 0))
    assert time.monotonic() - began < 0.05


def test_mount_that_comes_back_is_retried(shard_set: Manifest, tmp_path: Path) -> None:
    root = tmp_path / "set"
    mounted = damaged_copy(shard_set, root)
    root.rename(tmp_path / "away")
    root.mkdir()  # the empty mount point
    reader = ShardReader(mounted)

    def mount() -> None:
        root.rmdir()
        (tmp_path / "away").rename(root)

    timer = threading.Timer(0.2, mount)
    timer.start()
    try:
        assert reader.entry(0, 0).key
    finally:
        timer.join()


def test_mount_that_stays_away_raises_storage_gone(shard_set: Manifest, tmp_path: Path) -> None:
    mounted = damaged_copy(shard_set, tmp_path / "set")
    reader = ShardReader(mounted)
    reader.entry(0, 0)
    mounted.root.rename(tmp_path / "away")
    (tmp_path / "away" / mounted.shards[0].name).unlink()
    with pytest.raises(StorageGone, match="is its mount gone"):
        reader.entry(1, 0)
