"""Steps that are skipped because of a NaN, and roll-backs after several of them."""

import itertools
import json
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.checkpoint import state_file, step_folders
from esvit_scale.data import manifest as manifests
from esvit_scale.data import stream
from esvit_scale.errors import Diverged
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.trainer import Trainer
from tests import tiny


def snapshot(trainer: Trainer) -> list[torch.Tensor]:
    e = trainer.engines
    moments = [v for p in e.partitions for k, v in sorted(e.optimizer.state[p.flat].items())]
    centers = list(trainer.objective.extra_state().values())
    return [t.clone() for t in [*(p.master for p in e.partitions), *e.teacher.values, *moments, *centers]]


@pytest.mark.parametrize("ds_config", ["zero0", "zero1", "zero2", "zero3"])
def test_nan_step_changes_no_state(tmp_path: Path, ds_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__ds_config=ds_config)
    world = worlds.start()
    try:
        data = manifests.load(Path(config.data.train))
        trainer = Trainer(config, world, Schedules(config, stream.steps_per_epoch(config, data)))
        batches = [
            stream.micro_batches(config, batch, world.device, trainer.engines.dtype)
            for batch in stream.batches(config, data, 0, 1, 0, 8)
        ]
        for batch in batches[:6]:
            assert trainer.train_step(batch).applied
        before = snapshot(trainer)
        real = trainer.objective.forward
        with monkeypatch.context() as patch:
            patch.setattr(trainer.objective, "forward", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
            assert not trainer.train_step(batches[6]).applied
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(trainer), strict=True))
        assert trainer.train_step(batches[7]).applied
        assert not all(torch.equal(a, b) for a, b in zip(before, snapshot(trainer), strict=True))
    finally:
        worlds.stop()


def poison(monkeypatch: pytest.MonkeyPatch, calls: Container[int]) -> list[int]:
    """Make the loss NaN in these calls of the objective, counted from 1; return the list of batches that are trained on."""
    from esvit_scale.objective.esvit import EsViT

    real_forward, count, batches = EsViT.forward, itertools.count(1), []
    real = stream.micro_batches

    def forward(self: Any, *arguments: Any) -> Any:
        loss, logs = real_forward(self, *arguments)
        return (loss * float("nan") if next(count) in calls else loss), logs

    def micro_batches(config: Any, batch: stream.Batch, *arguments: Any) -> list[stream.MicroBatch]:
        batches.append(batch.batch_index)
        return real(config, batch, *arguments)

    monkeypatch.setattr(EsViT, "forward", forward)
    monkeypatch.setattr(stream, "micro_batches", micro_batches)
    return batches


def test_rollback_continues_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 13 to 17 fail. The run goes back to step 10 and continues with batch 17."""
    batches = poison(monkeypatch, range(13, 18))
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__skips_before_rollback=5)
    assert pretraining.pretrain(config) == 0
    assert batches == list(range(27))
    rows = tiny.rows(config.run_path)
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(row["skipped_steps"] == 0 and math.isfinite(row["loss"]) for row in rows)
    summary = json.loads((config.run_path / "summary.json").read_text())
    assert (summary["data_offset"], summary["rollbacks"], summary["optimizer_step"]) == (7, 1, 20)
    cursor = state_file.read_state(step_folders.resolve(config.run_path))["cursor"]
    assert (cursor["step"], cursor["batch_index"], cursor["data_offset"]) == (20, 27, 7)
    named = read_rows(config.run_path / "quarantine.jsonl")
    assert [row["step"] for row in named] == [step for step in range(13, 18) for _ in range(8)]
    assert all(row["rolled_back"] and row["key"].startswith("image") for row in named)


def test_data_offset_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = poison(monkeypatch, range(13, 18))
    shards = tiny.shards(tmp_path / "shards")
    config = tiny.config(tmp_path / "run", shards, train__skips_before_rollback=5, train__checkpoint_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "stop_requested", lambda self: self.step == 16 and self.data_offset > 0
        )  # as a signal would
        assert pretraining.pretrain(config) == 0
    assert batches == list(range(21))  # back from step 17 to 12, and stopped at 16
    assert pretraining.pretrain(config) == 0
    assert batches[21:] == list(range(21, 25))


def test_nonfinite_state_is_rolled_back_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A moment of the optimizer becomes infinite at the last step, as by a flipped bit. The run rolls back and finishes."""
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"))
    real, spoiled = Trainer.train_step, []

    def train_step(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        result = real(trainer, *arguments, **options)
        if trainer.step == config.train.steps and not spoiled:
            partition = trainer.engines.partitions[3]
            spoiled.append(partition.name)
            moments = trainer.engines.optimizer.state[partition.flat]
            partition.within(moments["exp_avg_sq"])[0] = math.inf
        return result

    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert pretraining.pretrain(config) == 0
    said = (
        f"the state is not finite (exp_avg_sq/{spoiled[0]}) and was not saved: going back from step 20 to step-00000010"
    )
    assert said in (config.run_path / "log.txt").read_text()
    summary = json.loads((config.run_path / "summary.json").read_text())
    assert (summary["finished"], summary["step"], summary["rollbacks"]) == (True, 20, 1)


def test_one_nan_skips_one_step_and_quarantines_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = poison(monkeypatch, [7])
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"))
    assert pretraining.pretrain(config) == 0
    assert batches == list(range(20))
    assert tiny.rows(config.run_path)[-1]["skipped_steps"] == 1
    named = read_rows(config.run_path / "quarantine.jsonl")
    assert [row["step"] for row in named] == [7] * 8
    assert {row["reason"] for row in named} == {"the loss was not finite at this step"}


@pytest.mark.parametrize(("start", "words"), [(1, "before the first checkpoint"), (13, "after going back 2 times")])
def test_endless_nan_raises_diverged_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, words: str
) -> None:
    poison(monkeypatch, range(start, 1000))
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__skips_before_rollback=4)
    with pytest.raises(Diverged, match=rf"4 steps in a row, up to step .*{words}.*lower optim\.lr"):
        pretraining.pretrain(config)
    assert json.loads((config.run_path / "summary.json").read_text())["finished"] is False
