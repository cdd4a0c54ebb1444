"""The limit of a cache: what counts, and which shards leave."""

import shutil
import threading
import time
from pathlib import Path

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data.remote import room
from esvit_scale.data.remote.shard_cache import ShardCache
from tests.data.remote.conftest import cached, small


def test_shards_needed_last_leave_first(shards: Path, tmp_path: Path) -> None:
    manifest, uses = small(shards, tmp_path, 3), {0: 5.0, 1: 50.0, 2: 20.0}
    cache = ShardCache(manifest, lambda path: uses.get(int(path.stem[-6:]), room.NEVER))
    for number in (0, 1, 2):
        assert cache.fetch_ahead(number, uses[number])
    there = lambda: {int(path.stem[-6:]) for path in manifest.root.glob("*.tar")}  # noqa: E731
    assert not cache.fetch_ahead(3, 60)  # all others are needed earlier
    assert there() == {0, 1, 2}
    uses[3] = 30.0
    assert cache.fetch_ahead(3, 30)
    assert there() == {0, 2, 3}
    cache.path(4)  # a process waits for it, so the last one leaves whatever it is needed for
    assert there() == {0, 2, 4}


def test_only_folders_of_the_cache_count_and_lose_shards(shards: Path, tmp_path: Path) -> None:
    """Foreign tars below data.cache_dir stay, as do those of a copy of a cache's folder."""
    manifest = small(shards, tmp_path, 2)
    cache = ShardCache(manifest)
    cache.path(0)
    (tmp_path / "imagenet").mkdir()
    foreign = [tmp_path / "imagenet" / "0.tar", tmp_path / "1.tar"]
    for path in foreign:
        path.write_bytes(bytes(10 * manifest.shards[0].bytes))
    copy = shutil.copytree(manifest.root, tmp_path / "copy")
    for number in (1, 2, 3, 4):
        cache.keep(set())
        cache.path(number)
    assert all(path.stat().st_size == 10 * manifest.shards[0].bytes for path in foreign)
    assert (copy / manifest.shards[0].name).is_file()
    assert not (manifest.root / manifest.shards[0].name).exists()
    assert not (tmp_path / "imagenet" / room.LOCKS).exists()
    assert manifests.load(manifest.root).remote is not None
    assert manifests.load(copy).remote is None  # a set of its own, from which nobody removes shards


def test_shard_taken_after_it_was_chosen_is_not_removed(shards: Path, tmp_path: Path) -> None:
    """The thread that makes room and the one that reads are in one process, whose locks must exclude each other."""
    manifest = small(shards, tmp_path, 2)
    cache = ShardCache(manifest)
    cache.path(0)
    cache.keep(set())
    [chosen] = cache._room._contents()[1]
    cache.path(0)
    assert cache._room._remove(chosen) == 0
    assert chosen.path.is_file()
    cache.keep(set())
    assert cache._room._remove(chosen) >= chosen.bytes


def test_reservation_and_its_tar_count_once(shards: Path, tmp_path: Path) -> None:
    manifest = small(shards, tmp_path, 2)
    cache = ShardCache(manifest)
    path = cache.path(0)
    held, files = cache._room.held(), path.stat().st_size + manifests.index_path(path).stat().st_size
    room.reservation(manifest.root, path.name).write_bytes(bytes(room.cost(manifest.shards[0])))
    assert cache._room.held() == held - files + room.cost(manifest.shards[0])


def test_look_for_room_is_left_to_processes_that_wait(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small(shards, tmp_path, 5)
    cache, other = ShardCache(manifest), room.Room(tmp_path, None)
    monkeypatch.setattr(room, "TURN_S", 0.1)
    with other._turn(urgent=True):
        assert cache.fetch_ahead(1, 0) is False
        waiting = threading.Thread(target=cache.path, args=(0,))
        waiting.start()
        time.sleep(0.1)
        assert cached(manifest) == set()
    waiting.join(20)
    assert cached(manifest) == {0}
