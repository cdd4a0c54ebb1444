import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from esvit_scale.errors import UserError
from esvit_scale.train import lock as locks
from esvit_scale.train import metrics, pretraining, run_dir, run_records
from esvit_scale.train.lock import Lock
from tests import tiny


def opened(tmp_path: Path, **overrides: object) -> Path:
    config = tiny.config(tmp_path / "run", tmp_path / "shards", **overrides)
    path, _ = run_dir.open_run(config)
    path.mkdir(exist_ok=True)
    run_dir.record_start(path, config)
    return path


def test_another_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(UserError, match=r"seed: 0 → 1.*set name= or run_dir= to start a new run"):
        opened(tmp_path, seed=1)


def test_keys_that_do_not_change_results_may_differ(tmp_path: Path) -> None:
    opened(tmp_path)
    path = opened(tmp_path, train__ds_config="zero3", data__workers=3)
    assert "zero3" in (path / "config.yaml").read_text()


def test_folder_that_is_no_run_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"no run dir, because it has no config.yaml"):
        opened(tmp_path)


def test_failed_start_leaves_no_files(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "runs" / "x", tiny.shards(tmp_path / "shards"), train__global_batch=48)
    with pytest.raises(UserError, match="36 samples"):
        pretraining.pretrain(config)
    config = tiny.config(
        tmp_path / "runs" / "x", tmp_path / "shards", train__ds_config="zero0", train__precision="bf16"
    )
    with pytest.raises(UserError, match="fp32 and autocast only"):
        pretraining.pretrain(config)
    assert not (tmp_path / "runs" / "x").exists()


def test_next_start_removes_the_requeue_marker(tmp_path: Path) -> None:
    path = opened(tmp_path)
    (path / "requeue").write_text("3")
    opened(tmp_path)
    assert not (path / "requeue").exists()


@pytest.mark.parametrize(
    ("content", "starts"),
    [(None, 1), ("{}", 1), ('{"starts": 4}', 5)]
    + [(f'{{"starts": {value}}}', 2) for value in ("null", '"3"', "[1]", "true", "2.5")],
)
def test_start_counts_on_from_whatever_environment_json_holds(tmp_path: Path, content: str | None, starts: int) -> None:
    path = opened(tmp_path)
    (path / "environment.json").unlink()
    if content is not None:
        (path / "environment.json").write_text(content)
    opened(tmp_path)
    assert run_records.read_environment(path)["starts"] == starts


def holder(path: Path, pid: int, heartbeat: float, host: str | None = None, job: str = "") -> None:
    lock = {"host": host or os.uname().nodename, "pid": pid, "slurm_job": job, "heartbeat": heartbeat}
    (path / "lock.json").write_text(json.dumps(lock))


def test_second_writer_is_refused(tmp_path: Path) -> None:
    path = opened(tmp_path)
    other = subprocess.Popen(["sleep", "60"])
    try:
        holder(path, other.pid, time.time())
        with pytest.raises(UserError, match=rf"in use by process {other.pid}"), Lock(path):
            pass
    finally:
        other.kill()
        other.wait()
    with Lock(path) as lock:  # the process is gone: no need to wait for its heartbeat to grow old
        assert lock.held()
    assert not (path / "lock.json").exists()


def test_fresh_heartbeat_of_another_host_is_respected_stale_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WATCH_S", 0.1)
    path = opened(tmp_path)
    holder(path, 1, time.time() - 50, host="elsewhere")
    with pytest.raises(UserError, match="on elsewhere"), Lock(path):
        pass
    holder(path, 1, time.time() - 61, host="elsewhere")
    with Lock(path) as lock:
        assert lock.held()


def test_same_slurm_job_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = opened(tmp_path)
    holder(path, 1, time.time(), host="elsewhere", job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with Lock(path) as lock:
        assert lock.held()


def test_takeover_is_noticed(tmp_path: Path) -> None:
    path = opened(tmp_path)
    with Lock(path) as lock:
        holder(path, 1, time.time(), host="elsewhere")
        assert not lock.held()
    assert (path / "lock.json").exists()  # it is the other one's


def test_metrics_are_cut_at_the_cursor(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    metrics.cut(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
