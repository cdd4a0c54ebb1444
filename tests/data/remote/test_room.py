"""The limit of a cache: what counts, and which shards leave."""

import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data.remote import place, room, shard_cache
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.data.remote.store import Store
from esvit_scale.errors import UserError
from tests.data.remote.conftest import cached, config, remote_copy, small


def test_shards_needed_last_leave_first(shards: Path, tmp_path: Path) -> None:
    manifest, uses = small(shards, tmp_path, 3), {0: 5.0, 1: 50.0, 2: 20.0}
    cache = ShardCache(manifest, lambda path: uses.get(int(Path(path).stem[-6:]), room.NEVER))
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
    [chosen] = cache.room._contents()[1]
    cache.path(0)
    assert cache.room._remove(chosen) == 0
    assert Path(chosen.path).is_file()
    cache.keep(set())
    assert cache.room._remove(chosen) >= chosen.bytes


def test_reservation_and_its_tar_count_once(shards: Path, tmp_path: Path) -> None:
    manifest = small(shards, tmp_path, 2)
    cache = ShardCache(manifest)
    path = cache.path(0)
    held, files = cache.room.held(), path.stat().st_size + manifests.index_path(path).stat().st_size
    room.reservation(manifest.root, path.name).write_bytes(bytes(room.cost(manifest.shards[0])))
    assert cache.room.held() == held - files + room.cost(manifest.shards[0])


def test_shard_that_arrives_while_files_are_added_up_counts(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = small(shards, tmp_path, 2)
    found, tar = room.Room(tmp_path, None), manifest.root / manifest.shards[0].name
    reserved, before, files = room.reservation(manifest.root, tar.name), found.held(), room.Room._files
    reserved.write_bytes(bytes(room.cost(manifest.shards[0])))

    def arriving(self: room.Room) -> Iterator[os.DirEntry[str]]:
        entries = list(files(self))  # as they were listed, before the shard arrived
        if reserved.exists():
            shutil.copy(shards / tar.name, tar)
            reserved.unlink()
        yield from entries

    monkeypatch.setattr(room.Room, "_files", arriving)
    assert found.held() == before + manifest.shards[0].bytes


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


def test_files_are_added_up_only_where_the_recorded_bytes_leave_no_room(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, contents = [0], room.Room._contents

    def counted(self: room.Room, *arguments: Path) -> tuple[int, list[room.Stored]]:
        looks[0] += 1
        return contents(self, *arguments)

    monkeypatch.setattr(room.Room, "_contents", counted)
    manifest = small(shards, tmp_path, 5)
    cache, other = ShardCache(manifest), ShardCache(manifest)
    for number in range(4):
        assert (cache, other)[number % 2].fetch_ahead(number, 0)
    assert looks == [2]  # once each
    (manifest.root / "copied-here").write_bytes(bytes(manifest.shards[0].bytes))
    cache.room.forget()
    assert cache.fetch_ahead(4, 0)  # for which a shard leaves
    assert looks == [3]
    assert len(cached(manifest)) == 4


def test_disk_in_use_never_exceeds_the_limit(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes on the disk at every moment, with threads of two processes' caches that fetch, release, and fail half-way."""
    fetch, attempts = Store.fetch, [0]

    def slow(self: Store, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
        fetch(self, name, target, urgent=urgent, most=most)
        time.sleep(0.003)
        attempts[0] += 1
        if attempts[0] % 3 == 0:
            target.write_bytes(target.read_bytes()[:-1])

    monkeypatch.setattr(Store, "fetch", slow)
    monkeypatch.setattr(shard_cache, "POLL_S", 0.002)
    manifest = small(shards, tmp_path, 4.5)
    assert manifest.remote is not None
    limit, most = manifest.remote.limit, 0
    assert limit is not None

    def read(cache: ShardCache, numbers: list[int]) -> None:
        for number in numbers:
            cache.fetch_ahead(number, 5)
            cache.path(number)
            cache.keep(set())

    caches = [ShardCache(manifest) for _ in range(2)]
    threads = [
        threading.Thread(target=read, args=(caches[i % 2], random.Random(i).sample(range(10), 10))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        on_disk = 0
        for path in manifest.root.parent.rglob("*"):
            with suppress(FileNotFoundError):
                status = path.lstat()
                on_disk += (
                    min(status.st_size, 512 * status.st_blocks) if path.is_file() else 0
                )  # reservations are sparse
        most = max(most, on_disk)
    assert limit / 2 < most <= limit


def test_longer_object_is_not_written(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with a longer object under a shard's name; of an index, whose length the manifest does not say, room is made."""
    folder = remote_copy(shards, tmp_path)
    tar = folder / "shard-000003.tar"
    tar.write_bytes(tar.read_bytes() + bytes(20 << 20))
    index = manifests.index_path(folder / "shard-000004.tar")
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        cache = ShardCache(place.open_set(url, config("", tmp_path / "cache").data))
        written, unlink = [], Path.unlink

        def watched(path: Path, missing_ok: bool = False) -> None:
            if path.name.endswith(".partial") and path.exists():
                written.append(path.stat().st_size)
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(Path, "unlink", watched)
        with pytest.raises(UserError, match=rf"000003\.tar: {tar.stat().st_size} bytes came; the manifest says"):
            cache.path(3)
        assert 0 < max(written) <= 5 << 20  # one piece of the transfer
        monkeypatch.setattr(shard_cache, "index_cost", lambda shard: 100)
        by_ranges = ShardCache(cache.manifest, by_ranges=True)
        assert by_ranges.path(4).read_bytes() == index.read_bytes()
        server.shutdown()
