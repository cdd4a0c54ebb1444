"""Single samples are read by ranges where the cache has no room for the shards, with the same batches as a local set."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import stream
from esvit_scale.data.manifest import Entry, Manifest
from esvit_scale.data.remote import place, range_ahead, ranges, room, shard_cache, working_set
from esvit_scale.data.remote.range_reader import RangeReader
from esvit_scale.data.remote.ranges import Member
from esvit_scale.data.remote.ring import LEAST, Ring
from esvit_scale.data.remote.store import Store
from esvit_scale.errors import UserError
from tests import tiny
from tests.data.remote.conftest import Counted, check_joined, config, read, remote_copy, same, small


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("many") / "set", samples=120)


def narrow(url: str, cache: Path, **data: object) -> Config:
    """A config whose cache has the least room with which ranges work; the slots read from most shards at a time."""
    c = config(url, cache, **data)
    found = working_set.working_set(c, open_data(c), 1)
    assert found.least_by_ranges < found.least
    place._attached.cache_clear()
    return config(url, cache, cache_gb=found.least_by_ranges / 1e9, **data)


def open_data(c: Config) -> Manifest:
    data = stream.open_data(c)
    assert isinstance(data, Manifest)
    return data


def read_ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    found, whole = [], Store.read

    def counted(self: Store, name: str, *, start: int | None = None, stop: int | None = None, **others: bool) -> bytes:
        if start is not None and stop is not None:
            found.append((name, start, stop))
        return whole(self, name, start=start, stop=stop, **others)

    monkeypatch.setattr(Store, "read", counted)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_of_the_local_set(many: Path, tmp_path: Path, workers: int) -> None:
    local = list(read(config(many, tmp_path), start=6))
    c = narrow(f"file://{many}", tmp_path / "cache", workers=workers)
    limit, remote = room.Room(tmp_path / "cache", int((c.data.cache_gb or 0) * 1e9)), []
    for batch in read(c, start=6):
        remote.append(batch)
        assert limit.held() <= limit.limit
    assert same(local, remote)
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert not list((tmp_path / "cache").rglob("*.reserved"))  # rings leave with their processes


def test_no_byte_is_fetched_twice_in_an_epoch(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, found = Counted(monkeypatch), read_ranges(monkeypatch)
    batches = list(read(narrow(f"file://{many}", tmp_path), epochs=1))
    assert len(batches) == 15
    seen: dict[str, int] = Counter()
    for name, start, stop in sorted(found):
        assert start >= seen[name], f"{name}: byte {start} is fetched twice"
        seen[name] = stop
    assert sorted(counted.names) == sorted(manifests.index_path(Path(s.name)).name for s in manifests.load(many).shards)
    # Neighbours share a range: fewer requests than images.
    assert 12 < len(found) < 120


def test_resume_at_another_world_size_with_an_empty_cache(many: Path, tmp_path: Path) -> None:
    local = list(read(config(many, tmp_path), start=11))
    ranks = [list(read(narrow(f"file://{many}", tmp_path / f"cache{r}"), r, 2, start=11)) for r in range(2)]
    check_joined(local, ranks)


def test_mix_with_a_set_without_checksums(many: Path, shards: Path, tmp_path: Path) -> None:
    old = remote_copy(shards, tmp_path)
    text = (old / "manifest.json").read_text().replace('"index_version": 2', '"index_version": 0')
    (old / "manifest.json").write_text(text)
    runs = []
    for urls in ((str(many), str(shards)), (f"file://{many}", f"file://{old}")):
        mix = [{"urls": url, "weight": weight} for url, weight in zip(urls, (2.0, 1.0), strict=True)]
        c = config("", tmp_path / "cache", mix=mix, slots=2)
        if "file" in urls[0]:
            found = working_set.working_set(c, stream.open_data(c), 1)  # type: ignore[arg-type]
            assert found.least_by_ranges < found.least
            place._attached.cache_clear()
            c = config("", tmp_path / "cache", mix=mix, slots=2, cache_gb=found.least_by_ranges / 1e9)
        runs.append(list(read(c, epochs=1)))
    assert same(*runs)


@pytest.mark.parametrize("damage", ["image", "index", "ignored"])
def test_what_is_not_as_the_manifest_says_is_named(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    bucket = remote_copy(many, tmp_path)
    path = bucket / ("shard-000003.index.jsonl" if damage == "index" else "shard-000003.tar")
    expected = rf"file://{bucket}/{path.name}: "
    if damage == "ignored":
        whole: Callable[..., bytes] = Store.read
        monkeypatch.setattr(Store, "read", lambda self, name, start=None, stop=None, **rest: whole(self, name, **rest))
        expected = r"shard-\d+\.tar: the server ignores ranges"
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 if damage == "index" else 1600] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        list(read(narrow(f"file://{bucket}", tmp_path / "cache")))


def test_number_in_the_message_works(many: Path, tmp_path: Path) -> None:
    c = narrow(f"file://{many}", tmp_path)
    [line] = working_set.check(
        c.model_copy(update={"data": c.data.model_copy(update={"cache_gb": 0.002})}), open_data(c), 1
    )
    assert "single images" not in line  # there is room for the shards
    least = working_set.working_set(c, open_data(c), 1).least_by_ranges
    [line] = working_set.check(c, open_data(c), 1)
    assert "so single images are read by ranges, with up to 120 requests an epoch" in line
    low = c.model_copy(update={"data": c.data.model_copy(update={"cache_gb": (least - 1) / 1e9})})
    with pytest.raises(
        UserError, match=rf"can be read by ranges from data\.cache_gb={least / 1e6:.0f}|cache_gb=0\.001 on"
    ):
        working_set.check(low, open_data(low), 1)


def test_failed_range_is_fetched_again_when_it_is_needed(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, verified = [], range_ahead.read_verified

    def failing(*arguments: object, urgent: bool) -> bytes:
        if len(failed) < 10:
            failed.append(arguments)
            raise ValueError("the library does not like it")
        return verified(*arguments, urgent=urgent)  # type: ignore[arg-type]

    monkeypatch.setattr(range_ahead, "read_verified", failing)
    local = list(read(config(many, tmp_path), epochs=1))
    assert same(local, list(read(narrow(f"file://{many}", tmp_path / "cache"), epochs=1)))
    assert len(failed) == 10


def test_neighbours_share_a_range() -> None:
    members = [Member(i, at, at + size, 0, 0) for i, at, size in
               ((0, 1024, 100), (1, 2048, 100), (3, 4096, 100), (4, 4096 + ranges.GAP + 200, 100), (1, 2560, 300))]  # fmt: skip
    assert [[m.start for m in group] for group in ranges.coalesce(reversed(members))] == [
        [1024, 2048, 2560], [4096], [4096 + ranges.GAP + 200]]  # fmt: skip


def test_ring_gives_no_byte_to_two_blocks(many: Path, tmp_path: Path) -> None:
    data = open_data(config(f"file://{many}", tmp_path))
    ring, generator, blocks = Ring(data.root, LEAST, None), torch.Generator().manual_seed(0), []
    for step in range(500):
        sizes = torch.randint(1, LEAST // 6, (3,), generator=generator).tolist()
        found = ring.allocate(sizes)
        if found is None:
            _, mark, _ = blocks.pop(0)
            ring.release(mark)
            continue
        places, mark = found
        for place_, size in zip(places, sizes, strict=True):
            ring.write(place_, bytes([step % 251]) * size)
        blocks.append((list(zip(places, sizes, strict=True)), mark, step % 251))
        for places_, _, value in blocks:
            assert all(set(ring.read(at, size)) == {value} for at, size in places_)
    assert ring.allocate([LEAST + 1]) is None
    assert room.Room(tmp_path, None).held() >= LEAST
    ring.close()
    assert room.Room(tmp_path, None).held() < LEAST


def test_empty_members_need_no_request(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("k", {"jpg": (512, 0), "cls": (1024, 1)}, {"jpg": 0, "cls": 7})
    assert [(m.start, m.stop) for m in ranges.members_of(entry, 0)] == [(1024, 1025)]
    manifest = small(many, tmp_path, 3)
    cache = shard_cache.ShardCache(manifest, by_ranges=True)
    found = read_ranges(monkeypatch)
    assert RangeReader(manifest, 0, cache, None).image(0, entry) == b""  # type: ignore[arg-type]
    assert not found
    cache.close()
