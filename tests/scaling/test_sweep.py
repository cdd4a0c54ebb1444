"""A sweep from its file to runs.csv: which cells it has, which it refuses, and that it survives being killed."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.data import manifest as manifests
from esvit_scale.errors import UserError
from esvit_scale.models.swin_variants import SHAPES
from esvit_scale.objective import costs
from esvit_scale.objective.schedules import Schedules
from esvit_scale.scaling import cells, runner, shapes, sweep_file
from esvit_scale.scaling.plan import Speed
from esvit_scale.scaling.sweep_file import Size
from esvit_scale.train import pretraining
from esvit_scale.train.row_file import read_rows
from tests import launcher, tiny

SPEED = Speed(1.0, 0.5, "given")
SMALL = [{"embed_dim": 32, "depths": [1, 1, 1]}, {"embed_dim": 32, "depths": [1, 1, 4]}]


def write(tmp_path, **values):
    """A sweep over tiny runs; the base's schedules count 2 of its 5 epochs as warm-up."""
    shards = tmp_path / "shards"
    if not shards.exists():
        tiny.shards(shards)
    base = tiny.config(tmp_path / "unused", shards, optim__warmup_epochs=2.0)
    tiny.write_config(tmp_path / "base.yaml", base)
    content = {
        "name": "s",
        "out": str(tmp_path / "out"),
        "base": str(tmp_path / "base.yaml"),
        "sizes": SMALL,
        "budgets": [4e9, 8e9],
        "machine": {"gpu_memory": 8},
        "limits": {"min_steps": 2},
    } | values
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def cells_of(path):
    sweep = sweep_file.read(path)
    return sweep, cells.cells(sweep, str(path), SPEED)


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_named_sizes_are_on_the_ladder():
    steps = set(shapes.ladder())
    for name in ("swin_t", "swin_s", "swin_b", "swin_l", "swinv2_h", "swinv2_1b"):
        assert shapes.Shape(SHAPES[name].embed_dim, SHAPES[name].depths) in steps
        assert shapes.Shape(SHAPES[name].embed_dim, SHAPES[name].depths).heads == SHAPES[name].heads


def test_ladder_grows_with_heads_of_32_channels():
    for shape in shapes.ladder():
        assert [shape.embed_dim * 2**i / h for i, h in enumerate(shape.heads)] == [32] * 4
        assert shape.depths[2] >= max(shape.depths[0], shape.depths[1], shape.depths[3])
    counts = [count for _, count in shapes.ladder_with_counts("swin_t", 7, 224)]
    assert counts == sorted(counts)


@pytest.mark.parametrize("target", [28e6, 40e6, 60e6, 87e6, 1.5e8, 4e8, 1e9])
def test_shape_of_a_parameter_target_is_near_it(target):
    base = configs.resolve("swin_t")
    shape = shapes.shape_of(Size(params=target), base)
    sized = configs.resolve("swin_t", [f"model.{k}={v}" for k, v in shape.overrides.items()])
    assert costs.parameters(sized).trunk == pytest.approx(target, rel=0.2)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"params": 1e12}, "no shape of the ladder has about 1e"),
        ({"embed_dim": 100}, "not a multiple of 32; nearest: 96"),
        ({"trunk": "swin_x"}, "unknown trunk 'swin_x'; did you mean"),
        ({"trunk": "swinv2_t"}, "another trunk family"),
    ],
)
def test_impossible_sizes_are_refused(size, message):
    with pytest.raises(UserError, match=message):
        shapes.shape_of(Size(**size), configs.resolve("swin_t"))


# --- the file and its cells ------------------------------------------------------------------------------------------


