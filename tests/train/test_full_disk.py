"""Runs on a full disk: a small tmpfs in a mount namespace of its own, full to the last byte."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import cli
from esvit_scale.config import Config
from esvit_scale.errors import RestartCanHelp
from esvit_scale.train import pretraining
from esvit_scale.train.trainer import Trainer
from tests import launcher, tiny
from tests.full_disk import Disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no unshare here")
    made = Disk(tmp_path / "disk")
    yield made
    made.close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("full") / "shards")


@pytest.fixture(scope="module")
def straight(shards: Path) -> list[dict[str, Any]]:
    assert pretraining.pretrain(config(shards.parent / "run", shards)) == 0
    return tiny.rows(shards.parent / "run")


def config(run: Path, shards: Path) -> Config:
    return tiny.config(run, shards, train__checkpoint_every=4, train__keep_checkpoints=1)


@contextmanager
def at_steps(run: Path, actions: dict[int, Callable[[], None]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Call `actions[step]` before a run in training takes that step."""
    real = Trainer.train_step

    def train_step(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        actions.get(trainer.step, lambda: None)()
        return real(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        yield


def test_disk_full_for_a_while_costs_only_saves(
    disk: Disk, shards: Path, straight: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk.root / "run"
    with at_steps(run, {6: disk.fill, 14: disk.free}, monkeypatch):
        assert pretraining.pretrain(config(run, shards)) == 0
    assert tiny.rows(run) == straight
    said = (run / "log.txt").read_text()
    assert "metrics.jsonl: cannot be written: No space left on device" in said
    assert "metrics.jsonl: can be written again" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-00000020"]
    assert not (run / "lock.json").exists()


@pytest.mark.slow
@pytest.mark.alone
def test_disk_that_stays_full_exits_with_75_and_resumes(
    disk: Disk, shards: Path, straight: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk.root / "run"
    with at_steps(run, {6: disk.fill}, monkeypatch), pytest.raises(RestartCanHelp, match="No space left on device"):
        pretraining.pretrain(config(run, shards))
    with pytest.raises(RestartCanHelp, match="No space left on device; nothing that was saved is lost"):
        pretraining.pretrain(config(run, shards))  # a start on the full disk
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.endswith(".partial")]
    disk.free()
    assert pretraining.pretrain(config(run, shards)) == 0
    assert tiny.rows(run) == straight


@pytest.mark.slow
@pytest.mark.alone
def test_undeletable_old_checkpoint_does_not_end_the_run(
    disk: Disk, shards: Path, straight: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = disk.root / "run"
    old = run / "checkpoints" / "step-00000004"

    def hold() -> None:
        while not (run / "checkpoints" / "latest").exists():  # written beside training
            time.sleep(0.002)
        disk.mount_read_only(old)

    with at_steps(run, {5: hold}, monkeypatch):
        assert pretraining.pretrain(config(run, shards)) == 0
    assert tiny.rows(run) == straight
    assert ".step-00000004.removed.partial: could not be removed: Read-only" in (run / "log.txt").read_text()
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [".step-00000004.removed.partial", "latest", "step-00000020"]


def test_console_on_a_full_disk_does_not_change_the_exit_code(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "esvit_scale", "pretrain", str(tmp_path / "none.yaml")],
            stdout=full,
            stderr=full,
            env=launcher.environment(),
            cwd=launcher.REPOSITORY,
        )
    assert done.returncode == 2


def test_other_commands_report_a_full_disk_in_one_line(
    disk: Disk, straight: list[dict[str, Any]], shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is an export of the uninterrupted run."""
    disk.fill()
    out = disk.root / "trunk.safetensors"
    code = cli.main(["convert", str(shards.parent / "run"), str(out), "--from", "esvit-scale", "--to", "safetensors"])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (75, 1), error
    assert "No space left on device" in error
    assert [path.name for path in disk.root.iterdir()] == ["filler"]
