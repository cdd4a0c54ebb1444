"""What a run shows: the header before torch, a line per row in log.txt everywhere, a bar on a terminal, and ctrl-C."""

import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from esvit_scale import config as configs
from esvit_scale import presets
from esvit_scale.data import manifest as manifests
from esvit_scale.errors import UserError
from esvit_scale.train import console, header, metrics, pretraining, signals
from esvit_scale.train.trainer import Trainer
from tests import launcher, tiny

ROW: dict[str, Any] = {"step": 2, "loss": 5.0, "loss_view": 4.0, "loss_region": 6.0, "images_per_s": 12.5}


def shown_on(run: Path, is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Log two rows of a run; return what the console shows and the content of log.txt."""
    monkeypatch.setattr(sys, "stderr", file := (run / "console").open("w+"))
    monkeypatch.setattr(file, "isatty", lambda: is_terminal, raising=False)
    run.joinpath("log.txt").unlink(missing_ok=True)
    metrics.start_logging(run, active=True)
    display = console.Console(10, 0)
    display.row({"step": 0, "images_seen": 0, "knn_top1": 0.25, "knn_top1_pixels": 0.5})
    display.advance(2)
    display.row(ROW | {"data_wait_s": 0.25, "step_s": 1.0, "knn_top1": 0.375})
    logging.getLogger("esvit_scale").warning("a warning")
    display.close()
    file.flush()
    return (run / "console").read_text(), (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("held_out", "every", "expected"), [("val", 2, True), ("other", 2, False), ("val", None, False)]
)
def test_rows_after_a_resume_show_the_last_accuracy(
    held_out: str, every: int | None, expected: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.config(tmp_path, tmp_path, data__held_out=held_out, train__knn_every=every)
    rows = [{"step": 0, "knn_top1": 0.25, "knn_held_out": "val"}, ROW | {"knn_top1": 0.375}, ROW | {"step": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger = metrics.MetricLogger(tmp_path, 10, True, config)
    logger.open(3)
    with caplog.at_level(logging.INFO, logger="esvit_scale"):
        logger.row(ROW | {"step": 4})
    logger.close()
    assert ("· k-NN 37.5 % ·" in caplog.text) == expected


@pytest.mark.parametrize("is_terminal", [True, False])
def test_log_file_has_every_row(is_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, logged = shown_on(tmp_path, is_terminal, monkeypatch)
    row = "loss 5.0000 (view 4.0000, region 6.0000) · 12.5 images/s · data wait 25% · k-NN 37.5 %"
    first = "step 0/10 · k-NN 25.0 % on held-out images with the untrained trunk; 50.0 % with raw pixels"
    assert f"step 2/10 · {row} · ETA" in logged
    assert first in logged
    assert "a warning" in logged
    assert row in said
    assert first in said
    assert "a warning" in said
    assert (f"step 2/10 · {row}" in said) == (not is_terminal)  # the bar has the step
    assert ("2/10 [" in said) == is_terminal
    assert ("the loss follows with the first logged step" in said) == is_terminal


def test_duration_is_estimated_after_the_first_steps(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 60.0, 62.0, 64.0, 66.0, 68.0])  # the first step takes a minute, the others 2 s
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "esvit_scale"):
        display = console.Console(1804, 0)
        for step in (1, 2, 3, 4, 5):
            display.advance(step)
    (message,) = caplog.messages
    assert message.startswith("2 s a step: 1:00:00 for the 1800 steps left, until about ")


def test_header_says_what_is_trained(tmp_path: Path) -> None:
    data = tiny.shards(tmp_path / "shards")
    config = tiny.config(tmp_path / "run", data, train__steps=None, train__epochs=3)
    said = "\n".join(header.lines(config, "tiny.yaml seed=0"))
    for part in (
        "tiny.yaml seed=0",
        f"{tmp_path / 'run'}: starts a run",
        f"{data}: 36 images",
        "recipe     preset small fits 36 images in crops of 32 pixels (docs/recipes.md)",
        "2×32 + 4×16 pixels",
        "swin_t, window 4, embed_dim 16, depths 1-1-2, heads 1-2-4",
        "view and region loss",
        "3 epochs × 4 = 12 steps of 8 images",
        "fp32, zero1 (ZeRO stage 1)",
    ):
        assert part in said


def test_header_recommends_a_preset_only_for_a_run_that_begins_anew(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"), model__init_from="weights.pth")
    assert "recipe" not in "\n".join(header.lines(config, "tiny.yaml"))


@pytest.mark.parametrize(
    ("images", "crop", "said"),
    [
        (100_000, 40, "preset small fits 100,000 images in crops of 40 pixels"),
        (100_001, 40, "no preset was measured on 100,001 images in crops of 40 pixels"),
        (5_000, 64, "no preset was measured on 5,000 images in crops of 64 pixels"),
        (1_281_167, 224, "presets swin_t to swin_l fit 1,281,167 images in crops of 224 pixels, as published"),
    ],
)
def test_recipe_follows_from_the_number_of_images_and_the_crops(images: int, crop: int, said: str) -> None:
    assert presets.recipe_for(images, crop).startswith(said)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "keys", [["data.train=nowhere"], ["data.mix=[{urls: nowhere}]"], ["data.train=runs"], ["data.train=a.tar"]]
)
def test_header_says_on_every_rank_that_a_set_is_missing(
    keys: list[str], rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", rank)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match=r"no such shard folder|not a finished shard set|a.tar: no such tar"):
        header.show(configs.resolve("swin_t", keys), "x")


def test_only_rank_0_reads_manifests_for_the_header_and_nobody_looks_at_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [tiny.shards(tmp_path / name) for name in ("a", "b")]
    config = configs.resolve("demo", [f"data.mix=[{{urls: {sets[0]}}}, {{urls: {sets[1]}}}]"])
    monkeypatch.setattr(manifests, "check_sizes", None)
    header.show(config, "x")
    assert ": 72 images" in capsys.readouterr().err
    monkeypatch.setattr(manifests, "load", None)
    monkeypatch.setenv("RANK", "1")
    header.show(config, "x")
    assert capsys.readouterr().err == ""


def test_header_shows_only_what_concerns_the_run(tmp_path: Path) -> None:
    data = f"data.train={tiny.shards(tmp_path / 'shards')}"
    byol = "\n".join(header.lines(configs.resolve("byol_resnet50", [data]), "x"))
    assert "trunk      resnet50\n" in byol
    assert "prototypes" not in byol
    config = tiny.config(tmp_path / "run", tmp_path / "shards")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text('{"finished": true, "step": 20}')
    assert "finished at step 20; a larger length continues it" in header.lines(config, "x")[1]


def test_model_line_has_the_prototypes_of_objectives_that_have_some(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretraining.pretrain(tiny.config(run, tiny.shards(tmp_path / "shards"), train__steps=1)) == 0
    assert " parameters, 64 prototypes, on CPU" in (run / "log.txt").read_text()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a\0b", b"[1]", b"step-00000009"])
def test_header_of_a_damaged_run_dir_leaves_the_finding_to_the_start(tmp_path: Path, content: bytes) -> None:
    config = tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards"))
    (tmp_path / "run/checkpoints/step-00000004").mkdir(parents=True)
    for name in ("summary.json", "config.yaml", "environment.json", "checkpoints/latest"):
        (tmp_path / "run" / name).write_bytes(content)
    assert "continues from its newest good checkpoint" in header.lines(config, "x")[1]
    (tmp_path / "run/checkpoints/latest").write_text("step-00000004\n")
    assert "continues from step-00000004" in header.lines(config, "x")[1]


def test_header_needs_no_torch() -> None:
    check = "import sys; from esvit_scale.train import header; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, env=launcher.environment())


def test_ctrl_c_before_training_ends_at_once(tmp_path: Path) -> None:
    path = tiny.write_config(tmp_path / "c.yaml", tiny.config(tmp_path / "run", tiny.shards(tmp_path / "shards")))
    process = launcher.start_cli("pretrain", str(path))
    assert process.stderr is not None
    while "importing PyTorch" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip() == "esvit-scale: ended by ctrl-C; nothing was trained in this start, and nothing was changed"
    assert not (tmp_path / "run").exists()


def test_kept_names_the_newest_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_is_working", False)
    monkeypatch.setattr(signals, "_kept", "")
    assert not signals.kept()
    signals.begin_work()
    assert "checkpoints are as they were" in signals.kept()  # which are there, is found out later
    signals.set_kept(None)
    assert signals.kept() == "no checkpoint was written yet"
    signals.set_kept(Path("runs/x/checkpoints/step-00000004"))
    assert "step-00000004; the same command goes on from there" in signals.kept()


def test_ctrl_c_names_the_checkpoint_while_it_is_still_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = tiny.shards(tmp_path / "shards"), list[str]()
    assert pretraining.pretrain(tiny.config(tmp_path / "run", data, train__steps=2)) == 0
    monkeypatch.setattr(Trainer, "train", lambda *_: seen.append(signals.kept()) or 0)
    with signals.installed():
        assert pretraining.pretrain(tiny.config(tmp_path / "run", data, train__steps=4)) == 0
        assert pretraining.pretrain(tiny.config(tmp_path / "new", data, train__steps=4)) == 0
    assert "kept: " in seen[0]
    assert "step-00000002;" in seen[0]
    assert seen[1] == "no checkpoint was written yet"


def test_first_ctrl_c_after_training_ends_at_once(tmp_path: Path) -> None:
    with signals.installed():
        assert pretraining.pretrain(tiny.config(tmp_path / "run", tiny.shards(tmp_path / "data"), train__steps=1)) == 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert "step-00000001" in signals.kept()


@pytest.mark.slow
def test_run_on_a_terminal_shows_a_bar_and_ctrl_c_says_what_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny.config(run, tiny.shards(tmp_path / "shards"), train__steps=5000, train__checkpoint_every=5000)
    path = tiny.write_config(tmp_path / "c.yaml", config)
    main, child = pty.openpty()
    command = [sys.executable, *launcher.CLI, "pretrain", str(path)]
    process = subprocess.Popen(command, stderr=child, env=launcher.environment(COLUMNS="120"))
    os.close(child)
    said, deadline = b"", time.monotonic() + 150
    while b"images/s" not in said:
        assert time.monotonic() < deadline, said.decode()
        said += os.read(main, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while more := os.read(main, 4096):
            said += more
    except OSError:  # the other end is closed
        pass
    assert process.wait(120) == 130
    os.close(main)
    text = said.decode()
    assert "ctrl-C: the run saves after this step and ends; ctrl-C again ends it at once" in text
    assert re.search(r"stopped at step \d+/5000 and saved; the same command continues", text)
    assert "/5000 [" in text
    rows = tiny.rows(run)
    assert [f"step {row['step']}/5000" in (run / "log.txt").read_text() for row in rows] == [True] * len(rows)
