"""The shard cache of a node without a network: fsspec's local file system stands for the store."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import torch

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data import evaluation, mix, shard_stream, shard_verify, stream
from esvit_scale.data import manifest as manifests
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.order import Order
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.remote import ahead, place, room, shard_cache, store, upload, working_set
from esvit_scale.data.remote.locks import ByteLocks
from esvit_scale.data.remote.schedule import Schedule
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.data.remote.store import Denied, Missing, Store, StoreUnreachable
from esvit_scale.errors import RestartCanHelp, UserError
from tests import tiny


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("local") / "set", samples=96)  # 10 shards of 10, the last of 6


@pytest.fixture(autouse=True)
def _fresh_look(monkeypatch: pytest.MonkeyPatch) -> None:
    place._attached.cache_clear()
    monkeypatch.setattr(store, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(store, "REQUESTS_PER_SECOND", 5000)
    monkeypatch.setattr(shard_cache, "CHANGED_DELAY_S", 0.01)


def config(train: object, cache: Path, **data: Any) -> Config:
    values = {**tiny.VALUES["data"], "shuffle_window": 2, "cache_dir": str(cache), **data}
    return configs.validate({**tiny.VALUES, "data": values | {"train": str(train)}}, where="test")


def read(c: Config, rank: int = 0, world_size: int = 1, start: int = 0, epochs: int = 2) -> Iterator[stream.Batch]:
    data = stream.open_data(c)
    return stream.batches(c, data, rank, world_size, start, epochs * stream.steps_per_epoch(c, data))


def same(a: list[stream.Batch], b: list[stream.Batch]) -> bool:
    return len(a) == len(b) and all(
        x.keys == y.keys and not y.bad and all(torch.equal(p, q) for p, q in zip(x.crops, y.crops, strict=True))
        for x, y in zip(a, b, strict=True)
    )


class Counted:
    """The transfers of this process, counted by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        fetch = Store.fetch

        def counted(of: Store, name: str, target: Path, *, urgent: bool) -> None:
            self.names.append(name)
            fetch(of, name, target, urgent=urgent)

        monkeypatch.setattr(Store, "fetch", counted)


def cached_bytes(cache: Path) -> int:
    return room.Room(cache, None).held()


# --- the same batches, each shard once -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_of_the_local_set(shards: Path, tmp_path: Path, workers: int) -> None:
    local = list(read(config(shards, tmp_path)))
    assert same(local, list(read(config(f"file://{shards}", tmp_path / "cache", workers=workers))))


def test_each_shard_is_fetched_once_and_none_in_the_next_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, c = Counted(monkeypatch), config(f"file://{shards}", tmp_path)
    list(read(c, epochs=3))
    assert sorted(counted.names) == [shard.name for shard in manifests.load(shards).shards]
    list(read(c, start=5))
    assert len(counted.names) == len(manifests.load(shards).shards)


