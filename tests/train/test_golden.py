"""The first losses of the demo model against stored numbers, which a refactoring must not change.

`python -m tests.train.test_golden` writes new numbers, after a change that is meant to change them.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import config as configs
from esvit_scale import demo
from esvit_scale.train import pretraining
from tests import tiny

GOLDEN = Path(__file__).with_name("golden_demo.json")
STEPS = 6
KEYS = ("loss", "loss_view", "loss_region", "teacher_entropy_view", "teacher_entropy_region", "grad_norm", "lr")


def curve(folder: Path) -> list[dict[str, Any]]:
    """Train the demo model for STEPS steps in fp32, and return the rows."""
    train, _ = demo.write_shards(folder / "shards", configs.resolve("demo"))
    overrides = [f"run_dir={folder / 'run'}", f"data.train={train}", "data.workers=0", "train.precision=fp32"]
    config = configs.resolve("demo", [*overrides, f"train.steps={STEPS}", "train.log_every=1"])
    assert pretraining.pretrain(config) == 0
    return [{key: row[key] for key in KEYS} for row in tiny.rows(folder / "run")]


def test_demo_losses_match_golden_file(tmp_path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    found = curve(tmp_path)
    assert len(found) == len(expected) == STEPS
    for row, golden in zip(found, expected, strict=True):
        # Other CPUs sum in another order; a wrong term or another sample moves the loss by far more.
        assert row == pytest.approx(golden, rel=1e-3)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(curve(Path(folder)), indent=1) + "\n")
