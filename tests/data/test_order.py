"""Every sample once an epoch, the same global batch at any world size, resume anywhere: by exhaustive loops."""

import time
import tracemalloc
from collections import Counter
from itertools import zip_longest
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_scale.data import manifest as manifests
from esvit_scale.data import order as orders
from esvit_scale.data import stream
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.order import Order, permutation, steps_per_epoch
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.errors import UserError
from tests.data.conftest import config_with, encoded, picture

GOLDEN = [(1, 2), (1, 3), (2, 2), (2, 1), (2, 0), (1, 4), (2, 3), (1, 1), (1, 0), (0, 0), (0, 2), (0, 1)]
GOLDEN_SUBSTITUTES = [9, 4, 2, 11]


def global_batch_at(order: Order, step: int, batch: int, slots: int) -> list[tuple[int, int]]:
    return [order.locate(order.position(step, s, i)) for s in range(slots) for i in range(batch // slots)]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 13), min_size=1, max_size=9),
    shape=st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (12, 4), (12, 12)]),
    window=st.integers(1, 10),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_every_sample_but_the_dropped_tail_comes_once(
    counts: list[int], shape: tuple[int, int], window: int, seed: int, epoch: int
) -> None:
    batch, slots = shape
    total = sum(counts)
    if total < batch:
        with pytest.raises(UserError, match="global_batch"):
            Order(seed, epoch, counts, batch, slots, window)
        return
    order = Order(seed, epoch, counts, batch, slots, window)
    seen = [place for t in range(order.steps) for place in global_batch_at(order, t, batch, slots)]
    everything = {(shard, i) for shard, n in enumerate(counts) for i in range(n)}
    assert order.steps == total // batch
    assert len(seen) == len(set(seen)) == total - total % batch
    dropped = {order.locate(p) for p in range(order.steps * batch, total)}
    assert len(dropped) == total % batch
    assert set(seen) | dropped == everything


def test_slot_reads_a_contiguous_range_of_positions() -> None:
    order = Order(0, 0, [10, 10, 5], 6, 3, 2)  # N = 25, T = 4, L = 8
    for slot in range(3):
        positions = [order.position(t, slot, i) for t in range(order.steps) for i in range(2)]
        assert positions == list(range(slot * 8, slot * 8 + 8))


def test_shuffled_within_windows_of_shards() -> None:
    order = Order(3, 1, [50] * 12, 10, 1, 3)
    shards = [order.locate(p)[0] for p in range(600)]
    windows = [set(shards[w * 150 : (w + 1) * 150]) for w in range(4)]
    assert [len(w) for w in windows] == [3, 3, 3, 3]
    assert set.union(*windows) == set(range(12))
    assert len({tuple(shards[i : i + 3]) for i in range(0, 150, 3)}) > 10  # mixed, not shard after shard


def test_epochs_and_seeds_differ() -> None:
    orders = [Order(seed, epoch, [40] * 4, 8, 2, 2) for seed in (0, 1) for epoch in (0, 1)]
    sequences = [tuple(o.locate(p) for p in range(160)) for o in orders]
    assert len(set(sequences)) == 4


def test_order_equals_that_of_the_first_release() -> None:
    """A run resumed by a later version must see the same data: these numbers may never change."""
    order = Order(7, 2, [3, 5, 4], 4, 2, 2)
    assert [order.locate(p) for p in range(12)] == GOLDEN
    assert [order.substitute(5, a) for a in range(4)] == GOLDEN_SUBSTITUTES


def test_permutation_is_uniform() -> None:
    first = np.array([permutation(5, seed, "x") for seed in range(4000)])
    assert (np.sort(first, axis=1) == np.arange(5)).all()
    for column in first.T:
        assert np.abs(np.bincount(column, minlength=5) - 800).max() < 120  # 4.7 standard deviations


@pytest.mark.parametrize("n", [0, 1, 2])
def test_tiny_permutations_are_bijections(n: int) -> None:
    assert sorted(permutation(n, 0)) == list(range(n))


def test_substitutes_are_other_positions_and_pure() -> None:
    order = Order(0, 0, [10] * 10, 10, 5, 4)
    drawn = {(p, a): order.substitute(p, a) for p in range(100) for a in range(8)}
    assert all(0 <= q < 100 and q != p for (p, _), q in drawn.items())
    again = Order(0, 0, [10] * 10, 10, 5, 4)
    assert all(again.substitute(p, a) == q for (p, a), q in reversed(drawn.items()))
    assert len(set(drawn.values())) == 100


def test_errors_name_the_nearest_valid_value() -> None:
    with pytest.raises(UserError, match=r"set train\.global_batch=7 or less"):
        steps_per_epoch(7, 8)
    with pytest.raises(UserError, match=r"data\.slots: 3 slots do not divide"):
        Order(0, 0, [20], 8, 3, 1)
    with pytest.raises(IndexError):
        Order(0, 0, [20], 8, 2, 1).locate(20)


@pytest.mark.parametrize(("shards", "per_shard"), [(10_000, 1_000), (100_000, 10_000)], ids=["10 M", "1 B"])
def test_large_sets_use_little_memory(shards: int, per_shard: int) -> None:
    """State is O(shards); a window is shuffled when it is read. With 64 slots of a process in as many windows, as 8
    workers of a lone rank have."""
    counts = np.full(shards, per_shard)
    tracemalloc.start()
    start = time.process_time()
    order = Order(0, 0, counts, 4096, 512, 8)
    for slot in range(64):
        order.locate(order.position(100, slot, 0))
    seconds = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.samples == shards * per_shard
    assert peak < 50e6
    assert seconds < 1


