"""Gradients of micro-batches are summed in fp32 whatever the precision of training, so that none is rounded away."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esvit_scale.parallel import world as worlds
from tests.train.test_not_finite import one_step, trainer_of

MICRO_BATCHES = 8


@pytest.mark.parametrize("ds_config", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_micro_batches_add_up_in_fp32(tmp_path: Path, ds_config: str) -> None:
    """Hooks replace the bf16 gradients of eight micro-batches by one 256 and seven 1, whose sum in bf16 would stay 256.

    (DeepSpeed divides the loss, not these gradients, by the number of micro-batches.)
    """
    trainer = trainer_of(
        tmp_path, train__ds_config=ds_config, train__precision="bf16", train__grad_accum=MICRO_BATCHES, optim__clip=None
    )
    seen: dict[str, Tensor] = {}

    def gradient_hook() -> Callable[[Tensor], Tensor]:
        values = iter([256.0] + [1.0] * (MICRO_BATCHES - 1))
        return lambda grad: torch.full_like(grad, next(values))

    def observe(*_: object) -> None:
        assert all(grad.dtype == torch.float32 for grad in trainer.engines.layout.pending_gradients())
        seen.update({p.name: p.grad.clone() for p in trainer.engines.partitions if p.grad is not None})

    try:
        for p in trainer.engines.student.module.parameters():
            p.register_hook(gradient_hook())
        trainer.engines.optimizer.register_step_pre_hook(observe)
        assert one_step(trainer, 4).applied
        assert seen.keys() == {p.name for p in trainer.engines.partitions}
        expected = 256.0 + MICRO_BATCHES - 1
        assert [name for name, grad in seen.items() if not torch.all(grad == expected)] == []
    finally:
        worlds.stop()
