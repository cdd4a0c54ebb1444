"""Muon takes the same steps on 1, 2 and 4 processes, at every ZeRO stage, with offloading and after a resume elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.train import pretraining
from tests import tiny
from tests.distributed.test_equivalence import TOLERANCE, train_on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # two cores take minutes for four ranks

STAGES = ("zero0", "zero1", "zero2", "zero3")
RUNS: dict[int, dict[str, dict[str, Any]]] = {
    1: {stage: {"train__ds_config": stage} for stage in STAGES[1:]},
    2: {stage: {"train__ds_config": stage} for stage in ("zero1", "zero3_offload")}
    | {"zero3-accumulate": {"train__ds_config": "zero3", "train__grad_accum": 2}},
    4: {stage: {"train__ds_config": stage} for stage in ("zero0", "zero2", "zero3")}
    | {"zero1-elastic": {"train__ds_config": "zero1"}},  # one process saved it at step 4
}
# In epoch 0, which has 4 steps, the last layer is frozen.
MUON: dict[str, Any] = {"optim__name": "muon", "train__steps": 8, "train__checkpoint_every": 4}


def back_to_step_4(source: Path, run: Path) -> None:
    """A copy of a finished run as it was after its save at step 4."""
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    (run / "checkpoints" / "latest").write_text("step-00000004\n")
    (run / "summary.json").unlink()


def assert_same(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in reference] == list(range(1, 9))
    for row, expected in zip(rows, reference, strict=True):
        for key in ("loss", "loss_view", "loss_region", "teacher_entropy_view", "teacher_entropy_region"):
            assert row[key] == pytest.approx(expected[key], abs=TOLERANCE), (row["step"], key)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), row["step"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs: one process at ZeRO 0 in `reference`, the others in `RANKS-NAME`."""
    folder = tmp_path_factory.mktemp("muon")
    tiny.shards(folder / "shards")
    config = tiny.config(folder / "reference", folder / "shards", train__ds_config="zero0", **MUON)
    assert pretraining.pretrain(config) == 0
    back_to_step_4(folder / "reference", folder / "4-zero1-elastic")
    for name, overrides in RUNS[1].items():
        assert pretraining.pretrain(tiny.config(folder / f"1-{name}", folder / "shards", **MUON, **overrides)) == 0
    for ranks in (2, 4):
        runs = {f"{ranks}-{name}": MUON | overrides for name, overrides in RUNS[ranks].items()}
        train_on(ranks, runs, folder, timeout=1100)
    return folder


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, runs in RUNS.items() for name in runs])
def test_losses_equal_those_of_one_process(folder: Path, ranks: int, name: str) -> None:
    reference = tiny.rows(folder / "reference")
    assert reference[-1]["loss"] < reference[0]["loss"] - 0.1  # training changes the numbers
    assert_same(tiny.rows(folder / f"{ranks}-{name}"), reference)


@pytest.mark.parametrize(
    ("saved_by", "resumed_with"), [("2-zero3_offload", "zero1"), ("4-zero2", "zero0"), ("2-zero1", "zero3")]
)
def test_resume_at_another_world_size_and_stage_matches(
    folder: Path, tmp_path: Path, saved_by: str, resumed_with: str
) -> None:
    back_to_step_4(folder / saved_by, tmp_path / "run")
    config = tiny.config(tmp_path / "run", folder / "shards", train__ds_config=resumed_with, **MUON)
    assert pretraining.pretrain(config) == 0
    assert_same(tiny.rows(tmp_path / "run"), tiny.rows(folder / "reference"))


def test_bf16_runs_are_the_same_at_every_stage(tmp_path: Path, folder: Path) -> None:
    rows = {}
    for stage in ("zero1", "zero3"):
        config = tiny.config(
            tmp_path / stage,
            folder / "shards",
            train__ds_config=stage,
            train__precision="bf16",
            **MUON,
        )
        assert pretraining.pretrain(config) == 0
        rows[stage] = tiny.rows(tmp_path / stage)
    for row, expected in zip(rows["zero3"], rows["zero1"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE), row["step"]
