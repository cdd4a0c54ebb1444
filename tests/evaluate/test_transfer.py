"""`evaluate transfer` on real files: its list, every metric, failures, resuming, baselines; the shipped list."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from esvit_scale.errors import UserError
from esvit_scale.evaluate import transfer, transfer_list
from esvit_scale.evaluate.features import ExtractionOptions
from esvit_scale.evaluate.transfer import run_transfer
from esvit_scale.evaluate.transfer_list import read_labels, read_list, targets_of
from tests import tiny
from tests.evaluate.conftest import COLOURS, paint

TWO = {name: COLOURS[name] for name in ("blue", "red")}


@pytest.fixture
def world(photos: Path, tmp_path: Path) -> Path:
    """A list of four data sets, one for each metric."""
    for split in ("train", "test"):
        paint(tmp_path / "memes" / split, 10, seed=len(split), colours=TWO)
    lines = ["image,blueish,greenish,colourful"]
    for name in COLOURS:
        for i in range(20):
            # without an extension, as shards name it, and a cell that nobody judged
            lines.append(f"{name}/{i:02d},{int(name == 'blue')},{int(name == 'green') if i else ''},1")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    entries = {
        "colours": {"train": f"{photos}/train", "test": f"{photos}/test", "metric": "mean_per_class"},
        "memes": {"train": "memes/train", "val": "memes/test", "test": "memes/test", "metric": "roc_auc"},
        "tags": {"train": f"{photos}/train", "test": f"{photos}/test", "metric": "map11", "labels": "labels.csv"},
        "noise": {"train": str(tiny.shards(tmp_path / "noise")), "test": str(tmp_path / "noise"), "metric": "accuracy"},
    }
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"datasets": entries}, sort_keys=False))
    return tmp_path


def run(world: Path, checkpoint: Path, out: str = "out", **options: Any) -> dict[str, Any]:
    loading = ExtractionOptions(batch=16, workers=0, device="cpu", cache=world / "features")
    return run_transfer(world / "list.yaml", checkpoint, world / out, loading, **options)


def test_transfer_reports_every_metric_and_the_mean(
    world: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real, fitted = transfer.logistic.fit, list[int]()
    monkeypatch.setattr(
        transfer.logistic, "fit", lambda data, *rest: fitted.append(len(data.rows)) or real(data, *rest)
    )
    result = run(world, checkpoint)
    assert fitted[10::11] == [60, 40, 60, 36]  # after ten of the search, one on all rows
    assert fitted[:10] == [48] * 10
    assert json.loads((world / "out" / "transfer.json").read_text()) == result
    rows = result["datasets"]
    assert list(rows) == ["colours", "memes", "tags", "noise"]
    assert result["mean"] == pytest.approx(sum(row["score"] for row in rows.values()) / 4)
    for name in ("colours", "memes", "tags"):
        assert rows[name]["score"] > 90
    assert (rows["memes"]["n_train"], rows["memes"]["n_held_out"]) == (40, 20)  # val: selected on, then fitted to
    assert (rows["colours"]["n_train"], rows["colours"]["n_held_out"]) == (60, 12)
    assert rows["tags"]["classes"] == 3
    assert all(row["interval"][0] <= row["score"] + 1e-9 for row in rows.values())
    text = capsys.readouterr().out
    assert "[4/4] noise: accuracy" in text
    assert "mean of 4" in text


def test_failed_dataset_is_retried_and_others_are_kept(
    world: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (world / "memes" / "test").rename(world / "elsewhere")
    real, evaluated, broken = transfer.evaluate, list[str](), {"tags"}

    def recorded(dataset: Any, *rest: Any) -> Any:
        evaluated.append(dataset.name)
        if dataset.name in broken:
            raise RuntimeError("out of memory\nhere")
        return real(dataset, *rest)

    monkeypatch.setattr(transfer, "evaluate", recorded)
    with pytest.raises(UserError, match=r"2 of 4 data sets failed.*memes/test: no such folder.*RuntimeError: out of"):
        run(world, checkpoint)
    result = json.loads((world / "out" / "transfer.json").read_text())
    assert list(result["datasets"]) == ["colours", "noise"]
    assert list(result["failed"]) == ["memes", "tags"]
    (world / "elsewhere").rename(world / "memes" / "test")
    evaluated.clear()
    broken.clear()
    assert run(world, checkpoint)["failed"] == {}
    assert evaluated == ["memes", "tags"]
    paint(world / "memes" / "train", 11, seed=3, colours=TWO)  # other data: not the result of before
    run(world, checkpoint)
    assert evaluated == ["memes", "tags", "memes"]


def test_wins_and_losses_against_a_baseline_are_counted(world: Path, checkpoint: Path, capsys: Any) -> None:
    run(world, checkpoint)
    other = json.loads((world / "out" / "transfer.json").read_text())
    scores = {"colours": 1.0, "memes": 101.0, "tags": other["datasets"]["tags"]["score"]}
    for name, score in scores.items():
        other["datasets"][name]["score"] = score
    other["datasets"]["noise"]["metric"] = "roc_auc"  # not comparable
    (world / "other.json").write_text(json.dumps(other))
    found = run(world, checkpoint, baseline=world / "other.json")["baseline"]
    assert (found["wins"], found["losses"], found["common"]) == (1, 1, 3)
    assert "1 wins and 1 losses of 3" in capsys.readouterr().out
    (world / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other.json: not a transfer.json"):
        run(world, checkpoint, baseline=world / "other.json")


def test_shipped_list_has_the_elevater_datasets(tmp_path: Path) -> None:
    found = read_list(Path("elevater"), tmp_path)
    assert len(found) == 20
    metrics: dict[str, list[str]] = {}
    for dataset in found:
        metrics.setdefault(dataset.metric, []).append(dataset.name)
        assert dataset.train == tmp_path / dataset.name / "train"
    assert metrics["map11"] == ["voc-2007"]
    assert metrics["roc_auc"] == ["hateful-memes"]
    assert metrics["mean_per_class"] == ["caltech-101", "fgvc-aircraft", "oxford-flowers-102", "oxford-iiit-pets"]
    assert len(metrics["accuracy"]) == 14
    with pytest.raises(UserError, match="--root DIR"):
        read_list(Path("elevater"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: {a: {train: x, test: y, metric: acuracy}}", "a: unknown metric 'acuracy'; did you mean 'accuracy'"),
        ("datasets: {a: {train: x, metric: accuracy}}", "a: missing test"),
        ("datasets: {a: {trian: x, test: y, metric: accuracy}}", "unknown key 'trian'; did you mean 'train'"),
        ("datasets: {a: {train: x, test: y, metric: map11}}", "the metric map11 needs labels: FILE.csv"),
        ("datasets: {a: {train: x, test: y, metric: accuracy, labels: z}}", "takes its labels from the class folders"),
        ("datasets: {a/b: {train: x, test: y, metric: accuracy}}", "becomes the name of a file"),
        ("datasets: [x]", "expected NAME"),
        ("sets: {}", "unknown key 'sets'"),
        ("a: [", "not valid YAML"),
    ],
)
def test_errors_in_the_list_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_list(tmp_path / "list.yaml")


def test_paths_are_relative_to_root_or_the_list(tmp_path: Path) -> None:
    entry = "datasets: {a: {train: x, test: /y, metric: accuracy}}"
    (tmp_path / "list.yaml").write_text(entry)
    (dataset,) = read_list(tmp_path / "list.yaml")
    assert (dataset.train, dataset.test) == (tmp_path / "x", Path("/y"))
    (tmp_path / "list.yaml").write_text("root: sets\n" + entry)
    assert read_list(tmp_path / "list.yaml")[0].train == tmp_path / "sets" / "x"
    assert read_list(tmp_path / "list.yaml", Path("/other"))[0].train == Path("/other/x")
    with pytest.raises(UserError, match=r"elevator: No such file .*did you mean 'elevater'"):
        read_list(Path("elevator"))


def test_label_files_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text('image,cat,dog\n"a,b.jpg",1,0\nc/d,,1\n')
    classes, rows = read_labels(path)
    assert classes == ("cat", "dog")
    found = targets_of(["c/d.png", "a,b"], rows, path, tmp_path)
    assert found.nan_to_num(-1).tolist() == [[-1, 1], [1, 0]]
    with pytest.raises(UserError, match=r"no line for 1 of 2 images .*first: e"):
        targets_of(["a,b", "e"], rows, path, tmp_path)
    for text, message in (
        ("image\n", "expected the header"),
        ("", "expected the header"),
        ("image,cat\na,2\n", "line 2: '2' is not 1, 0"),
        ("image,cat\na,1,0\n", "line 2: 3 cells, the header has 2"),
        ("image,cat\na.jpg,1\na,0\n", "line 3: a is named a second time"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_labels(path)
    with pytest.raises(UserError, match="No such file"):
        read_labels(tmp_path / "none.csv")
    assert transfer_list.without_extension("a.b/c.JPG") == "a.b/c"
    assert torch.isnan(torch.tensor(transfer_list.NAMED_VALUES[""]))
