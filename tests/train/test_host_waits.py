"""A training step makes the host wait for the device once, where it decides whether the optimizer steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from esvit_scale.train.signals import Flag
from esvit_scale.train.step_metrics import StepMetrics
from esvit_scale.train.trainer import Trainer
from tests import tiny
from tests.host_waits import HostWaits
from tests.train.test_not_finite import inject, one_step, trainer_of


def test_the_count_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with HostWaits() as waits:
        assert x.sum().item() == 6
        assert x.tolist()[1] == 1
        assert x.any()
        assert float(x[0]) == 0
        x.nonzero()
        x[x > 1]
        torch.tensor([1.0], device="cpu")
        x.fill_(x.sum())
    assert sorted(place.split(" at ")[0] for place in waits.places) == sorted(
        ["item", "tolist", "__bool__", "__float__", "nonzero", "mask as an index", "tensor"]
    )


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((0, "autocast"), (2, "bf16"), (3, "fp32"))]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16"), *SLOW])
def test_a_step_waits_once(tmp_path: Path, stage: int, precision: str) -> None:
    trainer = trainer_of(tmp_path, train__ds_config=f"zero{stage}", train__precision=precision)
    try:
        for step in range(4):  # at ZeRO 3, DeepSpeed records the order of parameters in the first steps
            one_step(trainer, step)
        with HostWaits() as waits:
            assert one_step(trainer, 4).applied
        # At ZeRO 3, DeepSpeed reads the norm that zero.py gives it: a 0 on the host, also where there is a GPU.
        of_device = [place for place in waits.places.elements() if stage < 3 or "__bool__ at utils.py" not in place]
        assert [place.split(":")[0] for place in of_device] == ["tolist at gradients.py"]
        assert waits.total <= 2
    finally:
        worlds.stop()


def test_flags_of_a_rank_come_back_with_the_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    try:
        assert one_step(trainer, 0, Flag.BAD_SAMPLES | Flag.TAKEN_OVER).flags == Flag.BAD_SAMPLES | Flag.TAKEN_OVER
        assert one_step(trainer, 1).flags == 0
    finally:
        worlds.stop()


def test_a_step_that_deepspeed_skips_has_no_flags(tmp_path: Path) -> None:
    """Where DeepSpeed clips, it looks for NaN itself and skips before the hooks run; the trainer then asks the ranks."""
    trainer = trainer_of(tmp_path, train__ds_config="zero2", optim__clip_by="global")
    try:
        inject(trainer, "trunk.norm.bias", float("nan"))
        result = one_step(trainer, 4, Flag.SAVE_NOW)
        assert (result.applied, result.flags) == (False, None)
    finally:
        worlds.stop()


def test_a_row_is_read_one_step_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for nothing while a row is begun; it is read after the next step, and before a save."""
    events: list[str] = []
    begin, finish, step, save = StepMetrics.begin_row, StepMetrics.finish_row, Trainer.train_step, Trainer._save

    def begun(metrics: StepMetrics, number: int, *rest: Any, **fields: Any) -> None:
        with HostWaits() as waits:
            begin(metrics, number, *rest, **fields)
        assert waits.total == 0, waits.places
        events.append(f"begin {number}")

    def finished(metrics: StepMetrics) -> Any:
        found = finish(metrics)
        if found:
            events.append(f"row {found[0]['step']}")
        return found

    def stepped(trainer: Trainer, *rest: Any) -> Any:
        result = step(trainer, *rest)
        events.append(f"step {trainer.step}")
        return result

    def saved(trainer: Trainer) -> None:
        save(trainer)
        events.append(f"save {trainer.step}")

    for owner, name, new in (
        (StepMetrics, "begin_row", begun),
        (StepMetrics, "finish_row", finished),
        (Trainer, "train_step", stepped),
        (Trainer, "_save", saved),
    ):
        monkeypatch.setattr(owner, name, new)
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "s"), train__steps=4, train__log_every=2)
    assert pretraining.pretrain(config) == 0
    assert events[:6] == ["step 1", "step 2", "begin 2", "step 3", "row 2", "step 4"]
    assert events[6:9] == ["begin 4", "row 4", "save 4"]
    assert [row["step"] for row in tiny.rows(config.run_path)] == [2, 4]
