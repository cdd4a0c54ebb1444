"""The shared memory that loader processes write batches to: equal batches, no copy, and no batch overwritten in use."""

import gc
import logging
import os

import pytest
import torch
from torch.utils.data import get_worker_info

from esvit_scale.data import stream
from esvit_scale.data.batch_memory import BatchMemory, places_for
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.stream import Batch, batches
from tests.data.conftest import config_with

PLACES = places_for(1, 1)
STEPS = 3 * PLACES


def crops(batch: Batch) -> list[torch.Tensor]:
    return [group.clone() for group in batch.crops]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_in_shared_memory_equal_sent_ones(
    shard_set: Manifest, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as in a run on a CPU, where batches are not copied
    config = config_with(workers=workers, slots=8)
    expected = [crops(batch) for batch in batches(config_with(slots=8), shard_set, 0, 1, 2, 2 + STEPS)]
    taken: list[int] = []
    take = BatchMemory.take
    monkeypatch.setattr(BatchMemory, "take", lambda self, index: taken.append(index) or take(self, index))
    found = [crops(batch) for batch in batches(config, shard_set, 0, 1, 2, 2 + STEPS)]
    assert taken == list(range(2, 2 + STEPS))  # every batch was written in place by all processes
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("sent_by", [None, 0], ids=["in place", "one part is sent"])
def test_batches_for_a_gpu_are_copied_from_shared_memory(
    shard_set: Manifest, workers: int, sent_by: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU the processes' rows are joined into page-locked memory, which a machine without one does not have."""
    expected = [crops(batch) for batch in batches(config_with(slots=8), shard_set, 0, 1, 2, 2 + STEPS)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(stream, "_concatenate", lambda parts, pin: torch.cat(parts, 1))
    claim, sources = BatchMemory.claim, set()
    refuses = lambda: (info := get_worker_info()) is not None and info.id == sent_by  # noqa: E731
    monkeypatch.setattr(BatchMemory, "claim", lambda self, *which: None if refuses() else claim(self, *which))
    join = stream._join_crops
    note = lambda parts, *rest: sources.update(bool(part.crops) for part in parts) or join(parts, *rest)  # noqa: E731
    monkeypatch.setattr(stream, "_join_crops", note)
    found = [crops(batch) for batch in batches(config_with(workers=workers, slots=8), shard_set, 0, 1, 2, 2 + STEPS)]
    assert sources == ({False} if sent_by is None else {True} if workers == 1 else {True, False})
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_that_are_kept_are_not_overwritten(shard_set: Manifest) -> None:
    """A view of one group keeps its memory, and the other batches are then sent."""
    expected = [crops(batch) for batch in batches(config_with(slots=8), shard_set, 0, 1, 0, STEPS)]
    kept = [
        batch.crops[1].flatten(0, 1)[1:]
        for batch in batches(config_with(workers=2, slots=8), shard_set, 0, 1, 0, STEPS)
    ]
    for view, groups in zip(kept, expected, strict=True):
        assert torch.equal(view, groups[1].flatten(0, 1)[1:])


def test_a_place_is_free_when_no_tensor_uses_its_memory() -> None:
    memory = BatchMemory([(2, 4, 6, 6, 3), (1, 4, 3, 3, 3)], torch.uint8, PLACES)
    first, second = memory.take(PLACES + 1)
    view = first.permute(0, 1, 4, 2, 3)[:1]
    assert memory.claim(1, slice(0, 2)) is None
    assert memory.claim(2, slice(0, 2)) is not None
    del first, second
    gc.collect()
    assert memory.claim(1, slice(0, 2)) is None  # the view still uses it
    if not (child := os.fork()):
        del view
        os._exit(0)
    os.waitpid(child, 0)
    assert memory.claim(1, slice(0, 2)) is None  # another process dropped its copy
    del view
    gc.collect()
    rows = memory.claim(1, slice(1, 3))
    assert rows is not None
    rows[0].fill_(7)
    assert memory.take(1)[0][:, 1:3].eq(7).all()


def test_without_room_for_the_memory_batches_are_sent(
    shard_set: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log of rank 0 says why."""
    caplog.set_level(logging.INFO, "esvit_scale")

    def full(*args: object) -> BatchMemory:
        raise RuntimeError("unable to allocate shared memory(shm)")

    expected = [crops(batch) for batch in batches(config_with(slots=8), shard_set, 0, 1, 0, 4)]
    monkeypatch.setattr(stream, "BatchMemory", full)
    found = [crops(batch) for batch in batches(config_with(workers=2, slots=8), shard_set, 0, 1, 0, 4)]
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    messages = [record.getMessage() for record in caplog.records]
    assert [m for m in messages if "(unable to allocate shared memory(shm))" in m and "sent and copied instead" in m]
