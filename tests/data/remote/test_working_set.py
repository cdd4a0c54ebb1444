"""What a cache must hold at once, found before the run."""

from pathlib import Path

import pytest

from esvit_scale.data import evaluation, stream
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.remote import place, room, working_set
from esvit_scale.data.remote.locks import ByteLocks
from esvit_scale.errors import UserError
from tests import tiny
from tests.data.remote.conftest import cached, config, read


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


def test_remote_held_out_images_beside_local_data_need_room(shards: Path, tmp_path: Path) -> None:
    held = f"file://{tiny.shards(tmp_path / 'held', samples=40)}"
    c = config(shards, tmp_path / "cache", held_out=held, cache_gb=1e-5)
    c = c.model_copy(update={"train": c.train.model_copy(update={"knn_every": 5})})
    with pytest.raises(UserError, match=r"of data\.held_out at a time: set data\.cache_gb=0\.\d+ or more"):
        working_set.check(c, stream.open_data(c), 1)
    wide = c.model_copy(update={"data": c.data.model_copy(update={"cache_gb": 0.001})})
    [line] = working_set.check(wide, stream.open_data(wide), 1)
    assert line.endswith("at most 0.001 GB, for data.held_out")


def test_nodes_that_compute_their_own_need_find_the_largest(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks on two nodes, whose slots read from different numbers of shards."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    c = config(f"file://{shards}", tmp_path, slots=4)
    data = stream.open_data(c)
    nodes = [working_set.of_own_node(c, data, rank, 4, 0) for rank in range(4)]
    assert [node is None for node in nodes] == [False, True, False, True]
    assert isinstance(data, Manifest)
    assert max(node.least for node in nodes if node) == working_set.working_set(c, data, 4).least
    assert working_set.check(c, data, 4, nodes) == working_set.check(c, data, 4)
    assert working_set.of_own_node(c, stream.open_data(config(shards, tmp_path)), 0, 4, 0) is None


def test_a_node_asks_nothing_of_a_store(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that answers one rank with an error would leave the others waiting."""
    held = f"file://{tiny.shards(tmp_path / 'held', samples=40)}"
    c = config(f"file://{shards}", tmp_path / "cache", held_out=held)
    c = c.model_copy(update={"train": c.train.model_copy(update={"knn_every": 5})})
    data, bytes_held = stream.open_data(c), working_set.held_out_bytes(c, 1)
    assert bytes_held > 0
    expected = working_set.working_set(c, data, 1)  # type: ignore[arg-type]

    def refuse(*given: object) -> None:
        raise AssertionError("opened a set")

    monkeypatch.setattr(working_set, "open_set", refuse)
    assert working_set.of_own_node(c, data, 0, 1, bytes_held) == expected
