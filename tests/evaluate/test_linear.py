"""`evaluate linear` on real files: its protocols, what it selects on, and that ranks change nothing."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from esvit_scale.data.augmented import augmented_batches
from esvit_scale.errors import UserError
from esvit_scale.evaluate import linear
from esvit_scale.evaluate.feature_cache import FeatureSet
from esvit_scale.evaluate.features import ExtractionOptions, FrozenTrunk
from esvit_scale.evaluate.labels import LabelledSet
from esvit_scale.evaluate.linear import ImageSource, ProbeSettings, make_probe_data, run_linear
from tests import launcher
from tests.evaluate.conftest import paint, paint_depth, paint_masked, paint_videos

LOADING = ExtractionOptions(batch=16, workers=0, device="cpu")
FAST = ProbeSettings(epochs=10, batch=16)


def run(checkpoint: Path, photos: Path, out: Path, recipe: ProbeSettings = FAST, **changes: Any) -> dict[str, Any]:
    sets = {"train": photos / "train", "test": photos / "test"} | changes
    return run_linear(checkpoint, sets["train"], sets["test"], out, recipe, LOADING._replace(cache=out / "features"))


def digits_task(recipe: ProbeSettings, train: int = 1200) -> linear.ProbeData:
    features, labels = load_digits(return_X_y=True)
    x = torch.tensor(features, dtype=torch.float32)[:, None].expand(-1, 2, -1) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, names = x[order], torch.tensor(labels)[order], tuple(map(str, range(10)))
    sets = [
        LabelledSet(FeatureSet(f, [""] * len(f), t), names) for f, t in ((x[:train], y[:train]), (x[train:], y[train:]))
    ]
    return make_probe_data(*sets, recipe, ImageSource(FrozenTrunk(nn.Identity(), 8, None), Path(), LOADING))  # type: ignore[call-arg]


def test_all_three_protocols_separate_colours(checkpoint: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    result = run(checkpoint, photos, tmp_path)
    assert json.loads((tmp_path / "linear.json").read_text()) == result
    assert list(result["results"]) == ["official", "grid", "logistic"]
    assert (result["n_train"], result["n_test"], result["classes"]) == (60, 24, 3)
    for row in result["results"].values():
        low, high = row["interval"]
        assert low <= row["top1"] <= high
        assert row["top5"] is None
    grid, logistic = result["results"]["grid"], result["results"]["logistic"]
    assert logistic["top1"] > 90
    assert len(grid["heads"]) == 52
    assert grid["selected"]["held_out"] == max(head["held_out"] for head in grid["heads"])
    assert (grid["n_fit"], grid["n_held_out"]) == (54, 6)
    assert "logistic" in capsys.readouterr().out


def test_probe_is_within_half_a_point_of_the_optimum_on_digits() -> None:
    """The optimum: the best of the whole path, chosen on the test set (scikit-learn's at each: test_logistic.py)."""
    task = digits_task(ProbeSettings())
    found = linear.logistic_regression(task, ProbeSettings())
    everything = linear.logistic.LabelledFeatures(task.train[:, 0], task.rows, task.labels, 10)
    scores = [linear.logistic.fit(everything, row["l2"]).scores(task.test[:, 0]) for row in found["path"]]
    assert found["top1"] >= max(linear.accuracy(s, task.truth) for s in scores) - 0.5
    assert found["top5"] > 99


def test_test_set_does_not_influence_the_selection() -> None:
    recipe = ProbeSettings(epochs=3)
    task = digits_task(recipe)
    other = task._replace(truth=task.truth.flip(0))
    for protocol in (linear.grid, linear.logistic_regression):
        once, again = protocol(task, recipe), protocol(other, recipe)
        assert once["selected"] == again["selected"]
        assert once["top1"] > again["top1"] + 30


def test_fraction_trains_on_fewer_samples(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    recipe = FAST._replace(protocols=("logistic",), fraction=0.1)
    result = run(checkpoint, photos, tmp_path, recipe)
    assert (result["n_train"], result["results"]["logistic"]["n_fit"]) == (6, 3)
    with pytest.raises(UserError, match="--fraction: expected more than 0 and at most 1"):
        run(checkpoint, photos, tmp_path, recipe._replace(fraction=10))
    with pytest.raises(UserError, match="one sample of each class"):
        run(checkpoint, photos, tmp_path, recipe._replace(fraction=0.01))


def test_probe_with_augmentation_learns(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    recipe = FAST._replace(protocols=("official", "grid"), augment=True, epochs=3)
    shutil.copytree(photos, tmp_path / "photos")
    for i in range(20):  # before all others, left out everywhere, and shifting no label
        (tmp_path / "photos" / "train" / "blue" / f"0-{i}.png").write_bytes(b"no image")
    result = run(checkpoint, tmp_path / "photos", tmp_path, recipe)
    assert result["n_train"] == 60
    assert result["results"]["official"]["augmented"]
    assert result["results"]["grid"]["top1"] > 60


def test_crops_depend_on_image_and_key(photos: Path) -> None:
    numbers = [torch.tensor([59, 0]), torch.tensor([20])]
    first, second = augmented_batches(photos / "train", numbers, 16, seed=0, epoch=1)
    assert first.numbers.tolist() == [59, 0]
    assert first.images.shape == (2, 3, 16, 16)
    assert first.images.mean((2, 3)).argmax(1).tolist() == [0, 2]  # a red one and a blue one
    assert second.images.mean((2, 3)).argmax(1).tolist() == [1]
    (alone,) = augmented_batches(photos / "train", [torch.tensor([0])], 16, seed=0, epoch=1)
    assert torch.equal(alone.images[0], first.images[1])
    (later,) = augmented_batches(photos / "train", [torch.tensor([0])], 16, seed=0, epoch=2)
    assert not torch.equal(alone.images, later.images)


def test_bad_input_is_one_line(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    def fails(message: str, **sets: Path) -> None:
        with pytest.raises(UserError, match=message):
            run(checkpoint, photos, tmp_path, FAST, **sets)

    paint(tmp_path / "one", 3, 0, {"red": (200, 0, 0)})
    paint(tmp_path / "more", 2, 0, {"red": (200, 0, 0), "pink": (250, 150, 150)})
    fails(
        "train set: all samples are of one class; a linear probe needs", train=tmp_path / "one", test=tmp_path / "one"
    )
    fails("no training sample: 'pink'", test=tmp_path / "more")
    fails("its images have no labels; a linear probe needs", train=photos / "train" / "red")
    huge = tmp_path / "huge" / "red"
    huge.mkdir(parents=True)
    Image.new("1", (14_000, 14_000)).save(huge / "0.png")
    fails("huge: holds no readable image", test=tmp_path / "huge")
    assert not (tmp_path / "linear.json").exists()


def test_nan_features_are_an_error() -> None:
    task = digits_task(ProbeSettings())
    task.train[3] = math.nan
    sets = [LabelledSet(FeatureSet(x, [], y), ()) for x, y in ((task.train, task.labels), (task.test, task.truth))]
    with pytest.raises(UserError, match="train set: 1 of 1200 feature vectors hold NaN"):
        make_probe_data(*sets, ProbeSettings(), task.images)  # type: ignore[call-arg]


@pytest.mark.slow
def test_two_ranks_match_one(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    """Files and keys byte for byte, features to fp32 rounding (a matrix product's sums depend on how many rows it has);
    k-NN and the probes' results, over kept features and over images."""
    paint_masked(photos.parent / "masked", 7, seed=0)
    paint_depth(photos.parent / "far", 7, seed=0)
    paint_videos(photos.parent / "videos", 3, 4, seed=0)
    for ranks in (1, 2):
        script = Path(__file__).with_name("ranks.py")
        launcher.run(script, checkpoint, photos, tmp_path / str(ranks), ranks=ranks)
    for name in ("knn", "linear", "images/linear", "retrieval", "copies", "segmentation", "depth", "video"):
        one, two = (json.loads((tmp_path / ranks / f"{name}.json").read_text()) for ranks in "12")
        assert_close(one, two)
    one, two = ({p.name: p for p in (tmp_path / ranks / "features").iterdir()} for ranks in "12")
    assert len(one) == 4
    for name, folder in one.items():
        for file in folder.iterdir():
            other = two[name] / file.name
            if file.name == "features.npy":
                np.testing.assert_allclose(np.load(file), np.load(other), rtol=0, atol=1e-5)
            else:
                assert file.read_bytes() == other.read_bytes(), file.name


def assert_close(one: Any, two: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert_close(value, two[key])
    elif isinstance(one, list):
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)
    else:
        assert one == (pytest.approx(two, abs=1e-3) if isinstance(one, float) else two)
