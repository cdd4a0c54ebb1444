"""The evaluations by their command lines."""

import json
from pathlib import Path

import numpy as np
import pytest

from esvit_scale import cli


def test_knn_linear_transfer_and_embed_share_features(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    common = ["--checkpoint", str(checkpoint), "--workers", "0", "--cache", str(cache), "--out"]
    sets = ["--train", str(photos / "train"), "--test", str(photos / "test")]

    def kept() -> int:
        return len(list(cache.iterdir()))

    assert cli.main(["evaluate", "knn", *common, str(out), *sets, "--k", "3", "7", "--shots", "2"]) == 0
    assert json.loads((out / "knn.json").read_text())["results"].keys() == {"3", "7"}
    assert kept() == 2
    assert cli.main(["embed", *common, str(tmp_path / "f.npz"), "--data", str(photos / "test")]) == 0
    assert np.load(tmp_path / "f.npz", allow_pickle=False)["features"].shape == (24, 64)
    (tmp_path / "list.yaml").write_text(
        "datasets: {colours: {train: train, test: test, metric: accuracy}, b: {train: x, test: x, metric: accuracy}}"
    )
    arguments = ["evaluate", "transfer", str(tmp_path / "list.yaml"), "--root", str(photos), *common, str(out)]
    assert cli.main(arguments) == 2
    assert "1 of 2 data sets failed" in capsys.readouterr().err
    assert json.loads((out / "transfer.json").read_text())["datasets"].keys() == {"colours"}
    assert kept() == 2
    recipe = ["--protocol", "logistic", "--fraction", "0.5"]
    assert cli.main(["evaluate", "linear", *common, str(out), *sets, *recipe]) == 0
    assert json.loads((out / "linear.json").read_text())["n_train"] == 30
    assert kept() == 4


def test_features_are_cached_beside_the_output_of_an_evaluation(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--workers", "3", "--out"]
    sets = ["--train", str(photos / "train"), "--test", str(photos / "test")]
    assert cli.main(["evaluate", "knn", *arguments, str(tmp_path / "knn"), *sets, "--k", "3"]) == 0
    assert len(list((tmp_path / "knn" / "features").iterdir())) == 2


def test_embed_leaves_its_file_alone(
    checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--checkpoint", str(checkpoint), "--workers", "0", "--data", str(photos / "test")]
    assert cli.main(["embed", *arguments, "--out", "f.npz", "--stored", "fp16"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
    assert np.load(tmp_path / "f.npz", allow_pickle=False)["features"].dtype == np.float32
