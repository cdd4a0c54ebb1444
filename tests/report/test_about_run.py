"""The report's section about one run: its facts, the keys it changed, warnings, bad samples, and what was gained."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from esvit_scale import config as configs
from esvit_scale.checkpoint import state_file
from esvit_scale.report import about_run, baselines, run_files, sample_images
from esvit_scale.report.html import write_report
from esvit_scale.train import log_format


@pytest.fixture
def told(run: Path) -> Path:
    """The whole run with a log, a quarantine, several starts and rows that a clock measured."""
    rows = [{"step": 10 * i, "loss": 5.0, "step_s": 2.0, "time": 1e9 + 20.0 * i} for i in range(1, 361)]
    rows[-1]["time"] += 86400.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"finished": True, "step": 3600, "rollbacks": 1}))
    (run / "log.txt").write_text(
        "10:00:00 config     x\n"
        "10:00:00 note       crops of 16 pixels have one region token each\n"
        "10:00:01 warning: step 20: gradient spike of 12.5 in stage 1\n"
        "10:00:02 step 30/3600 · loss 5\n"
        "10:00:02 warning: step 40: gradient spike of 13 in stage 1\n"
        "10:00:03 warning: <b>disk</b> nearly full\n"
    )
    bad: list[dict[str, Any]] = [
        {"step": i, "key": f"k{i}", "shard": "000.tar", "reason": "not an image"} for i in range(7)
    ]
    bad += [{"step": 9, "key": "slow", "reason": "took 40 s", "used": True}]
    bad += [{"step": 9, "key": "nan", "reason": "the loss was not finite at this step"}]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    environment = {"host": "node7", "cpus": 8, "gpu": "NVIDIA H200", "world_size": 4, "starts": 3, "python": "3.12.1"}
    packages = {"torch": "2.14.1", "fairscale": "absent"}
    (run / "environment.json").write_text(
        json.dumps(environment | {"processor": "EPYC", "packages": packages, "slurm": {"SLURM_JOB_ID": "77"}})
    )
    return run


def test_facts_of_a_run(told: Path) -> None:
    found = about_run.about(run_files.read(told))
    facts = dict(found.facts)
    assert facts["state"] == "finished, step 3,600"
    assert facts["duration"] == "2 h of training, spread over 1 day 2 h"
    assert facts["starts"] == "2 restarts, 1 roll-back to a checkpoint"
    assert "16 images in 1 shard, 2 classes (" in facts["data"]
    assert "id " in facts["data"]
    assert facts["machine"] == "4 × NVIDIA H200, EPYC, 8 CPU cores for a process, 4 ranks, host node7, Slurm job 77"
    assert facts["versions"] == "torch 2.14.1, Python 3.12.1"
    assert [tuple(sentence) for sentence in found.warnings] == [
        ("crops of 16 pixels have one region token each", 1),
        ("step 20: gradient spike of 12.5 in stage 1", 2),
        ("<b>disk</b> nearly full", 1),
    ]
    assert found.quarantine[0].startswith("7 replaced by another image: k0 (not an image), k1 ")
    assert found.quarantine[0].endswith("k4 (not an image), …")
    assert found.quarantine[1:] == [
        "1 slow to read, and used: slow (took 40 s)",
        "1 in a step that was skipped, because its loss or gradients were not finite: nan",
    ]
    assert found.changed is not None
    assert found.changed.head == ["key", "this run", "swin_t"]
    assert [(row.name, [cell.text for cell in row.cells]) for row in found.changed.rows] == [
        ("data.global_crops.size", ["32", "224"]),
        ("data.local_crops.0.count", ["3", "8"]),
    ]


STOP = f"10:00:04 {log_format.WARNING}{log_format.STOPPED % (19, 80)}\n"


@pytest.mark.parametrize(
    ("starts", "stops", "lengthened", "words"),
    [
        (1, 0, 0, "started once, no restart"),
        (1, 1, 0, "started once, no restart"),  # not yet resumed
        (2, 1, 0, "stopped and resumed once"),
        (2, 0, 1, "made longer once"),
        (2, 1, 1, "stopped and resumed once, made longer once"),  # by the same start
        (6, 2, 1, "2 restarts, stopped and resumed 2 times, made longer once"),
        (3, 0, 0, "2 restarts"),
    ],
)
def test_stop_or_new_length_is_no_restart_and_no_warning(
    tmp_path: Path, starts: int, stops: int, lengthened: int, words: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')
    (tmp_path / "environment.json").write_text(json.dumps({"starts": starts}))
    (tmp_path / "log.txt").write_text(stops * STOP + "10:00:05 warning: gradient spike\n")
    (tmp_path / "lengthened.jsonl").write_text(lengthened * '{"step": 3}\n')
    found = about_run.about(run_files.read(tmp_path))
    assert dict(found.facts)["starts"] == words
    assert [sentence.text for sentence in found.warnings] == ["gradient spike"]


def test_page_has_the_section_and_escapes_warnings(told: Path) -> None:
    page = write_report(told).read_text()
    for words in ("About this run", "4 × NVIDIA H200", "(2 times)", "7 replaced by another image", "the preset swin_t"):
        assert words in page
    assert "&lt;b&gt;disk" in page
    assert "<b>disk" not in page


def test_data_that_is_gone_is_named_by_the_checkpoint(told: Path) -> None:
    (told / "shards").rename(told / "elsewhere")
    step = told / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    fields: dict[str, Any] = {"cursor": {"step": 10}, "files": {}, "optimizer_steps": {}, "shapes": {}, "config": {}}
    state_file.write_state(step, fields | {"data": {"what": "1 shards, 16 samples", "sha256": "abcdef0123456789"}})
    texts = [text for name, text in about_run.about(run_files.read(told)).facts if name == "data"]
    assert texts == [str(told / "shards"), "as the checkpoint records: 1 shards, 16 samples, id abcdef012345"]


def test_run_without_any_file_but_rows_has_a_section(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5}\n')
    found = about_run.about(run_files.read(tmp_path))
    assert found.facts == [("state", "not finished, step 3")]
    assert not found.warnings
    assert found.changed is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (90061, "1 day 1 h"), (172800, "2 days")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert about_run.in_words(seconds) == words


def result(top1: float, **more: Any) -> dict[str, Any]:
    """A result whose best k on the test images is not the one to quote."""
    ks = {"10": {"top1": top1}, "20": {"top1": top1 + 9}}
    return {"best": {"k": 20, "top1": top1 + 9}, "results": ks, "n_test": 400, "test": "t", **more}


def test_gain_is_measured_at_the_k_to_quote() -> None:
    pixels, untrained = result(30.0, name="raw pixels", step=None), result(41.0, name="untrained x", step=0)
    said = baselines.gain([pixels, untrained, result(60.0, step=100)])
    assert said == (
        "k-NN with k = 10 on 400 test images: 60.0 % trained (step 100); 30.0 points above raw pixels; "
        "19.0 points above untrained x"
    )
    weak = baselines.gain([pixels, untrained, result(42.0, step=100)])
    assert weak.endswith(
        "12.0 points above raw pixels; 1.0 points above untrained x, which may be chance "
        "(400 images tell differences above 4.9 points)"
    )
    worse = baselines.gain([pixels | {"results": {"10": {"top1": 53.25}}}, untrained, result(41.0, step=100)])
    assert "12.2 points below raw pixels; as good as untrained x" in worse
    assert "chance" not in worse
    assert baselines.gain([result(60.0, step=100)]) == ""
    assert baselines.gain([pixels | {"test": "other"}, result(60.0, step=100)]) == ""


def test_small_pictures_are_enlarged_by_whole_factors_without_blur() -> None:
    picture = Image.effect_noise((28, 28), 90).convert("RGB")
    assert sample_images.thumbnail(picture).width == 84
    large = sample_images.enlarged(picture, 160)
    assert large.size == (140, 140)
    assert large.resize((28, 28), Image.Resampling.NEAREST).tobytes() == picture.tobytes()
    assert len(large.getcolors(10**6) or []) == len(picture.getcolors(10**6) or [])
    assert sample_images.thumbnail(Image.new("RGB", (65, 20))).width is None
    assert sample_images._sheet_widths([28, 28, 14]) == [224, 224, 112]
    assert sample_images._sheet_widths([112, 48]) == [112, 96]
    assert sample_images._sheet_widths([448, 96]) == [224, 96]


def test_stages_are_in_the_order_of_the_network(run: Path) -> None:
    parts = ("view_head", "stage10", "stage2", "norm", "stage1", "patch_embed")
    rows = [{"step": i, **{f"update_ratio_{part}": 1.0 + i for part in parts}} for i in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run).read_text()
    titles = ["patch embedding", "stage 1", "stage 2", "stage 10", "final norm", "view head"]
    places = [page.index(f"<figcaption>{title}<") for title in titles]
    assert places == sorted(places)
    assert "stage 2 against the step: 2 at step 1, 3 at step 2, smallest 2, largest 3" in page


def test_nearest_preset_needs_no_own_keys() -> None:
    config = configs.resolve("demo", ["name=mine", "run_dir=/x"])
    found = about_run.changed_keys(config)
    assert found.head[-1] == "demo"
    assert not found.rows
