"""The record at W&B, with the real package in offline mode where it is installed (CI does not install it)."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.train import metrics, run_dir, tracking
from esvit_scale.train.row_file import read_rows
from tests import launcher


def config_of(run: Path) -> Config:
    return configs.resolve("demo", [f"run_dir={run}", "name=photos", "train.wandb=my-project"])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "photos"
    run.mkdir()
    (run / "config.yaml").write_text(configs.dump(config_of(run)))
    return run


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {"step": s, "loss": 1.0 / s, "images_per_s": 3.0, "slowest_node": "n", "time": 9.0}
        for s in range(first, last + 1)
    ]


def write(run: Path, found: list[dict[str, Any]]) -> None:
    """Write rows as a start of the run does."""
    logger = metrics.MetricLogger(run, 10, active=True, config=config_of(run))
    logger.open(found[0]["step"] - 1)
    for row in found:
        logger.row(row)
    logger.close()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_both_starts_of_a_run_go_to_one_record(run: Path) -> None:
    write(run, rows(1, 3))
    write(run, rows(3, 5))  # resumed after step 2
    identity = (run / tracking.ID_FILE).read_text().strip()
    records = sorted((run / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert len(records) == 2
    first, second = (path.read_bytes() for path in records)
    for content in (first, second):
        for word in (b"my-project", b"photos", b"images_per_s", b"global_batch", b"slowest_node"):
            assert word in content
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]


class Failing:
    """A W&B that fails at every call after init."""

    Settings = staticmethod(lambda **_: None)

    def init(self, **given: Any) -> "Failing":
        self.given = given
        return self

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        raise ConnectionError("no\nnetwork")


def test_a_failing_wandb_is_one_warning_and_training_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = Failing()
    monkeypatch.setattr(tracking, "package", lambda: there)
    monkeypatch.setattr(logging.getLogger("esvit_scale"), "propagate", True)
    with caplog.at_level(logging.WARNING, "esvit_scale"):
        write(run, rows(1, 3))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "train.wandb: W&B failed: no network; training goes on without it, metrics.jsonl holds every row",
    ]
    assert len(read_rows(run / "metrics.jsonl")) == 3
    assert (there.given["project"], there.given["name"], there.given["resume"]) == ("my-project", "photos", "allow")
    assert there.given["config"]["train"]["global_batch"] == 64


def test_without_the_key_or_the_package(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "package", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'esvit-scale\[wandb\]', or leave train\.wandb out"):
        tracking.require(config_of(run))
    tracking.require(configs.resolve("demo"))
    metrics.MetricLogger(run, 10, active=True, config=configs.resolve("demo")).open(0)
    assert not (run / tracking.ID_FILE).exists()
    assert "train.wandb" in run_dir.MAY_DIFFER


def test_wandb_is_imported_only_when_the_key_is_set() -> None:
    code = "import sys; from esvit_scale.train import pretraining; assert 'wandb' not in sys.modules"
    assert launcher.fork("-c", code).wait(60) == 0
