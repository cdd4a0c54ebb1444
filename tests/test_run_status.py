"""`esvit-scale status` of runs on this machine and under Slurm, and what a start records for it."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esvit_scale import cli, run_status
from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.train import metrics, run_dir, run_records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 50 steps that was stopped after step 30 and started again."""
    run = tmp_path / "runs" / "photos"
    run.mkdir(parents=True)
    config = configs.resolve("demo", ["train.steps=50", f"run_dir={run}"])
    run_dir.record_start(run, config)
    run_dir.record_start(run, config)
    rows = [{"step": step, "images_per_s": 4.0 * step, "step_s": 2.0} for step in (10, 20, 30)]
    rows[1]["knn_top1"] = 0.525
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "lock.json").write_text(json.dumps({"pid": 1, "heartbeat": time.time()}))
    return run


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert cli.main(["status", *words]) == 0
    return {line[:10].strip(): line[10:] for line in capsys.readouterr().out.splitlines()}


def test_status_of_a_run_without_slurm(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "log.txt").write_text("10:00:00 resumed\n10:00:01 warning: the rate fell\n10:00:02 no warning: here\n")
    assert shown(capsys, str(run)) == {
        "run": str(run),
        "state": "RUNNING",
        "step": "30 of 50",
        "images/s": "120.0",
        "ETA": "0:00:40 of training",
        "k-NN": "52.5 % at step 20",
        "restarts": "1",
        "warnings": "1; the last: the rate fell",
    }
    (run / "lock.json").unlink()
    (run / "summary.json").write_text('{"finished": true}')
    found = shown(capsys, str(run))
    assert (found["state"], found["step"], "ETA" in found) == ("FINISHED", "30 of 50", False)  # it ended early


@pytest.mark.parametrize(
    ("latest", "step", "eta"),
    [("step-00000034", "34", "0:00:32"), ("step-00000099", "30", "0:00:40"), ("step-x", "30", "0:00:40")],
)
def test_step_is_the_saved_one_where_a_stop_came_between_rows(
    run: Path, capsys: pytest.CaptureFixture[str], latest: str, step: str, eta: str
) -> None:
    (run / "checkpoints" / "step-00000034").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text(f"{latest}\n")
    found = shown(capsys, str(run))
    assert (found["step"], found["ETA"]) == (f"{step} of 50", f"{eta} of training")


def test_status_imports_no_torch(run: Path) -> None:
    code = (
        "import sys; from esvit_scale.cli import main; main(sys.argv[1:]); print({'torch', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "status", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines()[-1] == "set()"


def test_status_of_a_run_under_slurm(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # no scontrol
    (run / "slurm").mkdir()
    (run / "slurm/starts.tsv").write_text("t\t7\t0\tnode1\nt\t7\t1\tnode2\nt\t8\t0\tnode3\n")
    (run / "slurm/failures.tsv").write_text("t\t7\t75\tstep-00000010\n")
    found = shown(capsys, str(run))
    assert (found["job"], found["restarts"], found["k-NN"]) == ("8", "2, 1 after a failure", "52.5 % at step 20")
    assert cli.main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 30


def test_status_without_a_run_lists_all(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[1])
    (run.parent / "empty").mkdir()
    new = run.parent / "new"
    new.mkdir()
    run_dir.record_start(new, configs.resolve("demo"))
    os.utime(new / "config.yaml", (1, 1))
    assert cli.main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "step", "images/s", "k-NN", "warnings"]
    assert [line.split() for line in lines[1:]] == [  # the one that was written to last first
        ["runs/photos", "RUNNING", "30", "of", "50", "120.0", "52.5", "%", "0"],
        ["runs/new", "STOPPED", "0", "of", "400", "0"],
    ]


def damage(run: Path, name: str) -> None:
    """Copy a run beside itself, with one of its files damaged: `name` says how."""
    bad = shutil.copytree(run, run.parent / name)
    if name == "rows":
        (bad / "metrics.jsonl").unlink()
        (bad / "metrics.jsonl").mkdir()
    elif name == "starts":
        (bad / "slurm").mkdir()
        (bad / "slurm/starts.tsv").touch()
    else:
        (bad / "config.yaml").write_text("train: {epoch: 3}\nseed: x\n")


def test_runs_that_cannot_be_read_are_rows_of_the_table(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parents[1])
    reasons = {"rows": "metrics.jsonl: cannot be read", "starts": "no job has started here", "config": "train.epoch"}
    for name in reasons:
        damage(run, name)
    assert cli.main(["status"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["runs/photos"].split()[1:] == ["RUNNING", "30", "of", "50", "120.0", "52.5", "%", "0"]
    assert len(lines) == 1 + len(reasons)
    for name, reason in reasons.items():
        assert lines[f"runs/{name}"].split()[1] == "UNREADABLE:"
        assert reason in lines[f"runs/{name}"]
        assert cli.main(["status", f"runs/{name}"]) == 2
    capsys.readouterr()
    assert cli.main(["status", "--json"]) == 0
    states = [one["state"] for one in json.loads(capsys.readouterr().out)]
    assert sorted(states) == ["RUNNING", *["UNREADABLE"] * len(reasons)]


def test_status_of_no_run_is_one_line(run: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="holds no run; did you mean 'photos'"):
        run_status.status(run.parent / "photo")
    monkeypatch.chdir(tmp_path.parent)
    assert cli.main(["status"]) == 2
    assert capsys.readouterr().err == "esvit-scale: error: runs/: holds no run; name one: esvit-scale status RUN\n"


def test_starts_of_a_run_of_an_older_version_are_counted_from_one(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"host": "old"}')
    run_dir.record_start(tmp_path, configs.resolve("demo"))
    assert run_records.read_environment(tmp_path)["starts"] == 2


def test_log_file_marks_warnings(tmp_path: Path) -> None:
    log = logging.getLogger("esvit_scale")
    before = (log.handlers[:], log.propagate, log.level)
    try:
        metrics.start_logging(tmp_path, active=True)
        log.info("step %d", 1)
        log.warning("the rate %s", "fell")
    finally:
        for handler in log.handlers:
            handler.close()
        log.handlers[:], log.propagate, _ = before
        log.setLevel(before[2])
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[9:] for line in lines] == ["step 1", "warning: the rate fell"]