PATIENT = ["train.patience=3", "train.knn_every=1", "data.held_out=x"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": [1e9]}, "unknown key budget; did you mean 'budgets'"),
        ({"budgets": []}, "budgets: expected at least one number"),
        (
            {"sizes": [{"params": 1e6, "embed_dim": 32}]},
            "give one of trunk, params, embed_dim and model, got params and",
        ),
        ({"lr": {"exponent": -0.2}}, "an exponent needs at_params"),
        ({"machine": {"gpu": 2}}, "unknown key machine.gpu"),
        ({"seeds": [0, 0]}, "two cells are the same run"),
        ({"evaluate": {"train": "nowhere", "test": "nowhere"}}, "nowhere: no such folder"),
        ({"sizes": [{"model": {"embed_dims": 32}}]}, "unknown key model.embed_dims; did you mean 'model.embed_dim"),
        (
            {"sizes": [SMALL[0] | {"budgets": [5e9]}]},
            r"sizes.0.budgets: 5e\+09 is none of the sweep's budgets, 4e\+09, 8e",
        ),
        ({"overrides": PATIENT}, "train.patience: a sweep needs runs of their full length"),
    ],
)
def test_bad_sweep_file_is_one_line(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as error:
        cells_of(write(tmp_path, **values))
    assert "\n" not in str(error.value)


def test_size_with_budgets_has_cells_for_these_alone(tmp_path):
    _, found = cells_of(write(tmp_path, sizes=[SMALL[0], SMALL[1] | {"budgets": [8e9]}]))
    assert [(cell.shape.depths[2], cell.budget) for cell in found] == [(1, 4e9), (1, 8e9), (4, 8e9)]


def test_any_trunk_can_be_swept(tmp_path):
    """A ladder exists for Swins alone; other trunks take keys of `model`."""
    sizes = [{"model": {"embed_dim": width, "depths": [1, 1, 1]}} for width in (8, 16)]
    resnet = ["model.trunk=resnet50", "model.window=7", "model.heads=null"]
    _, found = cells_of(write(tmp_path, sizes=sizes, overrides=resnet, budgets=[4e9]))
    small, large = (cell.plan.numbers["trunk_params"] for cell in found)
    assert 0 < small < large / 3
    assert " 8" in cells.table(found, sweep_file.read(tmp_path / "sweep.yaml"))
    with pytest.raises(UserError, match="resnet50 is no Swin"):
        cells_of(write(tmp_path, sizes=[{"params": 1e6}], overrides=resnet))


def test_cells_use_their_flop_budgets(tmp_path):
    _, found = cells_of(write(tmp_path, seeds=[0, 1]))
    assert len(found) == 2 * 2 * 2
    for cell in found:
        per_step = costs.image_flops(cell.config) * cell.config.train.global_batch
        assert cell.flops == cell.config.train.steps * per_step
        assert abs(cell.flops - cell.budget) <= per_step / 2
        assert cell.problems == []
    assert len({str(cell.path) for cell in found}) == 8


def test_warmup_scales_with_the_length_of_the_run(tmp_path):
    _, found = cells_of(write(tmp_path))
    shares = [cell.config.optim.warmup_epochs * 4 / cell.steps for cell in found]  # 4 steps an epoch
    assert shares == pytest.approx([2 * 4 / 20] * 4)
    _, kept = cells_of(write(tmp_path, horizon="keep"))
    assert {cell.config.optim.warmup_epochs for cell in kept} == {2.0}


def test_branches_share_schedules_until_their_cooldown(tmp_path):
    """The longer run's schedules equal the shorter's until its branch point, and it pays for its own steps only."""
    _, found = cells_of(write(tmp_path, horizon="branches", sizes=SMALL[:1]))
    short, long = found
    assert (short.parent, long.parent.name) == (None, short.name)
    a, b = Schedules(short.config, 4), Schedules(long.config, 4)
    moving = ("lr", "weight_decay", "ema_momentum", "teacher_temp", "last_layer_frozen")
    for step in range(short.branch_step + 1):
        assert all(getattr(a, name)(step) == getattr(b, name)(step) for name in moving)
    assert a.lr(short.branch_step + 1) < b.lr(short.branch_step + 1)
    share = (long.steps - short.branch_step) / long.steps
    assert long.gpu_hours == pytest.approx(share * long.plan.numbers["gpu_hours"])


@pytest.mark.slow
def test_branched_run_equals_the_uninterrupted_run(tmp_path):
    """Continued from the shorter run's branch point, a run logs what it would have logged by itself."""
    path = write(tmp_path, horizon="branches", sizes=SMALL[:1])
    _, (_, long) = cells_of(path)
    assert start("submit", "--local", str(path)).wait(timeout=200) == 0
    alone = tmp_path / "alone.yaml"
    alone.write_text(configs.dump(long.config).replace(str(long.path), str(tmp_path / "alone")))
    launcher.run(*launcher.CLI, "pretrain", str(alone), timeout=120)
    branched, whole = tiny.rows(long.path), tiny.rows(tmp_path / "alone")
    assert len(branched) == long.steps - long.parent.branch_step
    assert branched == whole[-len(branched) :]


def test_learning_rate_follows_its_power_law(tmp_path):
    rule = {"value": 1e-3, "exponent": -0.5, "at_params": 1e5}
    _, found = cells_of(write(tmp_path, lr=rule))
    for cell in found:
        expected = 1e-3 * (cell.plan.numbers["trunk_params"] / 1e5) ** -0.5
        assert cell.config.optim.lr == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"limits": {"min_steps": 1000}}, "fewer than limits.min_steps=1000"),
        ({"limits": {"min_steps": 2, "max_epochs": 0.1}}, "more than limits.max_epochs=0.1"),
        ({"machine": {"gpu_memory": 1e-3}}, "does not fit"),
        (
            {"unique_images": [15]},
            "unique_images 15: no number of the set's first shards holds exactly that many images; nearest: 10",
        ),
        ({"horizon": "keep", "budgets": [1e9]}, "warms up for"),
    ],
)
def test_cells_outside_the_limits_are_refused(tmp_path, values, problem, capsys):
    path = write(tmp_path, **values)
    _, found = cells_of(path)
    assert all(any(problem in p for p in cell.problems) for cell in found)
    assert cli.main(["sweep", "submit", "--local", str(path)]) == 2
    assert "every cell is refused" in capsys.readouterr().err