def test_small_cache_stays_within_its_limit_and_gives_the_same_batches(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = list(read(config(shards, tmp_path, slots=1)))
    c = config(f"file://{shards}", tmp_path / "cache", slots=1)
    found = working_set.working_set(c, stream.open_data(c), 1)
    limit = 5 * max(map(room.cost, manifests.load(shards).shards))  # a window, the next one, and one more
    assert limit < found.all
    place._attached.cache_clear()
    c, most, reserve = (
        config(f"file://{shards}", tmp_path / "cache", slots=1, cache_gb=limit / 1e9),
        [0],
        room.Room.reserve,
    )

    def watched(self: room.Room, *args: Any) -> bool:
        got = reserve(self, *args)
        most[0] = max(most[0], self.held())
        return got

    monkeypatch.setattr(room.Room, "reserve", watched)
    counted, remote = Counted(monkeypatch), []
    for batch in read(c, epochs=2):
        remote.append(batch)
        assert cached_bytes(tmp_path / "cache") <= limit
    assert same(local, remote)
    assert limit / 2 < most[0] <= limit
    assert len(counted.names) <= 2 * 10  # one slot: a shard once an epoch


def test_mix_of_a_remote_and_a_local_set(shards: Path, tmp_path: Path) -> None:
    other = tiny.shards(tmp_path / "other", samples=30)
    runs = [
        list(read(config("", tmp_path / "cache", mix=[{"urls": url, "weight": 2.0}, {"urls": str(other)}]), epochs=2))
        for url in (str(shards), f"file://{shards}")
    ]
    assert same(*runs)


def test_resume_at_another_world_size_with_an_empty_cache(shards: Path, tmp_path: Path) -> None:
    local = list(read(config(shards, tmp_path), start=7))
    ranks = [list(read(config(f"file://{shards}", tmp_path / f"cache{r}"), r, 2, start=7)) for r in range(2)]
    for whole, *parts in zip(local, *ranks, strict=True):
        assert whole.keys == [key for part in parts for key in part.keys]
        for group, *halves in zip(whole.crops, *(part.crops for part in parts), strict=True):
            assert torch.equal(group, torch.cat(halves, 1))


# --- faults --------------------------------------------------------------------------------------------------------


def remote_copy(shards: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bucket"
    copy.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


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


def test_transient_failures_are_retried_within_a_budget(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = place.open_set(f"file://{shards}", config("", tmp_path).data)
    opened = Store(f"file://{shards}", {}, manifest.root.parent)
    failures: list[Exception] = [OSError(5, "Input/output error"), TimeoutError(), ConnectionResetError(104, "reset")]
    get_file = opened._fs.get_file

    def flaky(source: str, target: str) -> None:
        if failures:
            raise failures.pop()
        get_file(source, target)

    monkeypatch.setattr(opened._fs, "get_file", flaky)
    opened.fetch("shard-000000.tar", tmp_path / "got", urgent=True)
    assert (tmp_path / "got").read_bytes() == (shards / "shard-000000.tar").read_bytes()
    failures += [OSError(16, "SlowDown")] * 1000
    monkeypatch.setattr(store, "BUDGET_S", 0.2)
    with pytest.raises(StoreUnreachable, match=r"shard-000001\.tar: .*SlowDown, after \d+ attempts") as caught:
        opened.fetch("shard-000001.tar", tmp_path / "got", urgent=True)
    assert isinstance(caught.value, RestartCanHelp)
    assert 3 < 1000 - len(failures) < 40


def test_retry_after_is_obeyed_and_status_decides() -> None:
    class HttpError(Exception):
        def __init__(self, status: int, **headers: str) -> None:
            self.status, self.headers = status, headers

    HttpError.__module__ = "aiohttp.client_exceptions"
    boto = type("ClientError", (Exception,), {"__module__": "botocore.exceptions"})()
    boto.response = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "7"}}}
    wrapped = OSError(16, "Please reduce your request rate")
    wrapped.__cause__ = boto
    assert store._retry_after(HttpError(429, **{"Retry-After": "3"})) == 3
    assert store._retry_after(wrapped) == 7
    assert store._retry_after(HttpError(503, **{"Retry-After": "86400"})) == 60
    assert store._retry_after(OSError()) == 0
    kinds = {status: store._kind(HttpError(status)) for status in (429, 500, 503, 403, 401, 404)}
    assert kinds == {
        429: StoreUnreachable,
        500: StoreUnreachable,
        503: StoreUnreachable,
        403: Denied,
        401: Denied,
        404: Missing,
    }
    assert store._kind(wrapped) is StoreUnreachable
    assert store._kind(KeyError("x")) is None
    assert store._kind(OSError(28, "No space left on device")) is None


def test_options_of_ours_the_environment_and_the_user_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    addressing = {"addressing_style": "path"}
    joined = store._joined_options("s3", {"anon": True, "config_kwargs": {"s3": addressing, "read_timeout": 5}})
    assert joined["config_kwargs"] == {
        "retries": {"total_max_attempts": 1},
        "connect_timeout": 10,
        "read_timeout": 5,
        "s3": addressing,
    }
    assert joined["anon"]
    assert joined["max_concurrency"] == 1
    monkeypatch.setitem(sys.modules, "aiohttp", types.SimpleNamespace(ClientTimeout=lambda **limits: limits))
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"headers": {"x": "y"}}})
    joined = store._joined_options("https", {"block_size": 0})
    assert joined["client_kwargs"]["headers"] == {"x": "y"}
    assert joined["client_kwargs"]["timeout"]["total"] is None  # otherwise every transfer ends after 5 minutes


