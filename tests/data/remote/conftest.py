"""A small shard set, its copy in a store, and readers of both: fsspec's local file system stands for the store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import stream
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.remote import place, room, shard_cache, store
from esvit_scale.data.remote.store import Store
from tests import tiny


@pytest.fixture(scope="session")
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


def check_joined(whole: list[stream.Batch], ranks: list[list[stream.Batch]]) -> None:
    """Check that the batches of several ranks together are those of a single one."""
    for one, *parts in zip(whole, *ranks, strict=True):
        assert one.keys == [key for part in parts for key in part.keys]
        for group, *shares in zip(one.crops, *(part.crops for part in parts), strict=True):
            assert torch.equal(group, torch.cat(shares, 1))


class Counted:
    """The transfers of this process, counted by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        fetch = Store.fetch

        def counted(of: Store, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
            self.names.append(name)
            fetch(of, name, target, urgent=urgent, most=most)

        monkeypatch.setattr(Store, "fetch", counted)


def remote_copy(shards: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "bucket"
    copy.mkdir()
    for path in shards.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def small(shards: Path, cache: Path, count: float) -> Manifest:
    """The set's manifest with a cache that has room for `count` shards."""
    limit = (count * max(map(room.cost, manifests.load(shards).shards)) + 2048) / 1e9  # the manifest counts, too
    return place.open_set(f"file://{shards}", config("", cache, cache_gb=limit).data)


def cached(manifest: Manifest) -> set[int]:
    return {int(path.stem[-6:]) for path in manifest.root.glob("*.tar")}
