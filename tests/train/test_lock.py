"""The lock of a run dir between real processes."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import files
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.train import lock as locks
from esvit_scale.train.lock import Lock

ROUNDS = 100
STALE = {"host": "elsewhere", "pid": 1, "slurm_job": "", "heartbeat": 1000.0}
FORK = multiprocessing.get_context("fork")


def contend(root: Path, kind: str, barrier: Any, got: Any, number: int) -> None:
    if kind == "no links":
        os.link = no_link  # type: ignore[assignment]
    locks.WATCH_S = 0.01  # in this process, which was forked for it
    for round_ in range(ROUNDS):
        run = root / str(round_)
        if number == 0:
            run.mkdir()
            if kind == "stale":
                files.write_json(run / "lock.json", STALE)
        lock = Lock(run)
        barrier.wait(60)
        try:
            lock.__enter__()
        except UserError:
            pass
        else:
            got[round_ * 3 + number] = 1 if lock.held() else 2
        barrier.wait(60)
        lock.__exit__()
        barrier.wait(60)


def no_link(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("kind", ["free", "stale", "no links"])
def test_one_of_several_simultaneous_starts_gets_the_lock(tmp_path: Path, kind: str) -> None:
    barrier, got = FORK.Barrier(3), FORK.Array("b", 3 * ROUNDS)
    processes = [FORK.Process(target=contend, args=(tmp_path, kind, barrier, got, i)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    winners = [sorted(got[3 * i : 3 * i + 3]) for i in range(ROUNDS)]
    assert winners == [[0, 0, 1]] * ROUNDS
    left = [path.name for path in tmp_path.rglob(".lock.json*")]
    assert not left


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WATCH_S", 0.5)
    monkeypatch.setattr(locks, "HEARTBEAT_S", 0.05)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(STALE).encode(),
        json.dumps(STALE | {"heartbeat": 4e9}).encode(),
        json.dumps(STALE | {"heartbeat": float("inf")}).encode(),
        b"",
        b"{",
        b"\xff\x00" * 100,
        bytes(300),
        b"[]",
        b'{"host": "elsewhere"}',
        b'{"host": "elsewhere", "pid": "x", "heartbeat": null}',
    ],
)
def test_record_that_is_not_recent_is_watched_then_taken_over(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run" / "lock.json"
    path.parent.mkdir()
    path.write_bytes(content)
    began = time.monotonic()
    with Lock(tmp_path / "run") as lock:
        assert lock.held()
        assert time.monotonic() - began > 0.4


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("ahead_s", "age"), [(5000, "a heartbeat in the future"), (-5000, "heartbeat 5[0-9]* s ago")])
def test_live_holder_with_a_wrong_clock_keeps_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float, age: str
) -> None:
    now = time.time
    holder = Lock(tmp_path / "run")
    monkeypatch.setattr(holder, "_record", lambda: record(holder, now() + ahead_s))
    with holder:
        other = Lock(tmp_path / "run")
        with pytest.raises(UserError, match=rf"{age}\); it lives, and its clock differs"):
            other.__enter__()
        assert holder.held()


def record(lock: Lock, heartbeat: float) -> bytes:
    return json.dumps({**lock._me, "host": "elsewhere", "heartbeat": heartbeat}).ljust(400).encode()


@pytest.mark.usefixtures("quick")
def test_suspended_holder_cannot_take_the_lock_back(tmp_path: Path) -> None:
    """It writes heartbeats to the file that it made, which is no longer the lock."""
    old = Lock(tmp_path / "run")
    old.__enter__()
    old._stop.set()  # suspended
    old._thread.join()
    files.write_json(tmp_path / "run" / "lock.json", json.loads((tmp_path / "run/lock.json").read_text()) | STALE)
    with Lock(tmp_path / "run") as new:
        old._beat()
        assert new.held()
        assert not old.held()
        assert old.lost()
        old.__exit__()
        assert new.held()
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("quick")
def test_heartbeat_continues_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [3]

    def fsync(handle: int) -> None:
        if failures[0]:
            failures[0] -= 1
            raise OSError(28, "No space left on device")

    with Lock(tmp_path / "run") as lock:
        before = json.loads((tmp_path / "run/lock.json").read_text())["heartbeat"]
        monkeypatch.setattr(os, "fsync", fsync)
        deadline = time.monotonic() + 5
        while failures[0]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        assert lock.held()
        assert json.loads((tmp_path / "run/lock.json").read_text())["heartbeat"] > before


@pytest.mark.parametrize("same", ["host", "job only"])
def test_live_process_of_the_same_slurm_job_keeps_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: str
) -> None:
    """Two starts in one `salloc`. (A record of another host was left by the job before its requeue.)"""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with Lock(tmp_path / "run") as first:
        if same == "host":
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*, Slurm job 7"):
                Lock(tmp_path / "run").__enter__()
            assert first.held()
        else:
            first._me["host"] = "elsewhere"
            first._beat()
            with Lock(tmp_path / "run") as second:
                assert second.held()
                assert not first.held()


def test_reused_pid_does_not_count_as_the_holder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    holder = {"host": os.uname().nodename, "pid": os.getpid(), "slurm_job": "", "heartbeat": time.time()}
    files.write_json(tmp_path / "run/lock.json", holder | {"pid_namespace": locks.pid_namespace(), "started": "1"})
    with Lock(tmp_path / "run") as lock:
        assert lock.held()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("call", ["link", "replace"])
def test_answer_lost_by_nfs_is_not_another_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The server answered a request twice, so that the second answer reports the file of the first as existing or moved."""
    (tmp_path / "run").mkdir()
    if call == "replace":
        files.write_json(tmp_path / "run/lock.json", STALE)
    real = getattr(os, call)

    def lost(source: Any, target: Any, **options: Any) -> None:
        real(source, target, **options)
        raise FileExistsError(17, "File exists") if call == "link" else FileNotFoundError(2, "No such file")

    with monkeypatch.context() as patch:
        if call == "replace":
            patch.setattr(Path, "replace", lost)
        else:
            patch.setattr(os, "link", lambda *of: lost(*of) if not Path(of[1]).exists() else real(*of))
        lock = Lock(tmp_path / "run").__enter__()
    assert lock.held()
    lock.__exit__()


