"""Segmentation: interpolation, heads and measures against scikit-learn and slow loops; the command and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from esvit_scale import cli
from esvit_scale.errors import UserError
from esvit_scale.evaluate import pixel_heads, segmentation, stage_features
from esvit_scale.evaluate.pixel_heads import LinearPixelHead, PixelSamples
from esvit_scale.evaluate.stage_features import StageMap, Window
from tests.evaluate.conftest import paint_masked
from tests.tiny import model_config


def window(top: int, left: int, crop: int, widths: dict[int, int], seed: int) -> Window:
    """A window with maps of random values; `widths` are cell sizes → C_s."""
    rng = torch.Generator().manual_seed(seed)
    maps = [StageMap(torch.randn(crop // cell, crop // cell, c, generator=rng), cell) for cell, c in widths.items()]
    return Window(top, left, maps)


# --- interpolation ---------------------------------------------------------------------------------------------------


def test_windows_cover_a_side_and_end_at_its_end() -> None:
    assert stage_features.starts(32, 32, 21) == [0]
    assert stage_features.starts(33, 32, 21) == [0, 1]
    assert stage_features.starts(100, 32, 21) == [0, 21, 42, 63, 68]


def test_interpolation_is_that_of_torch() -> None:
    x = torch.randn(1, 3, 6, 6)
    weights = stage_features.interpolation(torch.arange(24) + 0.5, 4, 6)
    expected = F.interpolate(x, (24, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.einsum("yh,bchw,xw->bcyx", weights, x, weights), expected)


def test_features_at_places_are_those_of_enlarged_maps() -> None:
    crop = 16
    windows = [window(0, 0, crop, {4: 3, 8: 2}, 0), window(0, 10, crop, {4: 3, 8: 2}, 1)]
    y, x = torch.tensor([0.5, 7.5, 15.5, 3.5]), torch.tensor([2.5, 12.5, 13.5, 25.5])
    found = stage_features.features_at(windows, crop, y, x)
    for i, which in enumerate([0, 0, 1, 1]):  # the centres of the windows are at 8 and 18
        enlarged = [
            F.interpolate(m.values.permute(2, 0, 1)[None], (crop, crop), mode="bilinear")[0]
            for m in windows[which].maps
        ]
        at = torch.cat(enlarged)[:, int(y[i]), int(x[i]) - windows[which].left]
        torch.testing.assert_close(found[i], at)


@pytest.mark.parametrize("shape", [(24, 36), (61, 90), (13, 20)])
def test_predictions_are_those_of_a_slow_loop(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mask pixel: the mean over the windows that cover it of the scores, bilinear between cells, in float64."""
    monkeypatch.setattr(stage_features, "ELEMENTS_AT_ONCE", 5 * shape[1] * 4)  # bands of four rows
    crop, resized = 16, (16, 24)
    windows = [window(0, left, crop, {4: 5, 8: 5}, left) for left in (0, 8)]

    def slow(y: float, x: float) -> int:
        scores = []
        for w in windows:
            if not (w.top <= y < w.top + crop and w.left <= x < w.left + crop):
                continue
            total = np.zeros(5)
            for values, cell in w.maps:
                n = values.shape[0]
                a, b = ((p - o) / cell - 0.5 for p, o in ((y, w.top), (x, w.left)))
                for i in range(n):
                    for j in range(n):
                        near = [max(0.0, 1 - abs(min(max(c, 0), n - 1) - k)) for c, k in ((a, i), (b, j))]
                        total += near[0] * near[1] * values[i, j].double().numpy()
            scores.append(total)
        return int(np.mean(scores, 0).argmax())

    found = stage_features.predicted_classes(windows, crop, resized, shape)
    rng = np.random.default_rng(0)
    for row, column in zip(rng.integers(shape[0], size=60), rng.integers(shape[1], size=60), strict=True):
        assert found[row, column] == slow((row + 0.5) * resized[0] / shape[0], (column + 0.5) * resized[1] / shape[1])


def test_linear_scores_of_cells_are_those_of_interpolated_features() -> None:
    w = window(3, 5, 16, {4: 3, 8: 2}, 0)
    head = LinearPixelHead(torch.randn(4, 5), torch.randn(4), 0.1, 0.0)
    y, x = torch.rand(7) * 16 + 3, torch.rand(9) * 16 + 5
    expected = F.linear(stage_features.grid_features(w, y, x), head.weight, head.bias)
    torch.testing.assert_close(stage_features._summed_scores(head.scores(w), y, x), expected, rtol=0, atol=1e-5)


# --- heads -----------------------------------------------------------------------------------------------------------


def pixel_samples(n: int = 12, pixels: int = 10, classes: int = 3) -> PixelSamples:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, classes, (n, pixels), generator=rng)
    centres = torch.randn(classes + 1, 6, generator=rng)
    features = 5 + 3 * (centres[labels] + 2 * torch.randn(n, pixels, 6, generator=rng))
    return PixelSamples(features, labels, classes)


