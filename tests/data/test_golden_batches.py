"""Which sample stands where in which batch, against digests of the version before a rank's images were divided.

A run that a later version resumes must go on with the same batches: these digests may never change. Those of plain tars
depend on the number of ranks and loader processes, the others do not.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.config import Config, validate
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.data.stream import batches, open_data
from tests.data.conftest import encoded, picture
from tests.data.test_url_stream import write_tar

SHARD_SET = {
    2: "a4fff7be28af056f",
    4: "96683dd1ada7ceb3",
    8: "c632f4b24f82d543",
    24: "f7e8c06d359a0398",
}  # by data.slots
MIX = "243c56fdd0eb8e33"
TARS = {  # by ranks, workers, data.slots
    (1, 3, 4): "56e3e185aaa91112",
    (1, 5, 3): "c41c1933dd1cbbcb",
    (2, 3, 8): "5cb6b8772e3e17ee",
    (2, 2, None): "98f8a48c47a663c5",
}


def config_of(workers: int, slots: int | None, **data: Any) -> Config:
    crops = {"global_crops": {"size": 8}, "local_crops": [{"size": 6, "count": 1}]}
    values = {"workers": workers, "slots": slots, "shuffle_window": 2, **crops, **data}
    return validate({"seed": 5, "data": values, "train": {"global_batch": 24}}, "test")


def digest(config: Config, world: int, start: int, stop: int) -> str:
    ranks = [list(batches(config, open_data(config), rank, world, start, stop)) for rank in range(world)]
    rows = [
        [(key, int(position)) for part in parts for key, position in zip(part.keys, part.positions, strict=True)]
        for parts in zip(*ranks, strict=True)
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize("slots", SHARD_SET)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (24, 0), (8, 2)])
def test_batches_of_a_shard_set(shard_set: Manifest, slots: int, world: int, workers: int) -> None:
    """Also at world sizes that do not divide the slots, which that version refused."""
    if workers and slots > 2:
        pytest.skip("one test with processes is enough")
    assert digest(config_of(workers, slots, train=str(shard_set.root)), world, 1, 6) == SHARD_SET[slots]


def test_batches_of_a_mix(shard_set: Manifest, tmp_path: Path) -> None:
    samples = (Sample(f"other{i:02d}", None, "png", encoded(picture(i))) for i in range(17))
    other = write_samples(samples, tmp_path / "other", samples_per_shard=5)
    mix = [{"urls": str(shard_set.root), "weight": 3}, {"urls": str(other.root), "weight": 2}]
    assert digest(config_of(0, 8, mix=mix), 2, 1, 6) == MIX


@pytest.mark.parametrize(("world", "workers", "slots"), TARS)
def test_batches_of_plain_tars(tmp_path: Path, world: int, workers: int, slots: int | None) -> None:
    for t in range(8):
        write_tar(tmp_path / f"{t}.tar", {f"{t}_{i}": encoded(picture(100 * t + i)) for i in range(10)})
    config = config_of(workers, slots, train=f"{tmp_path}/{{0..7}}.tar", epoch_samples=80)
    assert digest(config, world, 1, 6) == TARS[world, workers, slots]
