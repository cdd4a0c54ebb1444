"""Runs on samples of several modalities, some of them missing: ZeRO stages, recomputation, accumulation, resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import config as configs
from esvit_scale.checkpoint import state, step_folders
from esvit_scale.train import pretraining
from tests import tiny
from tests.data.media_files import modal_set

VALUES: dict[str, Any] = {
    "seed": 2,
    "data": {
        "workers": 0,
        "global_crops": {"size": 16},
        "local_crops": [],
        "audio": {"views": 1, "rate": 8000, "seconds": 0.1},
        "video": {"views": 1, "frames": 8, "size": 8},
        "text": {"views": 2, "length": 12, "fields": ["fr", "en"]},
    },
    "model": {"trunk": "modal_small", "embed_dim": 16, "depths": [2], "heads": [2], "drop_path": 0.2},
    "objective": {"prototypes": 24, "head_hidden": 20, "bottleneck": 12},
    "optim": {"lr": 1e-2, "warmup_epochs": 0.3, "clip": 0.3, "freeze_last_layer_epochs": 0},
    "train": {"global_batch": 8, "precision": "fp32", "steps": 4, "log_every": 1, "checkpoint_every": 2},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "vatt": {"pairs": ["image-audio", "video-audio", "image-text"], "ema_momentum": 0.0, "ema_momentum_end": 0.0},
    "esvit_modalities": {"regions": True},
}
RUNS: dict[str, list[dict[str, Any]]] = {
    "vatt": [{"ds_config": "zero3", "activation_checkpointing": "deepspeed"}],
    "esvit_modalities": [
        {"ds_config": "zero1"},
        {"ds_config": "zero2", "activation_checkpointing": "selective"},
        {"ds_config": "zero3", "activation_checkpointing": "torch"},
    ],
}


def train(run: Path, data: Path, objective: str, backbone: str = "shared", **of_train: Any) -> list[dict[str, Any]]:
    values = {key: dict(section) if isinstance(section, dict) else section for key, section in VALUES.items()}
    values |= {"name": "modal", "run_dir": str(run)}
    values["data"]["train"] = str(data)
    values["model"]["modalities"] = {"patch": 8, "waveform_patch": 50, "backbone": backbone}
    values["objective"] |= {"name": objective, **OBJECTIVES[objective]}
    values["train"] |= {"keep_checkpoints": 4, **of_train}
    assert pretraining.pretrain(configs.validate(values, where="modal")) == 0
    return tiny.rows(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "backbone"),
    [("vatt", "separate"), pytest.param("esvit_modalities", "shared", marks=pytest.mark.long)],
)
def test_runs_are_the_same_at_every_zero_stage_and_after_a_resume(
    objective: str, backbone: str, tmp_path: Path
) -> None:
    modal_set(tmp_path / "set")
    straight = train(tmp_path / "straight", tmp_path / "set", objective, backbone, ds_config="zero0")
    assert all(row["loss"] > 0 for row in straight)
    for i, of_train in enumerate(RUNS[objective]):
        for row, expected in zip(
            train(tmp_path / str(i), tmp_path / "set", objective, backbone, **of_train), straight, strict=True
        ):
            assert row["loss"] == pytest.approx(expected["loss"], abs=2e-5), (of_train, row["step"])
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "straight", resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    (resumed / "checkpoints" / "latest").write_text("step-00000002\n")
    (resumed / "summary.json").unlink()
    assert train(resumed, tmp_path / "set", objective, backbone, ds_config="zero0") == straight
    ours, theirs = (state.read_weights(step_folders.resolve(run)) for run in (resumed, tmp_path / "straight"))
    for role, tensors in theirs.networks.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours.networks[role][name], tensor), (role, name)
