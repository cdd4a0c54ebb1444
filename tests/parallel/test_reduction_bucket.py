"""The buffer in which DeepSpeed reduces gradients has the network's size, unless the DeepSpeed file gives one."""

import gc
import json
from pathlib import Path

import pytest
import torch

from esvit_scale.parallel import ds_config
from esvit_scale.parallel import world as worlds
from esvit_scale.scaling import memory
from tests.train.test_not_finite import one_step, trainer_of


def file(folder: Path, **zero: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, **zero}}))
    return str(path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_buffer_is_larger_than_the_network(tmp_path: Path, stage: int) -> None:
    before = [
        t for t in gc.get_objects() if type(t) is torch.Tensor
    ]  # of other tests; held, so that their ids stay theirs
    others = {id(t) for t in before}
    trainer = trainer_of(tmp_path, train__ds_config=f"zero{stage}", train__precision="bf16")
    try:
        assert one_step(trainer, 0).applied
        network = memory.network_of(trainer.config)
        gc.collect()
        sizes = [
            t.numel()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and id(t) not in others and t.dtype == torch.bfloat16
        ]
        assert max(sizes) <= network.total + 64  # ZeRO's padding
        planned = memory.memory(trainer.config, network, stage, 1, "none")
        assert planned.buckets == 2 * network.total * (2 if stage == 3 else 1)  # at stage 3 with what it scatters
    finally:
        worlds.stop()


def test_a_size_in_the_file_stays_and_auto_is_fitted(tmp_path: Path) -> None:
    for given, expected in ((1000, 1000), ("auto", 70_000), (None, 70_000)):
        zero = {} if given is None else {"reduce_bucket_size": given}
        values = json.loads(Path(file(tmp_path, **zero)).read_text())
        ds_config.fit_reduction_bucket(values, 70_000)
        assert values["zero_optimization"]["reduce_bucket_size"] == expected
    assert ds_config.bucket_elements(3_000_000_000) == ds_config.BUCKET


def test_the_bucket_changes_no_number(tmp_path: Path) -> None:
    """A tiny bucket, which is reduced many times in a backward, and one of the network's size give the same weights."""
    found = []
    for zero in ({}, {"reduce_bucket_size": 5000}):
        trainer = trainer_of(tmp_path, train__ds_config=file(tmp_path, **zero))
        try:
            for step in range(3):
                one_step(trainer, 4 + step)
            found.append([p.master.clone() for p in trainer.engines.partitions])
        finally:
            worlds.stop()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
