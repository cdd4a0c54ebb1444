"""A NaN or an infinity anywhere skips the step and changes no state, at every ZeRO stage and precision, with and without
DeepSpeed's own checks."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit_scale.data.stream import MicroBatch
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import engine
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel.zero import local_tensors
from esvit_scale.train.signals import Flag
from esvit_scale.train.step_metrics import StepResult
from esvit_scale.train.trainer import Trainer
from tests import tiny

FAULTS: dict[str, tuple[str, float]] = {
    # The name of the parameter whose gradient is hit, or "loss", and the value.
    "NaN in the first group": ("trunk.patch_embed.proj.weight", float("nan")),
    "infinity in one bias, in another group": ("trunk.norm.bias", float("inf")),
    "NaN in the last group": ("objective.region_head.last_layer.weight_v", float("nan")),
    "loss NaN, gradients finite": ("loss", float("nan")),
    "loss infinite, gradients finite": ("loss", float("-inf")),
}


def trainer_of(tmp_path: Path, **overrides: Any) -> Trainer:
    config = tiny.config(tmp_path / "run", tmp_path, **overrides)
    return Trainer(config, worlds.start(), Schedules(config, steps_per_epoch=4))


def one_step(trainer: Trainer, step: int, flags: int = 0) -> StepResult:
    """Take a step on noise, which depends only on step and rank; `flags` are this rank's."""
    generator, accum = torch.Generator().manual_seed(step + 1000 * trainer.world.rank), trainer.config.train.grad_accum
    images = trainer.config.train.global_batch // accum // trainer.world.size
    micro = [
        MicroBatch(
            [
                torch.randn(n * images, 3, size, size, generator=generator).to(trainer.engines.dtype)
                for n, size in ((2, 32), (4, 16))
            ],
            torch.arange(images) + images * (accum * trainer.world.rank + i),
        )
        for i in range(accum)
    ]
    trainer.step = step
    return trainer.train_step(micro, flags=lambda: Flag(flags))


def everything(trainer: Trainer) -> list[Tensor]:
    e = trainer.engines
    moments = [v for p in e.partitions for _, v in sorted(e.optimizer.state[p.flat].items())]
    working = local_tensors(e.student.module.parameters())
    kept = [*(p.master for p in e.partitions), *e.teacher.values, *moments, *trainer.objective.extra_state().values()]
    return [t.detach().clone() for t in [*kept, *working]]


def blind_deepspeed(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off DeepSpeed's checks for NaN, which older versions lack and a config file can disable."""
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (stage3, stage_1_and_2):
        monkeypatch.setattr(module, "is_invalid_grad_norm", lambda norm: False)
    with suppress(AttributeError):
        monkeypatch.setattr(trainer.engines.student.optimizer, "check_grad_overflow", False)


def inject(trainer: Trainer, where: str, value: float) -> Callable[[], None]:
    """Add `value` to the loss or to a gradient from now on; return the function that removes it again."""
    network = trainer.engines.student.module
    if where == "loss":
        real = network.objective.forward

        def forward(*arguments: Any) -> Any:
            loss, logs = real(*arguments)
            return loss + torch.full_like(loss, value), logs  # its gradient is the loss's

        network.objective.forward = forward
        return lambda: network.objective.__dict__.pop("forward")
    parameter = dict(network.named_parameters())[where]

    def spoil(grad: Tensor) -> Tensor:
        spoiled = grad.clone()
        spoiled.view(-1)[-1] = value
        return spoiled

    return parameter.register_hook(spoil).remove


ALL = [(s, p, a) for s in range(4) for p, a in (("fp32", 1), ("autocast", 2), ("bf16", 1), ("bf16", 2))]
QUICK = [(0, "autocast", 2), (1, "bf16", 1), (2, "fp32", 1), (3, "bf16", 2)]
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in ALL
    if case[:2] != (0, "bf16")  # which is refused
]


@pytest.mark.parametrize(("stage", "precision", "accum"), CASES)
def test_nonfinite_loss_or_gradient_changes_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str, accum: int
) -> None:
    trainer = trainer_of(tmp_path, train__ds_config=f"zero{stage}", train__precision=precision, train__grad_accum=accum)
    try:
        blind_deepspeed(trainer, monkeypatch)
        step = 4  # after the epoch in which the last layer is frozen
        for fault, (where, value) in FAULTS.items():
            assert one_step(trainer, step).applied
            before = everything(trainer)
            remove = inject(trainer, where, value)
            assert not one_step(trainer, step + 1).applied, fault
            remove()
            assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True)), fault
            step += 2
        assert one_step(trainer, step).applied
        assert all(torch.isfinite(t).all() for t in everything(trainer))
    finally:
        worlds.stop()


@pytest.mark.parametrize(
    ("stage", "precision"), [(3, "bf16"), *[pytest.param(s, "fp32", marks=pytest.mark.slow) for s in range(3)]]
)
def test_nonfinite_gradient_changes_no_state_of_muon(tmp_path: Path, stage: int, precision: str) -> None:
    trainer = trainer_of(tmp_path, optim__name="muon", train__ds_config=f"zero{stage}", train__precision=precision)
    try:
        assert one_step(trainer, 4).applied
        before = everything(trainer)
        for name in ("trunk.layers.0.blocks.0.attn.qkv.weight", "trunk.patch_embed.proj.weight"):  # Muon's, AdamW's
            remove = inject(trainer, name, float("nan"))
            assert not one_step(trainer, 5).applied, name
            remove()
            assert all(torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True)), name
        assert one_step(trainer, 6).applied
        assert all(torch.isfinite(t).all() for t in everything(trainer))
    finally:
        worlds.stop()


def test_loss_scale_can_fall_for_each_scaler(tmp_path: Path) -> None:
    """The scalers of bf16 and fp16: dynamic, at its minimum, static. (fp16 itself does not run on a CPU.)"""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    trainer = trainer_of(tmp_path, train__precision="bf16")
    try:
        assert not engine.loss_scale_can_fall(trainer.engines)
        optimizer = trainer.engines.student.optimizer
        optimizer.loss_scaler = DynamicLossScaler(
            init_scale=4.0,
            scale_window=1000,
            min_scale=1.0,
            delayed_shift=1,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )
        seen = []
        for _ in range(4):
            seen.append(engine.loss_scale_can_fall(trainer.engines))
            optimizer.loss_scaler.update_scale(True)
        assert seen == [True, True, False, False]
        optimizer.loss_scaler = LossScaler(128.0)
        assert not engine.loss_scale_can_fall(trainer.engines)
    finally:
        worlds.stop()