def test_missing_set_ends_the_start_at_once(shards: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match="not a finished shard set"):
        stream.open_data(config(f"file://{tmp_path}/nothing", tmp_path / "cache"))
    with pytest.raises(UserError, match="gcsfs"):
        stream.open_data(config("gs://bucket/set", tmp_path / "cache"))
    assert time.monotonic() - began < 5


def test_replaced_set_is_read_anew(shards: Path, tmp_path: Path) -> None:
    bucket, cache = remote_copy(shards, tmp_path), tmp_path / "cache"
    first = stream.open_data(config(f"file://{bucket}", cache))
    other = tiny.shards(tmp_path / "other", samples=30)
    for path in other.iterdir():
        if path.is_file():
            (bucket / path.name).write_bytes(path.read_bytes())
    place._attached.cache_clear()
    now = stream.open_data(config(f"file://{bucket}", cache))
    assert (now.samples, first.samples) == (30, 96)
    assert now.root != first.root


# --- locks and the limit -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from esvit_scale.data.manifest import load
from esvit_scale.data.remote import shard_cache
from esvit_scale.data.remote.store import Store
cache = shard_cache.ShardCache(load(Path(sys.argv[1])))
if sys.argv[2] == "fetch":
    Store.fetch = lambda self, name, target, urgent: (target.write_bytes(b"half"), print("ready", flush=True), time.sleep(60))
cache.path(int(sys.argv[3]))
print("ready", flush=True)
time.sleep(60)
"""


def process(*arguments: object) -> subprocess.Popen[str]:
    started = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def small(shards: Path, cache: Path, count: float) -> Manifest:
    """The set's manifest with a cache that has room for `count` shards."""
    limit = count * max(map(room.cost, manifests.load(shards).shards)) / 1e9
    return place.open_set(f"file://{shards}", config("", cache, cache_gb=limit).data)


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
    assert cache._room.held() <= cache._room.limit
    tight = ShardCache(small(shards, tmp_path / "tight", 1))
    tight._room._limit = tight._room.held() + manifest.shards[0].bytes
    assert not manifests.index_path(tight.path(0)).is_file()


def test_default_cache_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = place.cache_folder(None)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert place.cache_folder(None).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(UserError, match=r"data\.cache_dir: the default, .* only you may write"):
        place.cache_folder(None)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="only you may write"):
        place.cache_folder(None)
    folder.unlink()
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UserError, match="only you may write"):
        place.cache_folder(None)


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


