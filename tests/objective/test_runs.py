"""Every objective through the whole training loop: DeepSpeed, data, metrics, checkpoint."""

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.checkpoint import state
from esvit_scale.parallel import engine
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from tests import tiny
from tests.objective import cases


def run(folder: Path, shards: Path, case: str, ds_config: str, **overrides: Any) -> list[dict[str, Any]]:
    own: dict[str, Any] = {f"objective__{key}": value for key, value in cases.section(case).items()}
    own |= {} if case in cases.MULTI_CROP else {"data__local_crops": []}
    own |= {"train__global_batch": 12} if case == "triplet" else {}
    config = tiny.config(folder, shards, **{**own, "train__steps": 3, "train__ds_config": ds_config, **overrides})
    assert pretraining.pretrain(config) == 0
    return tiny.rows(folder)


def fast_if(fast: set[str], all_cases: Iterable[str]) -> list[Any]:
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in all_cases]


# Fast is one of each kind: with centres, with Sinkhorn-Knopp, contrastive with a teacher, and without a teacher.
@pytest.mark.parametrize("case", fast_if({"dino", "esvit-sinkhorn", "moco_v3", "swav"}, cases.CASES))
def test_three_steps_match_at_zero_1_and_3(tmp_path: Path, shards: Path, case: str) -> None:
    """ZeRO 3 would re-apply the gradient of a parameter that is not used."""
    rows = run(tmp_path / "zero1", shards, case, "zero1")
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert len({row["loss"] for row in rows}) == 3
    for a, b in zip(rows, run(tmp_path / "zero3", shards, case, "zero3"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
@pytest.mark.parametrize("case", fast_if({"dino-sinkhorn", "moco_v3"}, ["dino-sinkhorn", "moco_v3", "simclr", "swav"]))
def test_half_precision_follows_fp32(tmp_path: Path, shards: Path, case: str, precision: str) -> None:
    exact = run(tmp_path / "fp32", shards, case, "zero1")
    rough = run(tmp_path / precision, shards, case, "zero1", train__precision=precision)
    assert rough[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.1)
    assert all(math.isfinite(row["grad_norm"]) for row in rough)


def test_decay_of_all_reaches_the_optimizer(tmp_path: Path, shards: Path) -> None:
    for decay, groups in (("weights", {"decay", "no_decay", "last_layer"}), ("all", {"decay", "last_layer"})):
        config = tiny.config(tmp_path, shards, optim__decay=decay)
        engines = engine.build(config, worlds.start(), {}, {})
        assert {group["name"] for group in engines.optimizer.param_groups} == groups


@pytest.mark.parametrize("case", ["esvit-sinkhorn", "moco_v3", "swav"])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, shards: Path, case: str) -> None:
    """Without centres, without a group of its own for the last layer, and without a teacher."""
    straight = run(tmp_path / "straight", shards, case, "zero1", train__steps=6, train__checkpoint_every=4)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-00000006")
    (tmp_path / "stopped" / "checkpoints" / "latest").write_text("step-00000004\n")
    (tmp_path / "stopped" / "summary.json").unlink()
    written = tmp_path / "stopped" / "config.yaml"
    written.write_text(written.read_text().replace(str(tmp_path / "straight"), str(tmp_path / "stopped")))
    again = run(tmp_path / "stopped", shards, case, "zero1", train__steps=6, train__checkpoint_every=4)
    assert again == straight
    assert "at step 4" in (tmp_path / "stopped" / "log.txt").read_text()


@pytest.mark.parametrize("case", ["simclr", "swav"])
def test_without_a_teacher_evaluation_reads_the_student(tmp_path: Path, shards: Path, case: str) -> None:
    run(tmp_path / "run", shards, case, "zero1", train__precision="bf16")
    networks = state.read_weights(tmp_path / "run" / "checkpoints" / "step-00000003").networks
    assert networks["teacher"].keys() == networks["student"].keys()
    assert all(torch.equal(value, networks["student"][name]) for name, value in networks["teacher"].items())
