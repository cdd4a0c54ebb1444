"""Batches of a remote set are those of the local one, whatever the cache, the ranks and the step they begin at."""

from pathlib import Path
from typing import Any

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data import stream
from esvit_scale.data.remote import place, room, working_set
from tests import tiny
from tests.data.remote.conftest import Counted, check_joined, config, read, same


def cached_bytes(cache: Path) -> int:
    return room.Room(cache, None).held()


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
    monkeypatch.setattr(working_set, "ring_bytes", lambda *_: None)  # as a set without checksums
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
    check_joined(local, ranks)
