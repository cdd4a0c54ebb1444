"""Every objective through the whole training loop: DeepSpeed, data, metrics, checkpoint."""

import math
from pathlib import Path
from typing import Any

import pytest

from esvit_scale.train import loop
from tests import tiny
from tests.objective import cases


def run(folder: Path, shards: Path, case: str, ds_config: str, **overrides: Any) -> list[dict[str, Any]]:
    own: dict[str, Any] = {f"objective__{key}": value for key, value in cases.section(case).items()}
    own |= {} if case in cases.MULTI_CROP else {"data__local_crops": []}
    own |= {"train__global_batch": 12} if case == "triplet" else {}
    config = tiny.config(folder, shards, **{**own, "train__steps": 3, "train__ds_config": ds_config, **overrides})
    assert loop.pretrain(config) == 0
    return tiny.rows(folder)


@pytest.mark.parametrize("case", cases.CASES)
def test_three_steps_are_the_same_partitioned(tmp_path: Path, shards: Path, case: str) -> None:
    """ZeRO 3 would re-apply the gradient of a parameter that is not used."""
    rows = run(tmp_path / "zero1", shards, case, "zero1")
    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert len({row["loss"] for row in rows}) == 3
    for a, b in zip(rows, run(tmp_path / "zero3", shards, case, "zero3"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)


def test_in_bf16_too(tmp_path: Path, shards: Path) -> None:
    for case in ("moco_v3", "swav"):
        exact = run(tmp_path / f"{case}-fp32", shards, case, "zero1")
        rough = run(tmp_path / f"{case}-bf16", shards, case, "zero1", train__precision="bf16")
        assert rough[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.1)
        assert all(math.isfinite(row["grad_norm"]) for row in rough)
