"""A run that was stopped and resumed equals an uninterrupted one, bit for bit on a CPU."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from esvit_scale import cli
from esvit_scale.config import Config
from esvit_scale.train import pretraining, run_dir, run_records, signals
from tests import launcher, tiny
from tests.nursery import Process


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    run = tmp_path_factory.mktemp("straight") / "run"
    assert pretraining.pretrain(tiny.config(run, data)) == 0
    return tiny.rows(run)


def start_and_wait_for_step(config_path: Path, run: Path, step: int) -> Process:
    process = launcher.fork(*launcher.CLI, "pretrain", config_path)
    deadline = time.monotonic() + 120
    while len(tiny.rows(run)) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)
    return process


def test_killed_and_resumed_run_equals_uninterrupted_run(
    data: Path, straight: list[dict[str, object]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = tiny.write_config(tmp_path / "c.yaml", tiny.config(run, data, train__steps=20))
    process = start_and_wait_for_step(path, run, 10)
    while not (run / "checkpoints" / "latest").exists():  # written beside training
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000010"
    assert pretraining.pretrain(tiny.config(run, data)) == 0
    assert tiny.rows(run) == straight


def endless(run: Path, data: Path) -> Config:
    """Return the config of a run that is long enough to be met while it runs."""
    return tiny.config(run, data, train__steps=2000, train__checkpoint_every=2000)


def test_ctrl_c_saves_and_same_command_resumes(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_and_wait_for_step(tiny.write_config(tmp_path / "c.yaml", endless(run, data)), run, 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert_saved_before_its_end(run)
    assert not (run / "requeue").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_schedulers_signal_saves_and_asks_for_a_requeue(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    path = tiny.write_config(tmp_path / "c.yaml", endless(run, data))
    over = threading.Event()

    def send_at_step_3() -> None:
        while len(tiny.rows(run)) < 3 and not over.wait(0.01):
            pass
        if not over.is_set():  # the handlers of a run that failed are gone
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_at_step_3)
    sender.start()
    try:
        with signals.installed():
            assert cli.main(["pretrain", str(path)]) == 0
    finally:
        over.set()
        sender.join()
    assert "the same command continues" in capfd.readouterr().err
    assert_saved_before_its_end(run)
    assert (run / "requeue").exists()


def assert_saved_before_its_end(run: Path) -> None:
    saved = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    assert 3 <= saved < 2000
    assert len(tiny.rows(run)) == saved
    assert not (run / "lock.json").exists()
    assert run_records.read_summary(run)["finished"] is False


def test_finished_run_is_left_unchanged(data: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", data, train__steps=2)
    assert pretraining.pretrain(config) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert pretraining.pretrain(config) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_unreadable_record_is_an_error_on_every_rank(data: Path, tmp_path: Path) -> None:
    """Only rank 0 opens the records. The other rank must not wait in a collective that rank 0 never reaches."""
    run = tmp_path / "run"
    (run / "metrics.jsonl").mkdir(parents=True)
    config = tiny.config(run, data)
    run_dir.record_start(run, config)
    path = tiny.write_config(tmp_path / "c.yaml", config)
    ranks = launcher.start_ranks(2, *launcher.CLI, "pretrain", path)
    errors = [process.communicate(timeout=100)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], errors
    assert "metrics.jsonl: cannot be read: Is a directory" in errors[0]  # rank 0 speaks for all
    assert "Traceback" not in "".join(errors)
