"""Fine-tuning: what `finetune` fills in and refuses, and its runs: held-out accuracy, resume, ranks, and export."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import esvit_scale
from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, state, step_folders
from esvit_scale.config import Config
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.errors import UserError
from esvit_scale.train import accuracies, finetuning, pretraining
from esvit_scale.train.accuracies import Accuracy, AccuracyHistory
from esvit_scale.train.run_records import read_summary
from tests import launcher, tiny

STEPS, SAVE = 8, 5  # two epochs of 4 steps
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled shards `train` and `val`, and `weights`: a pretraining of two steps."""
    folder = tmp_path_factory.mktemp("finetuning")
    tiny.shards(folder / "train")
    tiny.shards(folder / "val", samples=23, first=100)
    assert pretraining.pretrain(tiny.config(folder / "weights", folder / "train", train__steps=2)) == 0
    return folder


def overrides(folder: Path, run: Path, **changes: Any) -> list[str]:
    values = {
        "run_dir": run,
        "model.init_from": folder / "weights",
        "data.train": folder / "train",
        "data.held_out": folder / "val",
        "data.workers": 0,
        "data.global_crops.size": 32,
        "objective.ema_momentum": 0.7,
        "objective.ema_momentum_end": 0.7,
        "optim.lr": 3e-2,
        "optim.warmup_epochs": 0.5,
        "train.global_batch": 8,
        "train.steps": STEPS,
        "train.precision": "fp32",
        "train.log_every": 1,
        "train.checkpoint_every": SAVE,
    }
    return [f"{key}={value}" for key, value in (values | {k.replace("__", "."): v for k, v in changes.items()}).items()]