def test_set_is_opened_while_another_rank_records_a_new_version(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest and its version are one file at every time, so that no rank finds one without the other."""
    manifest, data = small(shards, tmp_path, 5), config("", tmp_path).data
    [recorded] = [path for path in (tmp_path / place.MANIFESTS).iterdir() if path.name != room.MARKER]
    recorded.write_bytes(b"old version\n" + recorded.read_bytes().partition(b"\n")[2])
    read_bytes = Path.read_bytes

    def vanishes(self: Path) -> bytes:
        if self == recorded:
            raise FileNotFoundError
        return read_bytes(self)

    monkeypatch.setattr(Path, "read_bytes", vanishes)
    place._attached.cache_clear()
    assert place.open_set(f"file://{shards}", data).shards == manifest.shards
    monkeypatch.undo()
    place._attached.cache_clear()
    assert recorded.read_bytes().partition(b"\n")[2] == (shards / "manifest.json").read_bytes()
    monkeypatch.setattr(Store, "read", lambda *_, **__: pytest.fail("the version is that of the store"))
    assert place.open_set(f"file://{shards}", data).root == manifest.root


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


def test_connections_of_a_node_are_bounded(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CONNECTIONS", 3)
    monkeypatch.setattr(store, "RESERVED", 1)
    stores, now, most = [Store(f"file://{shards}", {}, tmp_path) for _ in range(4)], [0], [0]
    mutex = threading.Lock()

    def slow(source: str, target: str) -> None:
        with mutex:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with mutex:
            now[0] -= 1

    for each in stores:
        monkeypatch.setattr(each._fs, "get_file", slow)
    jobs = [
        threading.Thread(target=lambda s=s: s.fetch("shard-000000.tar", tmp_path / "x", urgent=False))
        for s in stores for _ in range(3)
    ]  # fmt: skip
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    assert most[0] == 2  # one is left for a process that waits


def test_requests_of_a_node_are_paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "REQUESTS_PER_SECOND", 50)
    began = time.monotonic()
    for _ in range(11):
        store._pace(tmp_path / ".pace")
    assert 0.19 < time.monotonic() - began < 1


# --- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "window"), [(1, 2), (4, 3), (8, 2)])
def test_schedule_covers_every_read_and_no_batch_more(shards: Path, tmp_path: Path, slots: int, window: int) -> None:
    c = config(shards, tmp_path, slots=slots, shuffle_window=window)
    manifest = manifests.load(shards)
    counts, steps = [shard.samples for shard in manifest.shards], manifest.samples // 8
    for epoch in (0, 3):
        order, expected = Order(c.seed, epoch, counts, 8, slots, window), set()
        for step in range(steps):
            for slot in range(slots):
                for i in range(8 // slots):
                    at = order.position(step, slot, i)
                    [(number, _)] = order.windows(range(at, at + 1))
                    assert order.locate(at)[0] in order.shards_of_window(number)
                    expected |= {(epoch * steps + step, (0, s)) for s in order.shards_of_window(number)}
        schedule = Schedule(c, manifest, range(slots))
        found = {
            (batch, shard)
            for use in schedule.uses(epoch)
            for batch in range(use.first, use.last + 1)
            for shard in use.shards
        }
        assert found == expected
        for batch in range(epoch * steps, (epoch + 1) * steps, 3):
            for shard in {shard for _, shard in expected}:
                later = [b for b, s in expected if s == shard and b >= batch]
                if later:
                    assert schedule.next_use(shard, batch) == min(later)


def test_schedule_of_a_mix_covers_every_read(shards: Path, tmp_path: Path) -> None:
    other = tiny.shards(tmp_path / "other", samples=17)
    c = config("", tmp_path, mix=[{"urls": str(shards), "weight": 3.0}, {"urls": str(other)}], slots=4)
    data = stream.open_data(c)
    schedule, order = Schedule(c, data, range(4)), mix.order_of(c, data)
    for epoch in (0, 2):
        uses = schedule.uses(epoch)
        for batch in range(epoch * schedule.steps, (epoch + 1) * schedule.steps):
            live = {shard for use in uses if use.first <= batch <= use.last for shard in use.shards}
            for slot in range(4):
                for i in range(2):
                    address = order.address(batch, slot, i)
                    assert (address.set, address.order.locate(address.position)[0]) in live


# --- reading ahead -------------------------------------------------------------------------------------------------


def read_ahead(c: Config) -> tuple[ahead.ReadAhead, Manifest]:
    """Read-ahead of two epochs whose first batch is not asked for yet."""
    data = stream.open_data(c)
    assert isinstance(data, Manifest)
    steps = stream.steps_per_epoch(c, data)
    return ahead.ReadAhead(LoaderAssignment(c, 0, 1, 0, 2 * steps, steps), data, []), data


def eventually(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def cached(manifest: Manifest) -> set[int]:
    return {int(path.stem[-6:]) for path in manifest.root.glob("*.tar")}


def test_missing_object_is_asked_for_once_before_it_is_needed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bucket, counted = remote_copy(shards, tmp_path), Counted(monkeypatch)
    (bucket / "shard-000003.tar").unlink()
    monkeypatch.setattr(ahead, "BUSY_S", 0.05)
    monkeypatch.setattr(ahead, "QUIET_S", 0.05)
    running, manifest = read_ahead(config(f"file://{bucket}", tmp_path / "cache"))
    eventually(lambda: cached(manifest) == set(range(10)) - {3} and "shard-000003.tar" in counted.names)
    time.sleep(0.6)
    running.close()
    assert counted.names.count("shard-000003.tar") == 1
    assert [line for line in caplog.messages if "shard-000003.tar: no such object" in line]


def test_error_of_an_unknown_kind_does_not_end_reading_ahead(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch, failed = Store.fetch, []

    def failing(self: Store, name: str, target: Path, *, urgent: bool) -> None:
        if len(failed) < 6:  # more than there are threads
            failed.append(name)
            raise NotImplementedError("this file system cannot")
        fetch(self, name, target, urgent=urgent)

    monkeypatch.setattr(Store, "fetch", failing)
    monkeypatch.setattr(ahead, "FAILED_S", 0.1)
    monkeypatch.setattr(ahead, "QUIET_S", 0.05)
    running, manifest = read_ahead(config(f"file://{shards}", tmp_path))
    eventually(lambda: cached(manifest) == set(range(10)))
    running.close()
    assert any("not fetched ahead of need: this file system cannot" in line for line in caplog.messages)


def test_idle_read_ahead_asks_for_little(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all shards there, or a full cache, the threads look for nothing ten times a second."""
    calls, is_there, reserve = {"is_there": 0, "reserve": 0}, ShardCache.is_there, room.Room.reserve

    def counted(name: str, call: Callable[..., bool]) -> Callable[..., bool]:
        def inner(*args: Any) -> bool:
            calls[name] += 1
            return call(*args)

        return inner

    monkeypatch.setattr(ShardCache, "is_there", counted("is_there", is_there))
    monkeypatch.setattr(room.Room, "reserve", counted("reserve", reserve))
    running, manifest = read_ahead(config(f"file://{shards}", tmp_path / "all"))
    eventually(lambda: cached(manifest) == set(range(10)))
    calls["is_there"] = 0
    time.sleep(0.6)
    running.close()
    assert calls["is_there"] <= 2 * 10
    full = 5 * max(map(room.cost, manifest.shards)) / 1e9
    running, manifest = read_ahead(config(f"file://{shards}", tmp_path / "full", cache_gb=full, slots=1))
    eventually(lambda: len(cached(manifest)) >= 4)
    time.sleep(0.2)
    calls["reserve"] = 0
    time.sleep(0.6)
    running.close()
    assert calls["reserve"] <= 2


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


def test_waiting_for_a_shard_is_no_slow_sample(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch = Store.fetch

    def slow(self: Store, name: str, target: Path, *, urgent: bool) -> None:
        time.sleep(0.6 if name == "shard-000003.tar" else 0)
        fetch(self, name, target, urgent=urgent)

    monkeypatch.setattr(Store, "fetch", slow)
    monkeypatch.setattr(ahead.ReadAhead, "_fetch_next", lambda self: False)
    monkeypatch.setattr(shard_stream, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(shard_cache, "LONG_WAIT_S", 0.5)
    caplog.set_level("INFO")
    assert not [row for batch in read(config(f"file://{shards}", tmp_path), epochs=1) for row in batch.bad]
    assert [line for line in caplog.messages if line.startswith("waited 1 s for") and "shard-000003.tar" in line]


def test_held_out_shards_are_let_go_and_have_room(shards: Path, tmp_path: Path) -> None:
    url = f"file://{tiny.shards(tmp_path / 'held', samples=40)}"
    held = place.open_set(url, config("", tmp_path / "cache").data)
    list(evaluation.evaluation_batches(held.root, 32, 7))
    assert cached(held)
    others = ByteLocks(held.root / room.LOCKS)
    assert all(others.try_exclusive(room.number_of(shard.name)) for shard in held.shards)
    c = config(f"file://{shards}", tmp_path / "cache", held_out=url)
    data, without = stream.open_data(c), working_set.working_set(c, stream.open_data(c), 1)
    assert isinstance(data, Manifest)
    c = c.model_copy(update={"train": c.train.model_copy(update={"knn_every": 5})})
    most = sorted(map(room.cost, held.shards))[-2:]
    assert working_set.working_set(c, data, 1).least == without.least + sum(most)


def test_slots_of_a_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    c = config("x", tmp_path)
    found = {}
    for local in ("", "1", "2", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        found[local] = [ahead.node_slots(LoaderAssignment(c, rank, 4, 0, 1, 1)) for rank in range(4)]
    assert found[""] == found["1"] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert found["2"] == [range(0, 4)] * 2 + [range(4, 8)] * 2
    assert found["4"] == [range(0, 8)] * 4


def test_too_small_cache_is_an_error_before_the_run_with_the_number_that_works(shards: Path, tmp_path: Path) -> None:
    c = config(f"file://{shards}", tmp_path, cache_gb=1e-5, slots=1, workers=0)
    with pytest.raises(UserError, match=r"data\.cache_gb: 0.001 GB, but 1 data slots .* set data\.cache_gb=") as caught:
        working_set.check(
            c.model_copy(update={"data": c.data.model_copy(update={"cache_gb": 1e-5})}), stream.open_data(c), 1
        )
    number = str(caught.value).partition("set data.cache_gb=")[2].split()[0]
    place._attached.cache_clear()
    c = config(f"file://{shards}", tmp_path, cache_gb=float(number), slots=1)
    [line] = working_set.check(c, stream.open_data(c), 1)
    assert "1 slots on a node read from" in line
    assert len(list(read(c))) == 24
    assert working_set.check(config(shards, tmp_path), stream.open_data(config(shards, tmp_path)), 1) == []


# --- commands ------------------------------------------------------------------------------------------------------


def test_commands_read_a_remote_set_like_a_local_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    told = []
    for place_ in (str(shards), f"file://{shards}"):
        assert cli.main(["shards", "stats", place_, "--json", "--workers", "2"]) == 0
        told.append(capsys.readouterr().out)
        assert cli.main(["shards", "show", place_, "--out", str(tmp_path / f"{len(told)}.png"), "--count", "9"]) == 0
        assert cli.main(["shards", "verify", place_, "--workers", "2"]) == 0
        capsys.readouterr()
    assert told[0] == told[1]
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    batches = [
        list(evaluation.evaluation_batches(source, 32, 7, workers=workers))
        for source, workers in ((shards, 0), (place.local_folder(f"file://{shards}"), 2))
    ]
    assert [b.keys for b in batches[0]] == [b.keys for b in batches[1]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*batches, strict=True))


def test_verify_names_every_changed_object(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bucket = remote_copy(shards, tmp_path)
    for name in ("shard-000002.tar", "shard-000005.tar"):
        (bucket / name).write_bytes((bucket / name).read_bytes()[:-1024])
    assert cli.main(["shards", "verify", f"file://{bucket}"]) == 2
    told = capsys.readouterr().err
    assert all(f"file://{bucket}/{name}: " in told for name in ("shard-000002.tar", "shard-000005.tar"))
    assert cli.main(["shards", "verify", f"file://{bucket}", "--repair"]) == 2
    assert "cannot be repaired in place" in capsys.readouterr().err


def test_verify_needs_no_index_of_a_remote_shard(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardCache, "_write_index", lambda *_: None)  # as if the cache had no room for it
    assert shard_verify.verify(small(shards, tmp_path, 20).root) == []


def test_upload_sends_the_manifest_last_and_continues(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, bucket, sent = remote_copy(shards, tmp_path), tmp_path / "store", []
    bucket.mkdir()
    put = Store.put

    def failing(self: Store, path: Path) -> None:
        if len(sent) == 9:
            raise StoreUnreachable("gone")
        sent.append(path.name)
        put(self, path)

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises(StoreUnreachable):
        upload.upload(local, f"file://{bucket}")
    assert not (bucket / "manifest.json").exists()
    there = [name for name in sent if name.endswith(".tar")]
    monkeypatch.setattr(Store, "put", lambda self, path: (sent.append(path.name), put(self, path))[1])
    assert upload.upload(local, f"file://{bucket}") >= 10 - len(there)
    assert sent[-1] == "manifest.json"
    assert len(sent) < 2 * 21
    for path in [*shards.glob("*.tar"), *shards.glob("*.json*")]:
        if path.name != "quarantine.jsonl":
            assert (bucket / path.name).read_bytes() == path.read_bytes()
    (bucket / "shard-000004.tar").write_bytes(b"other")
    assert upload.upload(local, f"file://{bucket}") == 1
    assert (bucket / "shard-000004.tar").read_bytes() == (shards / "shard-000004.tar").read_bytes()
    content = bytearray((local / "shard-000001.tar").read_bytes())
    content[700] ^= 1
    (local / "shard-000001.tar").write_bytes(content)
    with pytest.raises(UserError, match="sha256 differs"):
        upload.upload(local, f"file://{tmp_path}/store2")


def test_writing_commands_refuse_addresses(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["shards", "create", str(shards), "s3://bucket/set"])
    assert "shards upload FOLDER s3://bucket/set" in capsys.readouterr().err
