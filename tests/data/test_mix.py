"""Mixed shard sets: every sample of every set as often as its weight says, the same at any world size and from any start."""

import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_scale.config import Config, validate
from esvit_scale.data import manifest as manifests
from esvit_scale.data import mix
from esvit_scale.data.identity import identity
from esvit_scale.data.loader import LoaderAssignment
from esvit_scale.data.mix import MixedOrder, MixedSets
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.data.stream import Batch, batches, images_of_sets, open_data, steps_per_epoch
from esvit_scale.errors import UserError
from tests.data.conftest import config_with, encoded, picture
from tests.data.test_order import joined

GOLDEN = [(0, 0, 0), (1, 0, 0), (0, 0, 6), (0, 0, 7), (0, 1, 1), (0, 1, 2), (0, 1, 8), (1, 3, 0)]


def weights_of(*weights: float) -> list[Fraction]:
    return [Fraction(repr(float(weight))) for weight in weights]


shard_counts = st.lists(st.integers(1, 9), min_size=1, max_size=4)
shapes = st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (12, 12)])


@settings(max_examples=60, deadline=None)
@given(
    sets=st.lists(st.tuples(st.sampled_from([0.5, 1, 2, 3, 0.1, 7.25]), shard_counts), min_size=1, max_size=4),
    shape=shapes,
    steps=st.integers(1, 9),
    seed=st.integers(0, 2**40),
)
def test_each_set_repeats_only_after_all_its_samples(
    sets: list[tuple[float, list[int]]], shape: tuple[int, int], steps: int, seed: int
) -> None:
    """Over several epochs of the mix, the draws of a set are its epochs one after the other, each a permutation of its
    samples, and their numbers are those that the weights ask for."""
    batch, slots = shape
    given_sets = [(Fraction(repr(weight)), counts) for weight, counts in sets]
    order = MixedOrder(seed, given_sets, steps, batch, slots, 2)
    epochs, drawn = 3, Counter[tuple[int, int, int, int]]()
    for index in range(epochs * steps):
        for slot in range(slots):
            for i in range(batch // slots):
                number, epoch, position, of_set = order.address(index, slot, i)
                drawn[(number, epoch, *of_set.locate(position))] += 1
        counted = [sum(n for (k, *_), n in drawn.items() if k == number) for number in range(len(sets))]
        assert counted == order.images(index + 1)
    assert set(drawn.values()) == {1}
    whole = sum(weight for weight, _ in given_sets)
    for number, (weight, counts) in enumerate(given_sets):
        images, full = order.images(epochs * steps)[number], sum(counts)
        of_epochs = Counter(epoch for k, epoch, *_ in drawn if k == number)
        assert of_epochs == {e: min(full, images - e * full) for e in range(-(-images // full))}
        assert abs(images / epochs - float(weight / whole) * steps * batch) <= len(sets) + slots / 2


def test_batches_keep_the_weights() -> None:
    """Two sets of very different size and weight: every batch holds its share, to within an image."""
    sets = [(w, [1000] * n) for w, n in zip(weights_of(3, 1), (1000, 1), strict=True)]
    order = MixedOrder(0, sets, 5000, 64, 32, 8)
    for index in (0, 1, 777, 4999, 123_456):
        sources = Counter(order.address(index, slot, i).set for slot in range(32) for i in range(2))
        assert abs(sources[1] - 16) <= 2
        of_ranks = [
            Counter(order.address(index, slot, i).set for slot in range(r * 8, r * 8 + 8) for i in range(2))
            for r in range(4)
        ]
        assert all(counts[0] for counts in of_ranks)
    assert order.images(5000) == [240_000, 80_000]


def test_order_equals_that_of_the_first_release() -> None:
    """A run resumed by a later version must see the same data: these numbers may never change."""
    order = MixedOrder(7, list(zip(weights_of(3, 1), ([3, 5, 4], [2]), strict=True)), 4, 4, 2, 2)
    assert [order.address(t, slot, i)[:3] for t in (0, 5) for slot in range(2) for i in range(2)] == GOLDEN


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(shard_counts, min_size=2, max_size=3),
    slots=st.sampled_from([1, 2, 4, 8]),
    world=st.sampled_from([1, 2, 4, 8]),
    workers=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 30),
)
def test_batches_are_equal_for_any_ranks_workers_and_start(
    counts: list[list[int]], slots: int, world: int, workers: int, seed: int, start: int
) -> None:
    sets = list(zip(weights_of(3, 1, 0.4)[: len(counts)], counts, strict=True))
    config = config_with(seed=seed, slots=slots, workers=workers)
    steps = 5
    reference, again = (MixedOrder(seed, sets, steps, 8, slots, 2) for _ in range(2))
    span = range(start, start + 3)
    whole = [[reference.address(t, s, i)[:3] for s in range(slots) for i in range(8 // slots)] for t in span]
    parts: list[list[tuple[int, ...]]] = [[] for _ in span]
    for rank in range(world):
        for t, images in joined(LoaderAssignment(config, rank, world, start, start + 3, steps), workers):
            parts[t - start] += [again.address(t, *divmod(n, 8 // slots))[:3] for n in images]
    assert parts == whole


def test_large_mixes_use_little_memory() -> None:
    """One billion samples in 100,000 shards beside a set that goes round 50,000 times."""
    sets = list(zip(weights_of(9, 1), ([10_000] * 100_000, [100] * 20), strict=True))
    order = MixedOrder(0, sets, 10**9 // 4096, 4096, 512, 8)
    for slot in range(0, 512, 8):
        order.address(123_456, slot, 3)
    assert sum(len(order._counts[k]) for k, _ in order._orders) <= mix.CACHED_SHARDS
    assert sum(chunk.nbytes for chunk in order._chunks.values()) <= 9 << 20


# --- the real stream -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`large`: 41 samples in shards of 6; `small`: 5 samples in shards of 2. Read them only."""
    root = tmp_path_factory.mktemp("mixed")
    for name, count, per_shard in (("large", 41, 6), ("small", 5, 2)):
        samples = [Sample(f"{name}{i:03d}", i % 3, "png", encoded(picture(len(name) * 100 + i))) for i in range(count)]
        write_samples(samples, root / name, ("a", "b", "c"), per_shard)
    return root


def config_of(
    root: Path, weights: tuple[float, float] = (3, 1), workers: int = 0, small: str = "", **data: Any
) -> Config:
    urls = (str(root / "large"), small or str(root / "small"))
    mixed = [{"urls": url, "weight": weight} for url, weight in zip(urls, weights, strict=True)]
    crops = {"global_crops": {"size": 8}, "local_crops": [{"size": 6, "count": 1}], "shuffle_window": 2}
    values = {"data": {"workers": workers, "mix": mixed, **crops, **data}, "train": {"global_batch": 8}}
    return validate(values, "test")


def stream(config: Config, start: int, stop: int, world: int = 1) -> list[Batch]:
    ranks = [list(batches(config, open_data(config), rank, world, start, stop)) for rank in range(world)]
    return [
        parts[0]._replace(
            keys=[key for part in parts for key in part.keys],
            crops=[torch.cat(crops, 1) for crops in zip(*(part.crops for part in parts), strict=True)],
            bad=[row for part in parts for row in part.bad],
        )
        for parts in zip(*ranks, strict=True)
    ]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return [x.keys for x in a] == [x.keys for x in b] and all(
        torch.equal(c, d) for x, y in zip(a, b, strict=True) for c, d in zip(x.crops, y.crops, strict=True)
    )


def test_mixed_batches_are_equal_at_any_world_size_and_step(sets: Path) -> None:
    config = config_of(sets)
    assert steps_per_epoch(config, open_data(config)) == 46 // 8
    run = stream(config, 0, 12)
    for start, stop, world, workers in ((0, 12, 2, 0), (4, 12, 4, 0), (7, 12, 2, 2), (11, 12, 8, 0)):
        assert same(stream(config_of(sets, workers=workers), start, stop, world), run[start:stop])


def test_sets_are_drawn_by_weight_and_repeated(sets: Path) -> None:
    config = config_of(sets, epoch_samples=80)
    run, count = stream(config, 0, 20), images_of_sets(config, open_data(config))  # two epochs
    keys = [key for batch in run for key in batch.keys]
    drawn = Counter(key.rstrip("0123456789") for key in keys)
    assert drawn == count(20)
    assert abs(drawn["small"] - 40) <= 2
    for name, size in (("large", 41), ("small", 5)):
        times = Counter(key for key in keys if key.startswith(name))
        assert len(times) == size
        assert set(times.values()) <= {drawn[name] // size, drawn[name] // size + 1}
    twice = [(b, b.keys.index("small000")) for b in run if "small000" in b.keys]
    assert not torch.equal(*(b.crops[0][:, i] for b, i in twice[:2]))  # other crops when a set comes by again


def test_bad_sample_is_replaced_within_its_set(sets: Path, tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    for name in ("large", "small"):
        (root / name).mkdir(parents=True)
        for path in (sets / name).iterdir():
            (root / name / path.name).write_bytes(path.read_bytes())
    shard = root / "small" / "shard-000001.tar"
    offset, size = next(iter(manifests.read_index(shard))).members["png"]
    content = bytearray(shard.read_bytes())
    content[offset : offset + size] = bytes(size)
    shard.write_bytes(content)
    good, bad = stream(config_of(sets), 0, 5), stream(config_of(root), 0, 5)
    rows = [row for batch in bad for row in batch.bad]
    assert {row["shard"] for row in rows} == {"small/shard-000001.tar"}
    changed = [(x, y) for a, b in zip(good, bad, strict=True) for x, y in zip(a.keys, b.keys, strict=True) if x != y]
    assert len(changed) == len(rows)
    assert all(x == rows[0]["key"] and y.startswith("small") for x, y in changed)
    assert same(stream(config_of(root), 2, 5, world=2), bad[2:])


def test_identity_of_a_mix_depends_on_contents_and_weights(sets: Path, tmp_path: Path) -> None:
    def of(**more: Any) -> str:
        return identity(open_data(config_of(sets, **more)))["sha256"]

    assert of() == of(workers=3)
    assert len({of(), of(weights=(3, 2)), of(epoch_samples=80)}) == 3
    assert "7 shards, 41 samples and 3 shards, 5 samples, mixed, 46 an epoch" in str(
        identity(open_data(config_of(sets)))
    )


def refusals(sets: Path) -> Iterator[tuple[Config, str]]:
    yield config_of(sets, train=str(sets / "large")), r"data\.mix: data\.train is set too"
    yield (
        config_of(sets, weights=(1e6, 1e-6)),
        r"data\.mix: small has 1e-12 of the total weight, too little for one of an epoch's 40",
    )
    yield config_of(sets, epoch_samples=7), r"train\.global_batch: 8 images, but the set holds 7 samples"


@pytest.mark.parametrize("n", range(3))
def test_invalid_mixes_are_errors_that_name_the_remedy(sets: Path, n: int) -> None:
    config, says = next(islice(refusals(sets), n, None))
    with pytest.raises(UserError, match=says):
        batches(config, open_data(config), 0, 1, 0, 1)


def test_incomplete_set_is_named(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "manifest.json").write_bytes((sets / "small" / "manifest.json").read_bytes())
    config = config_of(sets, small=str(tmp_path / "small"))
    with pytest.raises(UserError, match=r"small/shard-000000\.tar: No such file"):
        open_data(config)
    with pytest.raises(UserError, match=r"smal: no such shard folder; shard sets in .*: large, small"):
        open_data(config_of(sets, small=str(sets / "smal")))
    raw = json.loads((sets / "small" / "manifest.json").read_text()) | {"shards": [], "samples": 0}
    (tmp_path / "small" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="small holds no samples; leave it out"):
        open_data(config)


def test_set_with_other_channels_is_named(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "four").mkdir()
    raw = json.loads((sets / "small" / "manifest.json").read_text())
    raw["options"] = {"recipe": {"channels": 4, "bits": 8}}
    raw["channels"] = 4
    (tmp_path / "four" / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"four: its images have 4 channels"):
        open_data(config_of(sets, small=str(tmp_path / "four")))


def test_set_mixed_with_plain_tars_is_read_as_tars(sets: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(sets, epoch_samples=16, small=str(sets / "small" / "shard-00000{0..2}.tar"))
    assert not MixedSets.wanted(config.data)
    (batch,) = stream(config, 0, 1)
    assert len(batch.keys) == 8
    assert "large is a shard set, but it is mixed with plain tars and therefore streamed like them" in caplog.text


def test_sets_of_the_same_name_get_distinct_names(sets: Path) -> None:
    config = config_of(sets, small=str(sets / "large"))
    data = open_data(config)
    assert isinstance(data, MixedSets)
    assert [one.name for one in data.sets] == ["large", "large-2"]
    moved = data.moved(lambda manifest: manifest)
    assert moved == data
    assert np.sum(list(images_of_sets(config, data)(5).values())) == 40