def test_unique_images_limit_the_data_not_the_steps(tmp_path):
    sweep, found = cells_of(write(tmp_path, unique_images=[None, 20]))
    assert [cell.unique_images for cell in found] == [36, 20] * 4
    assert found[0].images_seen == found[1].images_seen
    runner.prepare(found[1], sweep, tmp_path / "shards")
    part = manifests.load(tmp_path / "out" / "data" / "first-20")
    manifests.check_sizes(part)
    assert part.samples == 20
    assert part.shards == manifests.load(tmp_path / "shards").shards[:2]


def test_sweep_plan_prints_costs(tmp_path, capsys):
    assert cli.main(["sweep", "plan", str(write(tmp_path, machine={"gpu_memory": 16, "tflops": 100}))]) == 0
    assert re.search(r"4 cells; \S+ GPU hours on 1 GPU\(s\) a cell \(estimate, at 100 TFLOP/s", capsys.readouterr().out)


def test_sweep_plan_without_a_known_rate_asks_for_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["sweep", "plan", str(write(tmp_path))]) == 0
    text = capsys.readouterr().out
    assert re.search(r"4 cells; \S+ FLOPs; give machine.tflops in the sweep file for GPU hours", text)
    assert cli.main(["sweep", "plan", str(write(tmp_path)), "--json"]) == 0
    assert {cell["gpu_hours"] for cell in json.loads(capsys.readouterr().out)} == {None}


