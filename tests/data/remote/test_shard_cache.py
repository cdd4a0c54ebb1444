"""Shards come into the cache once and whole."""

import threading
import time
from pathlib import Path

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data import shard_stream
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.remote import ahead, room, shard_cache
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.data.remote.store import Store, StoreUnreachable
from esvit_scale.errors import UserError
from tests.data.remote.conftest import Counted, config, read, remote_copy, same, small


def test_threads_and_processes_fetch_a_shard_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, manifest = Counted(monkeypatch), small(shards, tmp_path, 20)
    caches = [ShardCache(manifest) for _ in range(3)]  # each with locks of its own, as in processes of their own
    threads = [threading.Thread(target=lambda c=c: [c.path(n) for n in range(10)]) for c in caches for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(counted.names) == [shard.name for shard in manifest.shards]


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_changed_object_is_named(shards: Path, tmp_path: Path, damage: str) -> None:
    bucket = remote_copy(shards, tmp_path)
    tar = bucket / "shard-000003.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.unlink() if damage == "missing" else tar.write_bytes(content if damage == "flipped" else content[:-512])
    for workers in (0, 1) if damage == "flipped" else (0,):
        with pytest.raises(UserError, match=rf"file://{bucket}/shard-000003\.tar: "):
            list(read(config(f"file://{bucket}", tmp_path / f"cache{workers}", workers=workers)))
    assert not list(tmp_path.glob("cache*/*/*000003.tar*"))  # no fragment is left that could be taken for the shard


def test_failing_cache_disk_is_no_damaged_sample(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = small(shards, tmp_path, 2)

    def broken(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(room.Room, "reserve", broken)
    with pytest.raises(StoreUnreachable, match="Input/output error; the cache's disk"):
        ShardReader(manifest).entry(0, 0)


def test_shard_removed_by_hand_before_it_is_opened_is_fetched_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, removed = shard_cache.ShardCache.path, []

    def path_of_removed(self: ShardCache, number: int) -> Path:
        found = path(self, number)
        if number not in removed:
            removed.append(number)
            found.unlink()
            manifests.index_path(found).unlink()
        return found

    local = list(read(config(shards, tmp_path), epochs=1))
    monkeypatch.setattr(ShardCache, "path", path_of_removed)
    assert same(local, list(read(config(f"file://{shards}", tmp_path / "cache"), epochs=1)))
    assert len(removed) == 10


def test_index_of_long_keys_is_kept_where_there_is_room(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_cache, "cost", lambda shard: shard.bytes)  # as if the index took more than expected
    manifest = small(shards, tmp_path, 1.5)
    cache = ShardCache(manifest)
    assert manifests.index_path(cache.path(0)).is_file()
    cache.keep(set())
    assert manifests.index_path(cache.path(1)).is_file()
    assert cache.room.held() <= cache.room.limit
    tight = ShardCache(small(shards, tmp_path / "tight", 1))
    tight.room._limit = tight.room.held() + manifest.shards[0].bytes
    assert not manifests.index_path(tight.path(0)).is_file()


def test_waiting_for_a_shard_is_no_slow_sample(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Store.fetch

    def slow(self: Store, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
        time.sleep(0.6 if name == "shard-000003.tar" else 0)
        fetch(self, name, target, urgent=urgent, most=most)

    monkeypatch.setattr(Store, "fetch", slow)
    monkeypatch.setattr(ahead.ReadAhead, "_fetch_next", lambda self: False)
    monkeypatch.setattr(shard_stream, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(shard_cache, "LONG_WAIT_S", 0.5)
    caplog.set_level("INFO")
    assert not [row for batch in read(config(f"file://{shards}", tmp_path), epochs=1) for row in batch.bad]
    assert [line for line in caplog.messages if line.startswith("waited 1 s for") and "shard-000003.tar" in line]
