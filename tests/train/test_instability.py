"""A run of the preset `stability_trained` at a too high learning rate: the accuracy dips, and a warning reports it."""

from pathlib import Path

import pytest

from esvit_scale import config as configs
from esvit_scale import demo
from esvit_scale.report.html import write_report
from esvit_scale.report.instability import dips
from esvit_scale.report.plots import columns
from esvit_scale.train import pretraining
from esvit_scale.train.row_file import read_rows

SMALL = [
    "data.workers=0",
    "data.global_crops={size: 64, scale: [0.2, 1.0]}",
    "model.embed_dim=64",
    "model.depths=[6]",
    "model.heads=[4]",
    "objective.head_hidden=256",
    "objective.bottleneck=64",
    "objective.ema_momentum=0.9",
    "objective.ema_momentum_end=0.9",
    "train.global_batch=64",
    "train.log_every=2",
    "train.knn_every=10",
]
# A warm-up to a rate that is absurdly high: k-NN falls by 16 points, three times what is a dip. At rates that are only too
# high (0.15), whether and when it falls depends on the rounding of a machine and of a version.
TOO_HIGH = ["optim.lr=10", "optim.warmup_epochs=7", "train.steps=90"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_too_high_learning_rate_gives_an_accuracy_dip_warning(tmp_path: Path) -> None:
    train, test = demo.write_shards(tmp_path / "shards", configs.resolve("demo"))
    data = [f"data.train={train}", f"data.held_out={test}", f"run_dir={tmp_path / 'run'}"]
    assert pretraining.pretrain(configs.resolve("stability_trained", [*SMALL, *TOO_HIGH, *data])) == 0
    rows = columns(read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert dips(rows["knn_top1"]).any()
    assert {f"grad_norm_block{i}" for i in range(1, 7)} <= rows.keys()
    assert "k-NN accuracy fell to" in (tmp_path / "run" / "log.txt").read_text()
    page = write_report(tmp_path / "run").read_text()
    assert "Stability by layer" in page
