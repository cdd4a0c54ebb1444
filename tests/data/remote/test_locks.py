"""Locks between the processes of a node, which end with their process."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from esvit_scale.data.remote import room
from esvit_scale.data.remote.locks import ByteLocks
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.data.remote.store import StoreUnreachable
from tests.data.remote.conftest import small

HOLD = """
import sys, time
from pathlib import Path
from esvit_scale.data.manifest import load
from esvit_scale.data.remote import shard_cache
from esvit_scale.data.remote.store import Store
cache = shard_cache.ShardCache(load(Path(sys.argv[1])))
if sys.argv[2] == "fetch":
    Store.fetch = lambda self, name, target, urgent, most: (target.write_bytes(b"half"), print("ready", flush=True), time.sleep(60))
cache.path(int(sys.argv[3]))
print("ready", flush=True)
time.sleep(60)
"""


def process(*arguments: object) -> subprocess.Popen[str]:
    started = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def test_locks_of_two_processes_exclude_each_other(tmp_path: Path) -> None:
    first, second = ByteLocks(tmp_path / "locks"), ByteLocks(tmp_path / "locks")
    big = room.number_of("shard-999999.tar")
    assert first.try_exclusive(big)
    assert not second.try_shared(big)
    assert second.try_exclusive(big + 1)
    assert first.try_shared(big)  # from exclusive to shared without letting go
    assert second.try_shared(big)
    assert not second.try_exclusive(big)
    os.close(os.open(tmp_path / "locks", os.O_RDONLY))  # POSIX locks would be lost here
    assert not second.try_exclusive(big)
    first.close()
    assert second.try_exclusive(big)


def test_killed_process_leaves_no_lock_and_no_fragment(shards: Path, tmp_path: Path) -> None:
    manifest = small(shards, tmp_path, 5)
    killed = process(manifest.root, "fetch", 4)
    mine = ShardCache(manifest)
    assert not mine.fetch_ahead(4, 0)  # another process fetches it
    assert list(manifest.root.glob(".*.partial"))
    assert list(manifest.root.glob(".*.reserved"))
    killed.kill()
    killed.wait()
    assert mine.path(4).read_bytes() == (shards / manifest.shards[4].name).read_bytes()
    assert not list(manifest.root.glob(".*.partial"))
    assert not list(manifest.root.glob(".*.reserved"))


def test_shard_in_use_elsewhere_is_not_removed(shards: Path, tmp_path: Path) -> None:
    manifest = small(shards, tmp_path, 2)
    other = process(manifest.root, "hold", 1)
    mine = ShardCache(manifest)
    try:
        for number in (2, 3, 4):
            mine.keep(set())
            path = mine.path(number)
            assert {p.name for p in manifest.root.glob("*.tar")} == {"shard-000001.tar", path.name}
        assert not mine.fetch_ahead(5, 10)  # no room: both are in use
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert mine.fetch_ahead(5, 10)  # the lock ended with its process


def test_symbolic_links_in_the_cache_are_not_followed(shards: Path, tmp_path: Path) -> None:
    manifest, mine = small(shards, tmp_path / "cache", 5), tmp_path / "thesis.tex"
    mine.write_text("precious")
    reserved = room.reservation(manifest.root, manifest.shards[0].name)
    reserved.symlink_to(mine)
    with suppress(StoreUnreachable):  # or the link is removed as a killed process's reservation
        ShardCache(manifest).path(0)
    (tmp_path / "cache" / "locks").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic"):
        ByteLocks(tmp_path / "cache" / "locks")
    assert mine.read_text() == "precious"
