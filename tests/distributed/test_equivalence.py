"""The same numbers however the work is shared out: ZeRO stages, ranks, accumulation, recomputation, elastic resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.config import Config
from esvit_scale.train import pretraining
from tests import launcher, tiny

STEPS = 8  # two epochs; the last layer is frozen in the first
SAVE = 5  # in the second
# fp32 sums of a few hundred terms in another order: 1e-7 each, grown by STEPS steps of training at a high rate.
TOLERANCE = 1e-5
Others = dict[str, list[dict[str, Any]]]
pytestmark = pytest.mark.timeout(900)  # all runs of the two ranks are one fixture, and other work may share the cores

TWO_RANKS: dict[str, dict[str, Any]] = {
    **{s: {"train__ds_config": s, "train__checkpoint_every": SAVE} for s in ("zero1", "zero2", "zero3")},
    "zero1-accumulate": {"train__ds_config": "zero1", "train__grad_accum": 2},
    "zero0-selective": {"train__ds_config": "zero0", "train__activation_checkpointing": "selective"},
    "zero2-selective-workers": {
        "train__ds_config": "zero2",
        "train__activation_checkpointing": "selective",
        "data__workers": 1,
    },
    "zero3-selective-accumulate": {
        "train__ds_config": "zero3",
        "train__activation_checkpointing": "selective",
        "train__grad_accum": 2,
    },
}
# Beside them: offloading, a partition inside each node (here two "nodes" of two ranks), layer-wise norms by segment,
# a frozen patch embedding with rates by depth and a trunk that waits, and one run that a single process saved at step SAVE.
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "zero0": {"train__ds_config": "zero0"},
    "zero1": {"train__ds_config": "zero1"},
    "zero2_offload": {"train__ds_config": "zero2_offload"},
    "zero3": {"train__ds_config": "zero3"},
    "zero3_offload": {"train__ds_config": "zero3_offload"},
    "zero3-torch": {"train__ds_config": "zero3", "train__activation_checkpointing": "torch"},
    "zero3-deepspeed": {"train__ds_config": "zero3", "train__activation_checkpointing": "deepspeed"},
    "zero3-fairscale": {"train__ds_config": "zero3", "train__activation_checkpointing": "fairscale"},
    "zero3_hierarchical": {},  # its file is written by the fixture
    "zero1-elastic": {"train__ds_config": "zero1"},
    "zero3-elastic": {"train__ds_config": "zero3"},
}
OTHERS: dict[str, dict[str, Any]] = {  # each against its own reference: one process, ZeRO 0
    "lamb": {"optim__name": "lamb"},
    "lars": {"optim__name": "lars", "optim__lr": 10.0},
    "sgd": {"optim__name": "sgd"},
    "frozen": {"model__freeze_patch_embed": True, "optim__layer_decay": 0.7, "optim__freeze_trunk_steps": 3},
    "masked": {
        "objective__mask_weight": 1.0,
        "objective__koleo_weight": 0.1,
        "objective__koleo_across_ranks": True,
    },
}
ONE_RANK: dict[str, dict[str, Any]] = {
    "zero1": {"train__ds_config": "zero1"},
    "zero3": {"train__ds_config": "zero3"},
    "zero1-accumulate": {"train__ds_config": "zero1", "train__grad_accum": 2},
    "zero1-workers": {"train__ds_config": "zero1", "data__workers": 2},
    "zero2_offload": {"train__ds_config": "zero2_offload"},
    "zero3_offload": {"train__ds_config": "zero3_offload"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equivalence")
    tiny.shards(folder / "shards")
    return folder


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[dict[str, Any]]:
    """One process, ZeRO 0, no accumulation."""
    assert train_alone(folder / "reference", folder, train__ds_config="zero0", train__checkpoint_every=SAVE) == 0
    return tiny.rows(folder / "reference")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    """All runs of TWO_RANKS, in one process group."""
    train_on(2, {f"two-{name}": overrides for name, overrides in TWO_RANKS.items()}, folder)
    return folder


@pytest.fixture(scope="module")
def four_ranks(folder: Path, reference: list[dict[str, Any]]) -> Path:
    """All runs of FOUR_RANKS and OTHERS, in one process group."""
    values = json.loads((launcher.REPOSITORY / "ds_configs" / "zero3_hierarchical.json").read_text())
    values["zero_optimization"]["zero_hpz_partition_size"] = 2
    (folder / "hierarchical.json").write_text(json.dumps(values))
    for name in FOUR_RANKS:
        if name.endswith("-elastic"):
            back_to_the_save(folder / "reference", folder / f"four-{name}")
    runs = {f"four-{name}": overrides for name, overrides in FOUR_RANKS.items()}
    runs["four-zero3_hierarchical"] = {"train__ds_config": str(folder / "hierarchical.json")}
    runs |= {f"four-{name}-zero3": o | {"train__ds_config": "zero3"} for name, o in OTHERS.items()}
    train_on(4, runs, folder, timeout=1100)
    return folder


def config_of(run: Path, folder: Path, **overrides: Any) -> Config:
    """Return the config of a run on the module's shards that saves only at its end, unless `overrides` say else."""
    values = {"train__steps": STEPS, "train__checkpoint_every": STEPS} | overrides
    return tiny.config(run, folder / "shards", **values)