def config(folder: Path, run: Path, **changes: Any) -> Config:
    return finetuning.resolve("classify", overrides(folder, run, **changes))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A finished fine-tuning in one process at ZeRO 1."""
    assert pretraining.pretrain(config(folder, folder / "run")) == 0
    return folder / "run"


# --- the config ------------------------------------------------------------------------------------------------------


def test_config_takes_the_trunk_from_the_weights_and_the_classes_from_the_set(folder: Path, tmp_path: Path) -> None:
    found, given = config(folder, tmp_path), configs.load(folder / "weights" / "config.yaml")
    assert found.model.depths == given.model.depths
    assert found.model.window == given.model.window
    assert found.objective.class_names == list(NAMES)
    assert found.objective.classes == 3
    assert found.crop_sizes == [32]
    other = config(folder, tmp_path, **{"model.window": 2})
    assert (other.model.window, other.model.depths) == (2, given.model.depths)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command refuses its input, with exit code 2."""
    assert cli.main(["finetune", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esvit-scale: ")]
    assert len(lines) == 1
    return lines[0]


def labelled(path: Path, labels: list[int], classes: tuple[str, ...]) -> Path:
    """A shard set of the same picture with these labels, -1 for none."""
    image = next(iter(tiny_images()))
    write_samples(
        [Sample(f"x{i:02d}", label, "png", image) for i, label in enumerate(labels)], path, classes, 10, "tiny"
    )
    return path


def tiny_images() -> list[bytes]:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (200, 30, 30)).save(buffer, "PNG")
    return [buffer.getvalue()]


def test_wrong_input_is_refused_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(**changes: Any) -> str:
        return refusal(capsys, "classify", *overrides(folder, tmp_path / "run", **changes))

    one = labelled(tmp_path / "one", [0] * 16, ("cat",))
    assert "has one class, cat; classification needs two" in said(**{"data.train": one})
    none = labelled(tmp_path / "none", [-1] * 16, ())
    assert "its images have no labels" in said(**{"data.train": none})
    some = labelled(tmp_path / "some", [0, 1] * 7 + [-1, -1], ("cat", "dog"))
    assert "sample x14: has no label" in said(**{"data.train": some, "data.held_out": ""})
    same = labelled(tmp_path / "same", [1] * 16, ("cat", "dog"))
    assert "all samples are of one class, dog" in said(**{"data.train": same, "data.held_out": ""})
    beyond = labelled(tmp_path / "beyond", [0, 1] * 7 + [2, 2], ("cat", "dog"))
    assert "sample x14: label 2 is out of range: objective.classes=2" in said(
        **{"data.train": beyond, "data.held_out": ""}
    )
    assert "data.held_out" in said(**{"data.held_out": some})
    assert "1 of its 3 classes have no training sample: 'c'" in said(
        **{"data.train": labelled(tmp_path / "two", [0, 1] * 8, ("a", "b"))}
    )
    assert "is the training set, so the accuracy would measure memory" in said(**{"data.held_out": folder / "train"})
    assert "model.init_from: not set" in said(**{"model.init_from": "null"})
    assert "no such file or folder" in said(**{"model.init_from": tmp_path / "nowhere"})
    assert "is no config of a fine-tuning" in refusal(capsys, "swin_t", f"data.train={folder / 'train'}")


def test_bad_label_that_comes_later_ends_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in plain tars and sets in object stores, whose labels are not looked through before."""
    from esvit_scale.data import labels

    monkeypatch.setattr(labels, "check", lambda config, data: None)
    beyond = labelled(tmp_path / "beyond", [0, 1, 2, 1] * 4, ("a", "b"))
    said = refusal(
        capsys, "classify", *overrides(folder, tmp_path / "run", **{"data.train": beyond, "data.held_out": ""})
    )
    assert "stopped at step 1: sample x" in said
    assert "label 2 is out of range" in said


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_measures_and_records_its_accuracy(run: Path, folder: Path) -> None:
    rows = tiny.rows(run)
    assert [row["step"] for row in rows if "top1" in row] == [4, 8]
    for row in rows:
        assert 0 <= row["train_top1"] <= 1
    last = rows[-1]
    assert last["top1_low"] < last["top1"] < last["top1_high"]
    assert last["held_out_images"] == 23
    found = read_summary(run)["classifier"]
    assert found["top1"] == last["top1"]
    assert found["best"]["top1"] == max(row["top1"] for row in rows if "top1" in row)
    assert "classifier on 23 held-out images: top-1" in read_summary(run)["verdict"][0]
    assert "with the student's own" in (run / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "field"), [("teacher", "top1"), ("student", "top1_student")])
def test_exported_classifier_has_the_accuracy_of_the_run(
    run: Path, folder: Path, tmp_path: Path, network: str, field: str
) -> None:
    """Written, loaded again, and applied to the held-out images one batch after the other."""
    path = tmp_path / "classifier.safetensors"
    convert.convert(run, path, "esvit-scale", "safetensors", network, heads=True)
    model = esvit_scale.load_classifier(path)
    assert model.classes == NAMES
    right = count = 0
    with torch.no_grad():
        for batch in evaluation_batches(folder / "val", 32, 10):
            right += int((model(batch.images).argmax(1) == batch.labels).sum())
            count += len(batch.labels)
    assert tiny.rows(run)[-1][field] == right / count
    if network == "teacher":
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model(images), esvit_scale.load_classifier(run)(images))
            features = esvit_scale.load_backbone(path)(images)
            assert torch.equal(features, esvit_scale.load_backbone(run)(images))
    convert.convert(run, tmp_path / "trunk.safetensors", "esvit-scale", "safetensors")
    with pytest.raises(UserError, match="holds no classifier"):
        esvit_scale.load_classifier(tmp_path / "trunk.safetensors")


@pytest.mark.slow
def test_classifier_of_the_same_classes_is_continued_and_of_others_drawn_anew(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    from esvit_scale.checkpoint.initial_weights import load_initial_weights

    again = load_initial_weights(config(folder, tmp_path / "again", **{"model.init_from": run}))
    assert "objective.classifier.weight" in again.values
    two = labelled(tmp_path / "two", [0, 1] * 8, ("a", "b"))
    other = load_initial_weights(config(folder, tmp_path / "o", **{"model.init_from": run, "data.train": two}))
    assert not any(name.startswith("objective.") for name in other.values)
    assert "classifier not in the source: initialised at random" in other.note


@pytest.mark.slow
def test_resumed_run_is_bit_for_bit_the_undisturbed_one(run: Path, folder: Path) -> None:
    resumed = folder / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    (resumed / "checkpoints" / "latest").write_text(f"step-{SAVE:08d}\n")
    (resumed / "summary.json").unlink()
    assert pretraining.pretrain(config(folder, resumed)) == 0
    assert tiny.rows(resumed) == tiny.rows(run)
    ours, theirs = (state.read_weights(step_folders.resolve(path)) for path in (resumed, run))
    for role, tensors in theirs.networks.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours.networks[role][name], tensor), (role, name)
    assert read_summary(resumed)["classifier"] == read_summary(run)["classifier"]


@pytest.mark.slow
def test_best_checkpoint_and_patience_follow_the_accuracy(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured every 2 steps, best at step 4, and ended after two measurements that were no better."""
    from esvit_scale.train.online_accuracy import OnlineAccuracy

    made = iter([0.3, 0.6, 0.5, 0.6, 0.7])
    monkeypatch.setattr(OnlineAccuracy, "measure", lambda *_: Accuracy(next(made), None, 23, (0.1, 0.9)))
    changes: dict[str, Any] = {"train.eval_every": 2, "train.keep_best": True, "train.patience": 2, "train.steps": 20}
    changes |= {"objective.ema_momentum": 0.0, "objective.ema_momentum_end": 0.0}
    assert pretraining.pretrain(config(folder, tmp_path / "run", **changes)) == 0
    summary = read_summary(tmp_path / "run")
    assert (summary["step"], summary["classifier"]["best"]) == (8, {"step": 4, "top1": 0.6})
    assert (tmp_path / "run" / "checkpoints" / "best").read_text().strip() == "step-00000004"
    assert "top1_student" not in tiny.rows(tmp_path / "run")[-1]


RANKS: dict[str, dict[str, Any]] = {
    "zero1": {},
    "zero0": {"train.ds_config": "zero0"},
    "zero2-accumulate": {"train.ds_config": "zero2", "train.grad_accum": 2},
    "zero3": {"train.ds_config": "zero3"},
}


@pytest.mark.slow
def test_two_ranks_match_one_process_at_every_stage(run: Path, folder: Path) -> None:
    """The same losses and accuracies, also from the save of one process and with accumulation."""
    paths = []
    for name, changes in RANKS.items():
        of_run = config(folder, folder / f"two-{name}", **changes)
        paths.append(tiny.write_config(folder / f"{name}.yaml", of_run))
    launcher.run(Path(__file__).parents[1] / "distributed" / "scenarios.py", *paths, ranks=2, timeout=250)
    for name in RANKS:
        for row, expected in zip(tiny.rows(folder / f"two-{name}"), tiny.rows(run), strict=True):
            # fp32 sums in another order: 1e-7 each, grown by eight steps at a high rate
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5), (name, row["step"])
            assert row.get("top1") == expected.get("top1"), (name, row["step"])
            assert row.get("top1_student") == expected.get("top1_student"), (name, row["step"])


# --- what is said ----------------------------------------------------------------------------------------------------


def test_history_names_the_best_step_and_forgets_what_is_rolled_back() -> None:
    history = AccuracyHistory()
    assert "data.held_out=LABELLED" in accuracies.verdict(history)[0]
    for step, top1 in ((4, 0.5), (8, 0.75), (12, 0.625)):
        history.measure(step, Accuracy(top1, 0.9, 80, (top1 - 0.1, top1 + 0.1)), Accuracy(0.25, 0.5, 80, (0.2, 0.3)))
    assert accuracies.verdict(history) == [
        "classifier on 80 held-out images: top-1 62.5 % (52.5 to 72.5), top-5 90.0 %, with the averaged weights; 25.0 % "
        "with the student's own; 75.0 % at best (step 8)"
    ]
    history.cut(4)
    assert history.best == (4, 0.5)
