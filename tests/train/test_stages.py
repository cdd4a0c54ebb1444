"""Training stages: one run, whose stages begin with the weights of the one before; exact over every interruption."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import config as configs
from esvit_scale.checkpoint import state_file, step_folders
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.train import pretraining, run_records
from tests import tiny

FIRST = {"train.steps": 6}
# Larger crops and windows, another batch and rate, and a region head that stage 0 does not have.
SECOND = {
    "train.steps": 6,
    "data.global_crops.size": 64,
    "data.local_crops.0.size": 32,
    "model.window": 8,
    "train.global_batch": 4,
    "optim.lr": 2e-3,
    "objective.regions": True,
}
COMMON = {"objective__regions": False, "train__checkpoint_every": 2, "train__keep_checkpoints": 20}


def staged(run: Path, data: Path, *stages: dict[str, Any], **overrides: Any) -> Config:
    return tiny.config(run, data, stages=list(stages or (FIRST, SECOND)), **COMMON, **overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretraining.pretrain(staged(run, data)) == 0
    return run


def test_run_of_two_stages_has_one_record(data: Path, straight: Path) -> None:
    rows = tiny.rows(straight)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["stage"] for row in rows] == [0] * 6 + [1] * 6
    assert [row["images_seen"] for row in rows] == [*range(8, 49, 8), *range(52, 73, 4)]
    assert rows[6]["lr"] == 0 < rows[7]["lr"]  # a warm-up of its own
    assert "loss_region" in rows[6] and "loss_region" not in rows[5]
    summary = run_records.read_summary(straight)
    assert (summary["finished"], summary["step"], summary["total_steps"]) == (True, 12, 12)
    assert configs.load(straight / "config.yaml") == staged(straight, data)
    of_steps = {step: state_file.read_state(straight / "checkpoints" / f"step-{step:08d}") for step in (6, 8)}
    assert [of_steps[step]["config"]["model"]["window"] for step in (6, 8)] == [4, 8]
    assert of_steps[8]["cursor"]["batch_index"] == 2 * 9 + 2  # stage 0 began two epochs; 9 batches of 4 in 36 images


@pytest.mark.parametrize("step", [4, 6, 8])
def test_resumed_run_equals_uninterrupted_run(data: Path, straight: Path, tmp_path: Path, step: int) -> None:
    """In stage 0, between the stages, and in stage 1."""
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "summary.json").unlink()
    for folder in step_folders.list_step_folders(run):
        if (step_folders.step_of(folder) or 0) > step:
            shutil.rmtree(folder)
    assert pretraining.pretrain(staged(run, data)) == 0
    assert tiny.rows(run) == tiny.rows(straight)