@pytest.mark.usefixtures("quick")
def test_blocked_heartbeat_does_not_block_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, answers = threading.Event(), threading.Event()
    monkeypatch.setattr(locks, "LEAVE_S", 0.1)
    lock = Lock(tmp_path / "run").__enter__()
    monkeypatch.setattr(os, "fsync", lambda _: (hangs.set(), answers.wait(20)))
    assert hangs.wait(10)
    began = time.monotonic()
    lock.__exit__()
    assert time.monotonic() - began < 5
    assert lock._thread.is_alive()
    assert not (tmp_path / "run").exists()
    answers.set()
    lock._thread.join(10)


def test_live_container_with_the_same_host_name_keeps_the_lock(tmp_path: Path) -> None:
    """Its process ids have no meaning in this container."""
    (tmp_path / "run").mkdir()
    holder = {"host": os.uname().nodename, "pid": 4_000_000, "slurm_job": "", "heartbeat": time.time()}
    files.write_json(tmp_path / "run/lock.json", holder | {"pid_namespace": "pid:[1]", "token": "x"})
    with pytest.raises(UserError, match="in use by process 4000000"):
        Lock(tmp_path / "run").__enter__()
    files.write_json(tmp_path / "run/lock.json", holder | {"pid_namespace": locks.pid_namespace(), "token": "x"})
    with Lock(tmp_path / "run") as lock:
        assert lock.held()


def test_folder_in_place_of_the_lock_is_one_error_line(tmp_path: Path) -> None:
    (tmp_path / "run" / "lock.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lock.json: is a folder, but a run's lock is a file; move it away"):
        Lock(tmp_path / "run").__enter__()


@pytest.mark.usefixtures("quick")
def test_stale_claim_does_not_block_a_takeover(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run/lock.json", STALE)
    digest = hashlib.sha256((tmp_path / "run/lock.json").read_bytes()).hexdigest()[:16]
    claim = tmp_path / "run" / f".lock.json.{digest}-0.claim"
    claim.touch()
    os.utime(claim, (1000, 1000))
    with Lock(tmp_path / "run") as lock:
        assert lock.held()
    assert not claim.exists()


@pytest.mark.parametrize(("noticed_by", "last_row"), [("heartbeat", 4), ("save", 9)])
def test_run_that_was_taken_over_exits_with_75(tmp_path: Path, noticed_by: str, last_row: int) -> None:
    """It writes no row after it has noticed, not even one that was begun: metrics.jsonl is the other process's now."""
    from esvit_scale.train import pretraining
    from esvit_scale.train.trainer import Trainer
    from tests import tiny

    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), train__log_every=1)
    real = Trainer.train_step

    def train_step(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
        if trainer.step == 5:
            files.write_json(tmp_path / "run/lock.json", STALE | {"heartbeat": time.time(), "token": "other"})
            if noticed_by == "heartbeat":
                assert not trainer._run.lock.held()
        return real(trainer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(RestartCanHelp, match="another process took this run over"):
            pretraining.pretrain(config)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert json.loads((tmp_path / "run/lock.json").read_text())["token"] == "other"
    assert tiny.rows(tmp_path / "run")[-1]["step"] == last_row
