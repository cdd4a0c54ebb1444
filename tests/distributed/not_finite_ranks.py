"""Run on every rank by test_not_finite.py: a NaN on the last rank alone refuses the step on every rank, and the flags of
each rank reach all, also in a refused step."""

import sys
from pathlib import Path

import pytest
import torch

from esvit_scale.parallel import world as worlds
from esvit_scale.train.signals import Flag
from tests.train.test_not_finite import FAULTS, blind_deepspeed, everything, inject, one_step, trainer_of


def main(folder: str) -> None:
    world = worlds.start()
    for ds_config, precision in (("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "autocast"), ("zero3", "bf16")):
        trainer = trainer_of(Path(folder), train__ds_config=ds_config, train__precision=precision)
        blind_deepspeed(trainer, pytest.MonkeyPatch())
        for step, (fault, (where, value)) in enumerate(FAULTS.items()):
            own, everyones = Flag(1 << world.rank), Flag((1 << world.size) - 1)
            result = one_step(trainer, 4 + 2 * step, own)
            assert result.applied
            assert result.flags == everyones
            before = everything(trainer)
            remove = inject(trainer, where, value) if world.rank == world.size - 1 else lambda: None
            refused = one_step(trainer, 5 + 2 * step, own)
            assert not refused.applied, (ds_config, fault)
            assert refused.flags == everyones
            remove()
            same = (torch.equal(a, b) for a, b in zip(before, everything(trainer), strict=True))
            assert all(same), (ds_config, fault)
    worlds.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
