from pathlib import Path
from typing import Any

from esvit_scale.train import pretraining
from tests import tiny

MODEL: dict[str, Any] = {"model__trunk": "swinv2_h", "model__depths": [1, 1, 6], "model__drop_path": 0.2}


def test_swin_v2_losses_match_with_zero3_and_recomputation(tmp_path: Path) -> None:
    """ZeRO 3 gathers a parameter only for the module that owns it, so that no other module may use it."""
    data, rows = tiny.shards(tmp_path / "shards"), {}
    for stage, implementation in (("zero1", "none"), ("zero3", "torch")):
        overrides = MODEL | {
            "train__ds_config": stage,
            "train__activation_checkpointing": implementation,
            "train__steps": 3,
        }
        config = tiny.config(tmp_path / stage, data, **overrides)
        assert pretraining.pretrain(config) == 0
        rows[stage] = tiny.rows(tmp_path / stage)
    assert rows["zero1"] == rows["zero3"]
    assert all(row["skipped_steps"] == 0 for row in rows["zero1"])
