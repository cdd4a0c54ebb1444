"""Shards are fetched before they are needed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.config import Config
from esvit_scale.data import stream
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.remote import ahead, place, room
from esvit_scale.data.remote.shard_cache import ShardCache
from esvit_scale.data.remote.store import Store
from tests.data.remote.conftest import Counted, cached, config, remote_copy


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

    def failing(self: Store, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
        if len(failed) < 6:  # more than there are threads
            failed.append(name)
            raise NotImplementedError("this file system cannot")
        fetch(self, name, target, urgent=urgent, most=most)

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


def test_room_that_another_process_releases_is_used_at_once(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "ROOM_S", 60.0)
    monkeypatch.setattr(ahead, "LONGEST_ROOM_S", 60.0)
    full = 3.5 * max(map(room.cost, place.open_set(f"file://{shards}", config("", tmp_path).data).shards)) / 1e9
    c = config(f"file://{shards}", tmp_path / "cache", cache_gb=full, slots=1)
    elsewhere = ShardCache(place.open_set(c.data.train, c.data))
    for number in range(3):
        elsewhere.path(number)
    running, manifest = read_ahead(c)
    eventually(lambda: running._released is not None)  # it has found no room
    assert cached(manifest) == {0, 1, 2}
    elsewhere.keep(set())
    began = time.monotonic()
    eventually(lambda: cached(manifest) != {0, 1, 2})
    assert time.monotonic() - began < 10
    running.close()


def test_slots_of_a_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    c = config("x", tmp_path)
    found = {}
    for local in ("", "1", "2", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        found[local] = [ahead.node_slots(LoaderAssignment(c, rank, 4, 0, 1, 1)) for rank in range(4)]
    assert found[""] == found["1"] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert found["2"] == [range(0, 4)] * 2 + [range(4, 8)] * 2
    assert found["4"] == [range(0, 8)] * 4