def test_sequential_reads_compute_each_window_once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 slots in one process, each in its own window: a window is permuted once per chunk, not once per sample."""
    order = Order(0, 0, np.full(1024, 1000), 512, 512, 2)
    made = []
    real = orders.permutation
    monkeypatch.setattr(orders, "permutation", lambda *a: made.append(a) or real(*a))
    for step in range(40):
        for slot in range(512):
            order.locate(order.position(step, slot, 0))
    assert len(made) <= 3 * 512


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    slots=st.sampled_from([1, 2, 3, 4, 6, 12]),
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    workers=st.integers(1, 7),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 50),
    data=st.data(),
)
def test_batches_are_equal_for_any_ranks_workers_and_start(
    counts: list[int], slots: int, world: int, workers: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    """The parts of every (rank, worker), joined as the loader yields them, against the global batches; the run is cut at
    a random step and goes on at another world size."""
    batch = 12
    if sum(counts) < batch:
        return
    order = Order(seed, epoch, counts, batch, slots, 2)
    whole = [global_batch_at(order, t, batch, slots) for t in range(order.steps)]
    start = data.draw(st.integers(0, order.steps - 1))
    config = config_with(seed=seed, slots=slots, workers=workers, batch=batch)
    again = Order(seed, epoch, counts, batch, slots, 2)
    found: list[list[tuple[int, int]]] = [[] for _ in whole]
    for rank in range(world):
        assignment = LoaderAssignment(config, rank, world, start, order.steps, order.steps)
        for t, images in joined(assignment, workers):
            found[t] += [again.locate(again.position(t, *divmod(n, batch // slots))) for n in images]
    assert found[start:] == whole[start:]


def joined(assignment: LoaderAssignment, workers: int) -> list[tuple[int, range]]:
    """The parts of all workers of a rank, one of each in turn, as a loader yields them."""
    made = []
    for worker in range(workers):
        with patch.object(LoaderAssignment, "worker", lambda self: (worker, workers)):  # noqa: B023 (called here)
            made.append(list(assignment.parts_of_worker()))
            used = {slot for _, images in made[-1] for slot in assignment.slots_of(images)}
            assert used <= set(assignment.slots_of_worker())
    return [part for turn in zip_longest(*made) for part in turn if part is not None]


@pytest.mark.parametrize(
    ("world", "batch"), [(8, 512), (64, 512), (512, 512), (512, 4096), (4096, 4096), (4096, 32768)]
)
@pytest.mark.parametrize("workers", [1, 8, 12])
def test_every_requested_worker_is_used(world: int, batch: int, workers: int) -> None:
    """With default slots, which are at most 512: all workers make images, and equally many, over some batches."""
    config, batches = config_with(batch=batch, workers=workers), 24
    assert config.slots == 512
    for rank in (0, world // 3, world - 1):
        assignment = LoaderAssignment(config, rank, world, 7, 7 + batches, 10**6)
        made = Counter[int]()
        for worker in range(workers):
            with patch.object(LoaderAssignment, "worker", lambda self: (worker, workers)):  # noqa: B023 (called here)
                made[worker] = sum(len(images) for _, images in assignment.parts_of_worker())
        assert sum(made.values()) == batches * batch // world
        per_batch = batch // world / workers  # of a worker, on average
        assert all(abs(images / batches - per_batch) < 1 for images in made.values())
        assert min(made.values()) > 0


def test_example_in_stream_docstring_is_true() -> None:
    order, text = Order(0, 0, [4, 4, 2], 4, 4, 2), stream.__doc__ or ""
    samples = ["{}/{}".format(*order.locate(position)) for position in range(10)]
    (row,) = (line for line in text.splitlines() if line.strip().startswith("sample    1/0"))
    assert row.split()[1:] == samples
    for step in range(order.steps):
        drawn = [samples[order.position(step, slot, 0)] for slot in range(4)]
        assert any(line.split() == ["batch", str(step), *drawn] for line in text.splitlines())


def test_resume_on_a_thousand_shards_starts_at_once(tmp_path: Path) -> None:
    """From the manifest on disk to the first batch of a late epoch: 2 s at most (its processes' start apart)."""
    one = write_samples((Sample(f"s{i}", None, "png", encoded(picture(i))) for i in range(4)), tmp_path / "set", (), 4)
    (first,) = one.shards
    shards = [first._replace(name=f"copy-{i:04d}.tar") for i in range(1000)]
    index = manifests.index_path(one.root / first.name).read_text()
    for shard in shards:
        (one.root / shard.name).hardlink_to(one.root / first.name)
        manifests.index_path(one.root / shard.name).write_text(index.replace(first.name, shard.name))
    (one.root / manifests.MANIFEST).write_bytes(manifests.dump(shards, (), "", "test"))
    config = config_with(train=str(tmp_path / "set"))
    start = time.process_time()
    (batch,) = stream.batches(config, stream.open_data(config), 0, 1, 500 * 37 + 123, 500 * 37 + 124)
    assert time.process_time() - start < 2
    assert len(batch.keys) == 8