@pytest.mark.parametrize("sbatch", [None, "#!/bin/sh\necho noise >&2; echo 'sbatch: fatal: no cluster' >&2; exit 1\n"])
def test_submit_without_slurm_is_one_line(tmp_path, capsys, monkeypatch, sbatch):
    (tmp_path / "bin").mkdir()
    if sbatch:
        (tmp_path / "bin" / "sbatch").write_text(sbatch)
        (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert cli.main(["sweep", "submit", str(write(tmp_path))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--local" in line
    assert not sbatch or "no cluster" in line


def test_submit_says_what_is_wrong_and_nothing_else(tmp_path, capsys):
    """The advice to run on this machine is for a job that cannot be submitted."""
    path = str(write(tmp_path, budget=[1e9]))
    assert cli.main(["sweep", "submit", path]) == 2
    assert "--local" not in capsys.readouterr().err
    assert cli.main(["sweep", "submit", str(write(tmp_path)), "--local", "--gpus-per-node", "8"]) == 2
    assert "--gpus-per-node: is for a Slurm job" in capsys.readouterr().err
    refused = str(write(tmp_path, limits={"min_steps": 10**6}))
    assert cli.main(["sweep", "submit", refused]) == 2
    assert "every cell is refused" in capsys.readouterr().err


def test_state_of_a_failed_slurm_cell_is_failed(tmp_path, monkeypatch):
    """By what its script noted at the end, until a later job starts; by what the training said, where it could."""
    sweep, found = cells_of(write(tmp_path))
    cell = found[0]
    records = cell.path / "slurm"
    records.mkdir(parents=True)
    (records / "starts.tsv").write_text("2026-01-01T10:00:00Z\t7_0\t0\tnode1\n")
    assert runner.state(cell, sweep).word == "waiting"
    (records / "ended.tsv").write_text("2026-01-01T10:05:00Z\t7_0\t137\n")
    assert runner.state(cell, sweep) == ("failed", 0, f"exit code 137 (job 7_0; {records / '7_0'})")
    (cell.path / "lock.json").write_text(json.dumps({"pid": 1, "heartbeat": time.time()}))  # another job works on it
    assert runner.state(cell, sweep).word == "started"
    (cell.path / "lock.json").unlink()
    with (records / "starts.tsv").open("a") as file:
        file.write("2026-01-01T11:00:00Z\t8_0\t0\tnode1\n")
    assert runner.state(cell, sweep).word == "waiting"

    def refuse(config):
        raise UserError("data.train: not there")

    monkeypatch.setattr(pretraining, "pretrain", refuse)
    monkeypatch.setattr(runner, "prepare", lambda *_: None)
    with pytest.raises(UserError):
        runner.run_cell(cell, sweep, tmp_path)
    assert runner.state(cell, sweep) == ("failed", 0, "data.train: not there")


def test_array_ranges_are_compressed():
    assert runner.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


# --- for real --------------------------------------------------------------------------------------------------------


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "esvit_scale", "sweep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=launcher.environment(),
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_sweep_resumes_and_is_fitted(tmp_path):
    """Four cells; killed in the second, one spoilt: the rest finishes, the spoilt one is named, and the fit works."""
    shards = str(tiny.shards(tmp_path / "shards"))
    path = write(
        tmp_path,
        budgets=[1.2e10, 2.4e10],
        evaluate={"train": shards, "test": shards, "k": 5, "checkpoints": 4, "whole": True},
    )
    sweep, found = cells_of(path)
    ordered = sorted(found, key=lambda c: c.flops)
    spoilt = ordered[-1]
    spoilt.path.mkdir(parents=True)
    shutil.copy(tmp_path / "base.yaml", spoilt.path / "config.yaml")

    process = start("submit", "--local", str(path))
    second, deadline = ordered[1], time.monotonic() + 400
    first_of_four = cells.evaluated_steps(second, sweep)[0]
    while len(read_rows(second.path / "metrics.jsonl")) < first_of_four + 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert runner.state(ordered[0], sweep).word == "finished"
    evaluated = (ordered[0].path / "knn.json").stat().st_mtime_ns
    assert json.loads((ordered[0].path / "knn.json").read_text())["whole_images"]

    process = start("submit", "--local", str(path))
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1, said
    assert ordered[0].name not in said.split("\n[")[0]  # finished: not run again
    assert (ordered[0].path / "knn.json").stat().st_mtime_ns == evaluated
    assert [runner.state(c, sweep).word for c in ordered] == ["finished"] * 3 + ["failed"]
    assert "holds a run of another config" in runner.state(spoilt, sweep).reason
    log = (tmp_path / "out" / "logs" / f"{second.name}.log").read_text()
    assert "resumed from" in log

    shutil.rmtree(spoilt.path)
    process = start("submit", "--local", str(path))
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "4 finished" in said

    assert cli.main(["sweep", "collect", str(path)]) == 0
    table = tmp_path / "out" / "runs.csv"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert len({row["loss"] for row in rows}) == 16  # each row has the loss of its own step
    for i, cell in enumerate(found):
        steps = cells.evaluated_steps(cell, sweep)
        assert steps == [(i + 1) * (cell.steps // 4) for i in range(3)] + [cell.steps]
        for row, step in zip(rows[4 * i : 4 * i + 4], steps, strict=True):
            assert (row["cell"], int(row["step"]), int(row["steps"])) == (cell.name, step, cell.steps)
            assert int(row["params"]) == costs.parameters(cell.config).trunk
            assert float(row["flops"]) == pytest.approx(cell.flops * step / cell.steps, rel=1e-12)
            assert int(row["images_seen"]) == step * cell.config.train.global_batch
            assert 0 <= float(row["knn_error"]) <= 100
        assert float(row["flops"]) == cell.flops
    out = ["--out", str(tmp_path / "fit")]
    assert cli.main(["sweep", "fit", str(table), "--x", "flops", "--y", "loss", "--resamples", "50", *out]) == 0
    assert cli.main(["sweep", "report", str(tmp_path / "fit")]) == 0
    assert (tmp_path / "fit" / "scaling.html").stat().st_size > 20_000
    assert json.loads((tmp_path / "fit" / "fit.json").read_text())["runs"] == 4
