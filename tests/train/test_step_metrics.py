"""The metrics beside the loss, against their definitions and in runs at every ZeRO stage."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.errors import UserError
from esvit_scale.train import pretraining, step_metrics
from tests import tiny

STAGES = ("zero0", "zero1", "zero2", "zero3")


def test_gradient_norms_add_up_by_part() -> None:
    names = [
        "trunk.patch_embed.proj.weight",
        "trunk.layers.0.blocks.0.norm1.weight",
        "trunk.layers.0.x",
        "trunk.norm.weight",
    ]
    names += ["objective.view_head.mlp.0.weight"]
    found = step_metrics.gradient_norms(torch.tensor([1.0, 4.0, 5.0, 2.0, 4.0]), names)
    assert found == pytest.approx(
        {
            "grad_norm": 4.0,
            "grad_norm_patch_embed": 1.0,
            "grad_norm_stage1": 3.0,
            "grad_norm_norm": math.sqrt(2),
            "grad_norm_view_head": 2.0,
        }
    )


def test_effective_rank_of_known_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    assert step_metrics.effective_rank(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert (
        step_metrics.effective_rank(torch.randn(40, 1, generator=generator) @ torch.randn(1, 12, generator=generator))
        < 1.01
    )
    assert 10 < step_metrics.effective_rank(torch.randn(1000, 12, generator=generator)) <= 12.01
    assert math.isnan(step_metrics.effective_rank(torch.full((4, 3), math.nan)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("gauges")
    shards, held_out = tiny.shards(folder / "shards"), tiny.shards(folder / "held-out", first=100)
    found = {}
    for stage in STAGES:
        config = tiny.config(
            folder / stage,
            shards,
            train__ds_config=stage,
            train__steps=6,
            data__held_out=str(held_out),
            train__knn_every=3,
        )
        assert pretraining.pretrain(config) == 0
        found[stage] = tiny.rows(folder / stage)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_metrics_match_at_every_zero_stage(runs: dict[str, list[dict[str, Any]]], stage: str) -> None:
    for row, expected in zip(runs[stage], runs["zero0"], strict=True):
        assert row.keys() == expected.keys()
        for name, value in expected.items():
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-6)
            assert row[name] == near, name


def test_rows_hold_the_documented_metrics(runs: dict[str, list[dict[str, Any]]]) -> None:
    first, *rows = runs["zero1"]
    about = {"knn_top1_pixels", "knn_largest_class", "knn_images", "knn_held_out"}
    assert first.keys() == {"step", "images_seen", "knn_top1"} | about
    assert first["knn_largest_class"] == pytest.approx(1 / 3)
    assert first["step"] == first["images_seen"] == 0
    parts = {"patch_embed", "stage1", "stage2", "stage3", "norm", "view_head", "region_head"}
    for row in rows:
        assert {k.removeprefix("grad_norm_") for k in row if k.startswith("grad_norm_")} == parts
        assert row["grad_norm"] ** 2 == pytest.approx(sum(row[f"grad_norm_{p}"] ** 2 for p in parts), rel=1e-4)
        assert {k.removeprefix("update_ratio_") for k in row if k.startswith("update_ratio_")} <= parts
        assert 0 < row["prototypes_used_region"] <= 64
        assert 0 <= row["student_entropy_view"] <= math.log(64) + 1e-5
        assert 1 <= row["rank_me"] <= 64
    # Warm-up begins at lr 0, and Adam's first update is lr an element.
    assert rows[0]["update_ratio_stage1"] == 0
    assert 1e-4 < rows[-1]["update_ratio_stage1"] < 1
    assert [row["step"] for row in rows if "knn_top1" in row] == [3, 6]
    assert all(0 <= row["knn_top1"] <= 1 for row in (first, *rows) if "knn_top1" in row)


def test_held_out_set_without_labels_is_refused(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    config = tiny.config(tmp_path / "run", shards, data__held_out=str(tmp_path / "empty"), train__knn_every=2)
    with pytest.raises(UserError, match="empty"):
        pretraining.pretrain(config)
    few = tiny.shards(tmp_path / "few", samples=9)
    with pytest.raises(UserError, match="at least 20 readable images with labels"):
        pretraining.pretrain(tiny.config(tmp_path / "run", shards, data__held_out=str(few), train__knn_every=2))