def train_alone(run: Path, folder: Path, **overrides: Any) -> int:
    return pretraining.pretrain(config_of(run, folder, **overrides))


def train_on(ranks: int, runs: dict[str, dict[str, Any]], folder: Path, timeout: float = 850) -> None:
    paths = []
    for name, overrides in runs.items():
        paths.append(tiny.write_config(folder / f"{name}.yaml", config_of(folder / name, folder, **overrides)))
    launcher.run(Path(__file__).with_name("scenarios.py"), *paths, ranks=ranks, timeout=timeout)


def back_to_the_save(source: Path, run: Path) -> None:
    """A copy of a finished run as it was after its save at step SAVE."""
    shutil.copytree(source, run)
    kept = sorted(folder.name for folder in (run / "checkpoints").glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (SAVE, STEPS)]
    shutil.rmtree(run / "checkpoints" / kept[1])
    (run / "checkpoints" / "latest").write_text(f"{kept[0]}\n")
    (run / "summary.json").unlink()


def assert_same(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in reference] == list(range(1, STEPS + 1))
    for row, expected in zip(rows, reference, strict=True):
        for key in ("loss", "loss_view", "loss_region", "teacher_entropy_view", "teacher_entropy_region"):
            assert row[key] == pytest.approx(expected[key], abs=TOLERANCE), (row["step"], key)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), row["step"]


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_match_one_process(two_ranks: Path, reference: list[dict[str, Any]], name: str) -> None:
    assert_same(tiny.rows(two_ranks / f"two-{name}"), reference)


@pytest.mark.slow  # two cores take minutes for four ranks; the two-rank runs are in the fast tests
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks_match_one_process(four_ranks: Path, reference: list[dict[str, Any]], name: str) -> None:
    assert_same(tiny.rows(four_ranks / f"four-{name}"), reference)


@pytest.fixture(scope="module")
def others(folder: Path) -> Others:
    """The rows of OTHERS, in one process at ZeRO 0."""
    found = {}
    for name, overrides in OTHERS.items():
        assert train_alone(folder / f"one-{name}", folder, **overrides, train__ds_config="zero0") == 0
        found[name] = own = tiny.rows(folder / f"one-{name}")
        assert min(row["loss"] for row in own) < own[0]["loss"] - 0.3
    return found


@pytest.mark.slow  # two cores take minutes for four ranks; the two-rank runs are in the fast tests
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_and_frozen_parameters_match_at_zero_3(four_ranks: Path, others: Others, name: str) -> None:
    assert_same(tiny.rows(four_ranks / f"four-{name}-zero3"), others[name])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_other_optimizers_and_frozen_parameters_match_at_zero_2(folder: Path, others: Others) -> None:
    train_on(4, {f"four-{name}-zero2": o | {"train__ds_config": "zero2"} for name, o in OTHERS.items()}, folder)
    for name, own in others.items():
        assert_same(tiny.rows(folder / f"four-{name}-zero2"), own)


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_matches_zero_0(folder: Path, reference: list[dict[str, Any]], name: str) -> None:
    assert train_alone(folder / f"one-{name}", folder, **ONE_RANK[name]) == 0
    assert_same(tiny.rows(folder / f"one-{name}"), reference)


def test_reference_loss_falls_and_no_step_is_skipped(reference: list[dict[str, Any]]) -> None:
    """The comparison above means something only if training changes the numbers."""
    assert min(row["loss"] for row in reference) < reference[0]["loss"] - 0.9
    assert all(row["skipped_steps"] == 0 for row in reference)


@pytest.mark.parametrize(("saved_by", "resumed_with"), [("zero3", "zero1"), ("zero1", "zero3"), ("zero2", "zero0")])
def test_resume_at_another_world_size_and_stage_matches(
    two_ranks: Path, folder: Path, reference: list[dict[str, Any]], tmp_path: Path, saved_by: str, resumed_with: str
) -> None:
    """Two ranks save at step SAVE at one ZeRO stage, one process goes on at another: the same losses."""
    run = tmp_path / "run"
    back_to_the_save(two_ranks / f"two-{saved_by}", run)
    assert train_alone(run, folder, train__ds_config=resumed_with) == 0
    assert_same(tiny.rows(run), reference)
