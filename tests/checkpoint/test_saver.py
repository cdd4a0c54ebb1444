"""Saving beside training: the copy is of the moment, and a disk that fails costs a save, not the run."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale.checkpoint import state, step_folders, storage
from esvit_scale.checkpoint.saver import Saver
from esvit_scale.errors import RestartCanHelp
from esvit_scale.train import pretraining
from tests import tiny


def full_disk(monkeypatch: pytest.MonkeyPatch, where: str, times: int) -> None:
    """The first `times` calls of a writing function find the disk full."""
    real, left = getattr(storage, where), [times]

    def write(*arguments: Any, **options: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(storage, where, write)


@pytest.mark.parametrize("where", ["save", "checksums"])
def test_full_disk_costs_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__checkpoint_every=5)
    full_disk(monkeypatch, where, 1)
    assert pretraining.pretrain(config) == 0
    said = (config.run_path / "log.txt").read_text()
    assert "step-00000005: could not be saved: rank 0: No space left on device" in said
    assert "training goes on, and the next save tries again" in said
    kept = sorted(path.name for path in (config.run_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000010", "step-00000015", "step-00000020"]


@pytest.mark.slow
@pytest.mark.alone
def test_disk_that_stays_full_exits_with_75_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 75: nothing that was saved is lost, and the same command goes on from there."""
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"))
    assert pretraining.pretrain(tiny.config(tmp_path / "reference", tmp_path / "shards")) == 0
    with monkeypatch.context() as patch:
        real = storage.save
        patch.setattr(storage, "save", lambda folder, i: real(folder, i) if "10" in folder.name else full())
        with pytest.raises(RestartCanHelp, match="No space left on device; earlier checkpoints are untouched"):
            pretraining.pretrain(config)
    assert step_folders.newest_valid(config.run_path) == config.run_path / "checkpoints" / "step-00000010"
    assert pretraining.pretrain(config) == 0
    assert tiny.rows(config.run_path) == tiny.rows(tmp_path / "reference")


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_saver_writes_the_state_at_the_time_of_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, go_on = torch.arange(5.0), threading.Event()
    taken = state.Snapshot({"student/x": storage.whole_interval(values)}, {"cursor": {"step": 7}})
    monkeypatch.setattr(state, "take_snapshot", lambda *a: taken)
    real = storage.save
    monkeypatch.setattr(storage, "save", lambda *a: (go_on.wait(20), real(*a)))
    config = tiny.config(tmp_path / "run", tmp_path)
    saver = Saver(tmp_path / "run", config)
    saver.start(None, {}, {"step": 7})  # type: ignore[arg-type]
    values.zero_()  # training goes on
    go_on.set()
    saver.wait()
    read = torch.empty(5)
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    storage.load(folder, {"student/x": storage.whole_interval(read)})
    assert torch.equal(read, torch.arange(5.0))
    assert set(json.loads((folder / "state.json").read_text())) == {"cursor", "files", "format_version", "sha256"}


def test_error_in_the_saver_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "take_snapshot", lambda *a: state.Snapshot({}, {"cursor": {"step": 1}}))
    monkeypatch.setattr(state, "write", lambda *a: 1 / 0)
    saver = Saver(tmp_path, tiny.config(tmp_path / "run", tmp_path))
    saver.start(None, {}, {"step": 1})  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    with pytest.raises(ZeroDivisionError):
        saver.start(None, {}, {"step": 2})  # type: ignore[arg-type]