def test_moments_are_those_of_the_labelled_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = pixel_samples()
    monkeypatch.setattr(pixel_heads, "chunks", lambda x: x.split(5))
    found = pixel_heads.standardization(samples)
    kept = samples.features[samples.labels >= 0].double()
    torch.testing.assert_close(found.mean, kept.mean(0).float())
    torch.testing.assert_close(found.scale, kept.std(0, correction=0).float())


def test_linear_head_is_that_of_plain_sgd() -> None:
    """One rate: torch's own SGD of a linear layer on the same batches, in float64."""
    samples = pixel_samples()
    moments = pixel_heads.standardization(samples)
    cpu = torch.device("cpu")
    found = pixel_heads.train_linear(samples, moments, 25, 4, 3, cpu, rates=(0.05,))
    fit, held_out = pixel_heads.split_images(12, 3)
    layer = torch.nn.Linear(6, 3).double()
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + np.cos(np.pi * t / 25)) / 2)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        x = (samples.features[rows].double() - moments.mean) / moments.scale
        return F.cross_entropy(layer(x).flatten(0, 1), samples.labels[rows].flatten(), ignore_index=-1)

    for step in range(25):
        epoch, place = divmod(step, len(fit) // 4)
        order = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch))]
        optimizer.zero_grad()
        loss(order[4 * place : 4 * place + 4]).backward()
        optimizer.step()
        schedule.step()
    x = samples.features[:2].flatten(0, 1)
    expected = layer((x.double() - moments.mean) / moments.scale)
    # float32 sums over 25 steps, whose rounding errors momentum adds up
    torch.testing.assert_close(F.linear(x, found.weight, found.bias).double(), expected, rtol=0, atol=1e-4)
    assert found.held_out == pytest.approx(loss(held_out).item(), abs=1e-5)


def test_learning_rate_is_selected_on_held_out_images() -> None:
    samples = pixel_samples(30)
    moments = pixel_heads.standardization(samples)
    found = pixel_heads.train_linear(samples, moments, 40, 8, 0, torch.device("cpu"), rates=(1e-6, 0.05, 1e30))
    assert found.lr == 0.05


