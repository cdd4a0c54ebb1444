"""Activation checkpointing together with autocast, and with frozen parameters at ZeRO 3."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.models import recomputation
from esvit_scale.parallel import world as worlds
from tests.train.test_not_finite import one_step, trainer_of


def losses(tmp_path: Path, steps: int = 3, **overrides: Any) -> list[float]:
    trainer = trainer_of(tmp_path, **overrides)
    try:
        return [one_step(trainer, step).logs["loss"].item() for step in range(4, 4 + steps)]
    finally:
        worlds.stop()


@pytest.fixture(autouse=True)
def products_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let selective checkpointing of the tiny trunk keep the products of its last two stages."""
    monkeypatch.setattr(recomputation, "MIN_INNER_DIMENSION", 32)


@pytest.mark.parametrize(
    ("ds_config", "precision"),
    [
        ("zero0", "fp32"),
        ("zero3", "bf16"),
        *(pytest.param(f"zero{stage}", "fp32", marks=pytest.mark.slow) for stage in (1, 2, 3)),
        *(pytest.param(f"zero{stage}", "bf16", marks=pytest.mark.slow) for stage in (1, 2)),
    ],
)
def test_selective_checkpointing_has_the_same_losses(tmp_path: Path, ds_config: str, precision: str) -> None:
    """With stochastic depth, bit for bit; stage 0 trains in fp32 alone."""
    plain, selective = (
        losses(
            tmp_path,
            model__drop_path=0.5,
            train__ds_config=ds_config,
            train__precision=precision,
            train__activation_checkpointing=implementation,
        )
        for implementation in ("none", "selective")
    )
    assert selective == plain


@pytest.mark.parametrize("ds_config", ["zero1", pytest.param("zero3", marks=pytest.mark.slow)])
def test_recomputation_in_autocast_has_the_same_losses(tmp_path: Path, ds_config: str) -> None:
    """Every implementation recomputes what the forward computed: losses equal those without, bit for bit."""
    of = lambda implementation: losses(  # noqa: E731
        tmp_path,
        train__ds_config=ds_config,
        train__precision="autocast",
        train__activation_checkpointing=implementation,
    )
    plain = of("none")
    for implementation in ("selective", "torch", "deepspeed", "fairscale"):
        assert of(implementation) == plain, implementation


def test_student_and_teacher_autocast_to_bf16(tmp_path: Path) -> None:
    trainer, seen = trainer_of(tmp_path, train__precision="autocast"), set()
    try:
        look = lambda *_: seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))  # noqa: E731
        for network in (trainer.engines.student.module, trainer.engines.teacher.network):
            network.trunk.blocks[0].register_forward_pre_hook(look)
        assert one_step(trainer, 4).applied
        assert seen == {(True, torch.bfloat16)}
        assert trainer.engines.student.torch_autocast_dtype() == torch.bfloat16  # None is fp16 on a GPU
        assert not any(hasattr(p, "comm_dtype") for p in trainer.engines.student.module.parameters())
    finally:
        worlds.stop()


@pytest.mark.parametrize(
    "implementation",
    [
        "selective",
        "torch",
        "deepspeed",
        *(pytest.param(implementation, marks=pytest.mark.slow) for implementation in ("none", "fairscale")),
    ],
)
def test_frozen_parameters_are_partitioned_again_after_a_step(tmp_path: Path, implementation: str) -> None:
    """After a step, a rank keeps only its part of every parameter of student and teacher, also of the frozen ones."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    trainer = trainer_of(
        tmp_path,
        train__ds_config="zero3",
        train__activation_checkpointing=implementation,
        model__freeze_patch_embed=True,
    )
    try:
        engines = trainer.engines
        frozen = [p for p in engines.student.module.parameters() if not p.requires_grad]
        assert len(frozen) == 2
        for step in range(4, 6):
            assert one_step(trainer, step).applied
            for network in (engines.student.module, engines.teacher.module):
                whole = [n for n, p in network.named_parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
                held = sum(p.data.numel() for p in network.parameters())
                assert whole == []
                assert held <= len(list(network.parameters()))  # a partitioned parameter's data is a placeholder
    finally:
        worlds.stop()
