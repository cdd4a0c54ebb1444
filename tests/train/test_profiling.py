"""`train.profile`: the trace names the parts of a step, is written once, and never costs the run."""

import errno
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import ranges
from esvit_scale.parallel import compilation
from esvit_scale.train import pretraining, profiling
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_records import read_summary
from tests import tiny


def run(folder: Path, **overrides: Any) -> Path:
    shards = folder / "shards"
    if not shards.exists():
        tiny.shards(shards)
    values = {"train__steps": 9, "train__profile": 2, "train__checkpoint_every": 7} | overrides
    config = tiny.config(folder / "run", shards, **values)
    assert pretraining.pretrain(config) == 0
    return folder / "run"


def trace_of(run_dir: Path) -> list[dict[str, Any]]:
    with gzip.open(run_dir / "profile" / "trace.json.gz") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


@pytest.mark.parametrize(
    ("stage", "compiled"),
    [
        ("zero1", False),
        pytest.param("zero3", False, marks=pytest.mark.slow),
        pytest.param("zero1", True, marks=pytest.mark.slow),
    ],
)
def test_trace_names_the_parts_of_the_traced_steps(tmp_path, monkeypatch, stage, compiled):
    tracing = []
    forward = profiling.ranges.trace
    monkeypatch.setattr(ranges, "trace", lambda on: (tracing.append(on), forward(on)))
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # which generates no code, a matter of minutes
    found = run(tmp_path, train__ds_config=stage, train__compile=compiled)
    assert tracing == [True, False]
    names = [event["name"] for event in trace_of(found) if event.get("cat") == "user_annotation"]
    of_every_run = [name for name in profiling.RANGES if not name.startswith("Gram")]
    for name in of_every_run:
        assert names.count(name) == (1 if name == "copy for the checkpoint" else 2), name
    table = (found / "profile" / "operators.txt").read_text()
    assert table.startswith("2 steps; milliseconds per step")
    parts, _, operators = table.partition("operator, ")
    assert [name for name in of_every_run if name not in parts] == []
    assert "aten::" in operators
    assert len(operators.splitlines()) == 1 + profiling.OPERATORS
    assert {path.name for path in (found / "profile").iterdir()} == {"trace.json.gz", "operators.txt"}


def test_resume_and_runs_without_the_key_trace_nothing(tmp_path, capsys):
    found = run(tmp_path, train__profile=None)
    assert not (found / "profile").exists()
    run(tmp_path, train__steps=18)
    first = (found / "profile" / "trace.json.gz").stat().st_mtime_ns
    run(tmp_path, train__steps=27)
    assert (found / "profile" / "trace.json.gz").stat().st_mtime_ns == first
    assert "is there from an earlier start" in (found / "log.txt").read_text()


@pytest.mark.slow
def test_run_that_ends_before_the_traced_steps_writes_what_it_has(tmp_path):
    found = run(tmp_path, train__steps=6, train__profile=50)
    assert [e["name"] for e in trace_of(found)].count("backward") == 1
    found = run(tmp_path / "shorter", train__steps=4)
    assert not (found / "profile").exists()


def full(*args: Any, **options: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half(self: Any, path: str) -> None:
    Path(path).write_text('{"traceEvents": [{"name"')


@pytest.mark.parametrize(
    ("what", "broken", "said"),
    [
        ("gzip.open", full, "No space left on device"),
        pytest.param(
            "torch.profiler.profile.export_chrome_trace", half, "the file is incomplete", marks=pytest.mark.slow
        ),
        pytest.param("torch.profiler.profile.start", full, "No space left on device", marks=pytest.mark.slow),
    ],
)
def test_trace_that_cannot_be_written_costs_the_trace_alone(tmp_path, monkeypatch, what, broken, said):
    monkeypatch.setattr(what, broken)
    found = run(tmp_path)
    assert read_summary(found)["finished"]
    (line,) = [line for line in (found / "log.txt").read_text().splitlines() if "train.profile" in line]
    assert "no trace" in line
    assert said in line
    assert not list((found).glob("profile/*trace*"))
    assert not ranges._tracing


def test_rows_have_memory_and_the_time_stopped_for_checkpoints(tmp_path, caplog):
    logging.getLogger("esvit_scale").setLevel(logging.WARNING)
    found = run(tmp_path, train__profile=None)
    rows = read_rows(found / "metrics.jsonl")
    memory = [row["peak_memory_gib"] for row in rows]
    assert memory == sorted(memory)
    assert 0.1 < memory[0] < 100
    stopped = {row["step"]: row["save_s"] for row in rows}
    assert [step for step, seconds in stopped.items() if seconds > 0] == [8]  # saved at step 7, after its row
    assert stopped[8] <= read_summary(found)["save_s"]
    assert all(row["data_wait_s"] >= 0 for row in rows)