def test_nearest_head_is_that_of_scikit_learn() -> None:
    samples = pixel_samples(classes=3)
    moments = pixel_heads.standardization(samples)
    head = pixel_heads.nearest_head(samples, moments, 10**6, 7)
    w = window(0, 0, 16, {4: 4, 8: 2}, 1)
    (votes,) = head.scores(w, 16).maps
    assert votes.values.shape == (2, 2, 3)
    centres = torch.tensor([4.0, 12.0])
    queries = moments(stage_features.grid_features(w, centres, centres)).flatten(0, 1)
    kept = samples.labels >= 0
    oracle = KNeighborsClassifier(7, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    oracle.fit(moments(samples.features[kept]).double().numpy(), samples.labels[kept].numpy())
    expected = oracle.predict_proba(queries.double().numpy())
    np.testing.assert_allclose(votes.values.flatten(0, 1).numpy(), expected, atol=1e-4)
    assert len(pixel_heads.nearest_head(samples, moments, 20, 7).bank) == 20
    with pytest.raises(UserError, match="--k 21: larger than the bank of 20 pixels"):
        pixel_heads.nearest_head(samples, moments, 20, 21)


# --- measures --------------------------------------------------------------------------------------------------------


def label_maps(n: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Truth with ignored pixels and without class 3, and predictions that are often right; class 4 is in neither."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        truth = rng.choice([-1, 0, 1, 2], (9, 11), p=[0.1, 0.5, 0.3, 0.1]).astype(np.int32)
        wrong = rng.integers(0, 4, truth.shape)
        found.append((truth, np.where(rng.random(truth.shape) < 0.6, np.maximum(truth, 0), wrong).astype(np.int64)))
    return found


def test_measures_are_those_of_scikit_learn() -> None:
    maps = label_maps(20, 0)
    tally = segmentation.Tally(5, 0)
    for i, (truth, predicted) in enumerate(maps):
        tally.add(i, truth, predicted)
    t, p = (np.concatenate([m[i].ravel() for m in maps]) for i in (0, 1))
    t, p = t[t >= 0], p[np.concatenate([m[0].ravel() for m in maps]) >= 0]
    found = tally.result("abcde")
    iou = jaccard_score(t, p, labels=range(4), average=None)
    assert found["miou"] == pytest.approx(100 * iou.mean())  # class 3 is predicted and never true: it counts, as 0
    assert [row["iou"] for row in found["per_class"]] == [pytest.approx(100 * x) for x in iou] + [None]
    assert found["pixel_accuracy"] == pytest.approx(100 * accuracy_score(t, p))
    assert found["mean_accuracy"] == pytest.approx(100 * recall_score(t, p, labels=range(3), average="macro"))
    assert np.array_equal(tally.counts[0], confusion_matrix(t, p, labels=range(5)).diagonal())


def test_interval_is_that_of_resampled_images() -> None:
    maps = label_maps(60, 1)
    tally = segmentation.Tally(4, 0)
    for i in np.random.default_rng(0).permutation(60):  # the order of the images does not matter
        tally.add(int(i), *maps[i])
    again = segmentation.Tally(4, 0)
    for i, pair in enumerate(maps):
        again.add(i, *pair)
    assert np.array_equal(tally.resampled, again.resampled)
    counts = np.array(
        [[np.bincount(x, minlength=4) for x in (t[(t >= 0) & (t == p)], p[t >= 0], t[t >= 0])] for t, p in maps]
    )
    rng = np.random.default_rng(2)
    slow = [segmentation.class_iou(counts[rng.integers(60, size=60)].sum(0)).mean() for _ in range(1000)]
    low, high = 100 * np.percentile(slow, [2.5, 97.5])
    found = tally.result("abcd")["interval"]
    assert found == pytest.approx([low, high], abs=0.15 * (high - low))  # two draws of 1000 resamples


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    tally = segmentation.Tally(4, 0)
    held = tally.counts.nbytes + tally.resampled.nbytes
    for i, pair in enumerate(label_maps(30, 3)):
        tally.add(i, *pair)
    assert tally.counts.nbytes + tally.resampled.nbytes == held == 8 * 4 * 3 * 1001
    assert vars(tally).keys() == {"seed", "counts", "resampled"}


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test, out = paint_masked(tmp_path / "train", 12, 0), paint_masked(tmp_path / "test", 5, 1), tmp_path / "out"
    common = ["evaluate", "segmentation", "--checkpoint", str(checkpoint), "--workers", "0", "--out", str(out)]
    sets = ["--train", str(train), "--test", str(test)]
    small = ["--iterations", "60", "--sgd-batch", "4", "--pixels", "32", "--k", "5"]
    assert cli.main([*common, *sets, *small]) == 0
    result = json.loads((out / "segmentation.json").read_text())
    assert list(result) == [
        *("checkpoint", "step", "train", "test", "n_train", "n_test", "classes", "protocol", "results", "largest_class")
    ]
    linear, knn = result["results"]["linear"], result["results"]["knn"]
    assert linear["miou"] > 80  # red and blue: even untrained features tell them apart
    assert knn["miou"] > 65
    assert linear["interval"][0] < linear["miou"] < linear["interval"][1]
    masks = np.concatenate([np.asarray(Image.open(p)).ravel() for p in sorted((test / "masks").iterdir())])
    share = (masks == 0).sum() / (masks != 255).sum()
    assert result["largest_class"]["pixel_accuracy"] == pytest.approx(100 * share)
    assert result["largest_class"]["miou"] == pytest.approx(50 * share)
    assert sum(row["pixels"] for row in linear["per_class"]) == (masks != 255).sum()
    protocol = result["protocol"]
    assert {n: protocol[n] for n in ("size", "crop", "stride", "mask_resolution", "ignored")} == {
        **{"size": 32, "crop": 32, "stride": 21, "mask_resolution": "original", "ignored": "255"}
    }
    assert Image.open(out / "segmentation.png").width > 500
    assert "windows of 32 every 21, masks at their own resolution, 255 ignored" in capsys.readouterr().out
    assert len(list((out / "features").iterdir())) == 1
    assert cli.main([*common, *sets, *small, "--head", "linear"]) == 0  # from the cache
    again = json.loads((out / "segmentation.json").read_text())
    assert again["results"] == {"linear": linear}
    for extra, message in (
        (["--k", "999"], "--k 999: larger than the bank of 384 pixels"),
        (["--crop", "48"], "--crop 48: larger than the image's short side of 32"),
        (["--stride", "33"], "--stride 33: leaves gaps"),
        (["--ignore", "7"], "holds the number 255, but there are 2 classes"),
        (["--ignore", "1"], "holds the number 255"),
        (["--checkpoint", "pixels"], "needs tokens on a grid; pixels gives none"),
        (["--test", str(tmp_path / "nowhere")], "no such folder"),
    ):
        capsys.readouterr()
        assert cli.main([*common, *sets, *small, *extra]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for path in (train / "masks").iterdir():
        Image.fromarray(np.zeros(np.asarray(Image.open(path)).shape, np.uint8)).save(path)
    assert cli.main([*common, *sets, *small]) == 2
    assert "its masks hold only one class" in capsys.readouterr().err


@pytest.mark.parametrize("model", [{"trunk": "deit_s"}, {}])
def test_stage_maps_of_a_trunk(model: dict) -> None:
    from esvit_scale.models.registry import build_trunk

    small = {"embed_dim": 16, "depths": [1, 1], "heads": [1, 2], "window": 4}
    trunk = build_trunk(model_config(model or small, 32)).eval()
    images = torch.randn(2, 3, 32, 32)
    found = stage_features.stage_maps(trunk, images)
    assert len(found) == 2
    last = found[1][-1]
    with torch.no_grad():
        regions = trunk([images]).regions.view(2, *last.values.shape)
    torch.testing.assert_close(last.values, regions[1])  # the last stage's map is the region features
    for values, cell in found[0]:
        assert values.shape[0] * cell == 32
