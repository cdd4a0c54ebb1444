"""The schedule of a rank's slots names every shard that a batch reads."""

from pathlib import Path

import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data import mix, stream
from esvit_scale.data.order import Order
from esvit_scale.data.remote.schedule import Schedule
from tests import tiny
from tests.data.remote.conftest import config


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
