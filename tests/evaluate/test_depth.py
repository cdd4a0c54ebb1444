"""Depth: layouts, the head against plain torch in float64, measures, the command, and a real pair with true disparity."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from esvit_scale import cli
from esvit_scale.data import depth_maps, samples
from esvit_scale.errors import UserError
from esvit_scale.evaluate import depth, depth_head, pixel_heads
from esvit_scale.evaluate.pixel_heads import PixelSamples
from esvit_scale.evaluate.stage_features import StageMap, Window, at_pixels
from tests.evaluate.conftest import paint_depth

CPU = torch.device("cpu")


def pixel_samples(n: int = 12, pixels: int = 10) -> PixelSamples:
    """Features that depend linearly on the depth, which is 1 to 5 m; a tenth of the pixels have none."""
    rng = torch.Generator().manual_seed(0)
    metres = 1 + 4 * torch.rand(n, pixels, generator=rng)
    direction = torch.randn(6, generator=rng)
    features = 5 + metres[..., None] * direction + torch.randn(n, pixels, 6, generator=rng)
    labels = (metres.double() * depth_head.PER_METRE).round().long()
    labels[torch.rand(n, pixels, generator=rng) < 0.1] = -1
    return PixelSamples(features, labels, 0)


# --- the head --------------------------------------------------------------------------------------------------------


def test_depth_is_the_weighted_mean_of_the_bins() -> None:
    scores, bins = torch.randn(4, 5, 7), depth_head.uniform_bins(1, 4, 7)
    assert bins.tolist() == [1, 1.5, 2, 2.5, 3, 3.5, 4]
    found = depth_head.depth_of(scores, bins)
    for row, expected in zip(scores.view(-1, 7).double(), found.flatten(), strict=True):
        weights = [max(float(s), 0) + 0.1 for s in row]
        assert float(expected) == pytest.approx(
            sum(w * b for w, b in zip(weights, bins.tolist(), strict=True)) / sum(weights), rel=1e-5
        )


def test_gradient_is_that_of_the_loss() -> None:
    g = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(depth_head.loss_with_gradient(g, 9).sum(), g)
    loss = (g.square().mean(0) - 0.85 * g.mean(0).square()).sqrt()
    (expected,) = torch.autograd.grad(loss.sum(), g)
    torch.testing.assert_close(found, expected)


def test_head_is_that_of_plain_adamw() -> None:
    """One rate: torch's own AdamW of a linear layer with the loss written out, in float64."""
    given = pixel_samples()
    moments = pixel_heads.standardization(given)
    bins = depth_head.uniform_bins(0.5, 6, 9)
    found = depth_head.train_depth(given, moments, bins, 20, 4, 3, CPU, rates=(0.02,))
    fit, held_out = pixel_heads.split_images(12, 3)
    layer = torch.nn.Linear(6, 9).double()
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(9, 6, generator=torch.Generator().manual_seed(3)))
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + np.cos(np.pi * t / 20)) / 2)

    def predicted(features: torch.Tensor) -> torch.Tensor:
        weights = layer((features.double() - moments.mean) / moments.scale).relu() + 0.1
        return (weights * bins).sum(-1) / weights.sum(-1)

    def pixels(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        known = given.labels[rows] >= 0
        return predicted(given.features[rows][known]), given.labels[rows][known].double() / 1e6

    for step in range(20):
        epoch, place = divmod(step, len(fit) // 4)
        order = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(3 * 1_000_003 + epoch))]
        p, t = pixels(order[4 * place : 4 * place + 4])
        g = p.log() - t.log()
        optimizer.zero_grad()
        (g.square().mean() - 0.85 * g.mean().square()).sqrt().backward()
        optimizer.step()
        schedule.step()
    x = given.features[:2].flatten(0, 1)
    ours = depth_head.depth_of(F.linear(x, found.weight, found.bias), bins)
    # AdamW divides by the root of tiny squares at first, which enlarges float32's rounding
    torch.testing.assert_close(ours.double(), predicted(x).detach(), rtol=0, atol=1e-3)
    p, t = pixels(held_out)
    assert found.held_out == pytest.approx((p - t).square().mean().sqrt().item(), abs=1e-3)


def test_learning_rate_is_selected_on_held_out_images() -> None:
    given = pixel_samples(30)
    moments, bins = pixel_heads.standardization(given), depth_head.uniform_bins(0.5, 6, 16)
    found = depth_head.train_depth(given, moments, bins, 60, 8, 0, CPU, rates=(1e-7, 0.02))
    assert found.lr == 0.02
    assert found.held_out < 0.8  # metres; the depths have a standard deviation of 1.15


def test_scores_are_averaged_over_windows() -> None:
    """Two windows with different scores: a pixel that both cover gets the mean, on which depth depends nonlinearly."""
    windows = [Window(0, left, [StageMap(torch.full((2, 2, 1), score), 4.0)]) for left, score in ((0, 1.0), (4, 3.0))]
    found = at_pixels(windows, 8, (8, 12), (4, 6), lambda scores: scores[..., 0])
    assert found.tolist() == [[1, 1, 2, 2, 3, 3]] * 4


# --- measures --------------------------------------------------------------------------------------------------------


def depths(n: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        truth = rng.uniform(1, 9, rng.integers(5, 40)).astype(np.float32)
        found.append((truth, (truth * np.exp(rng.normal(0, 0.3, len(truth)))).astype(np.float32)))
    return found


def test_measures_are_the_published_formulas_averaged_over_images() -> None:
    tally, pairs = depth.Tally(0), depths(20, 0)
    for i, (truth, predicted) in enumerate(pairs):
        tally.add(i, truth, predicted)
    tally.add(20, np.zeros(0, np.float32), np.zeros(0, np.float32))  # an image without depth does not count
    rows = []
    for truth, predicted in pairs:
        n = len(truth)
        squares = sum((float(t) - float(p)) ** 2 for t, p in zip(truth, predicted, strict=True))
        relative = sum(abs(float(t) - float(p)) / float(t) for t, p in zip(truth, predicted, strict=True))
        near = [
            sum(max(float(t) / float(p), float(p) / float(t)) < 1.25**k for t, p in zip(truth, predicted, strict=True))
            for k in (1, 2, 3)
        ]
        rows.append([np.sqrt(squares / n), relative / n, *(100 * x / n for x in near)])
    found = tally.result()
    assert [found[name] for name in depth.MEASURES] == pytest.approx(np.mean(rows, 0).tolist())
    rng, slow = np.random.default_rng(1), np.array(rows)[:, 0]
    low, high = np.percentile([slow[rng.integers(20, size=20)].mean() for _ in range(1000)], [2.5, 97.5])
    assert found["interval"] == pytest.approx([low, high], abs=0.15 * (high - low))  # two draws of 1000 resamples


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    tally = depth.Tally(0)
    held = tally.sums.nbytes
    for i, pair in enumerate(depths(30, 3)):
        tally.add(i, *pair)
    assert tally.sums.nbytes == held == 8 * 6 * 1001
    assert vars(tally).keys() == {"seed", "sums"}


# --- layouts and the command -----------------------------------------------------------------------------------------


def test_layouts(tmp_path: Path) -> None:
    root = paint_depth(tmp_path / "set", 3, 0)
    found = depth_maps.open_set(root)
    assert (found.layout, found.keys) == ("images/ and depth/", ["00", "01", "02"])
    first = depth_maps.read_depth(found, 0)
    assert (first[:4] == 0).all()
    assert first[4:].min() == pytest.approx(1 + 4 * 4 / 39, abs=1e-3)
    np.save(root / "depth" / "01.npy", np.full((44, 55), np.nan, np.float32))
    (root / "depth" / "01.png").unlink()
    found = depth_maps.open_set(root)
    assert not depth_maps.read_depth(found, 1).any()
    assert depth_maps.read_depth(found._replace(most=3.0), 0).max() <= 3
    depth_maps.check(found, 2)
    room = tmp_path / "nyu" / "kitchen_0001"
    room.mkdir(parents=True)
    Image.new("RGB", (640, 480)).save(room / "rgb_00001.jpg")
    Image.fromarray(np.full((480, 640), 2500, np.uint16)).save(room / "sync_depth_00001.png")
    nyu = depth_maps.open_set(tmp_path / "nyu", scale=1.0)
    assert (nyu.layout, nyu.keys) == ("NYU Depth v2", ["kitchen_0001/rgb_00001"])
    metres = depth_maps.read_depth(nyu, 0)
    assert (metres == 2.5).all()
    inside = depth_maps.counted(nyu, metres)
    assert inside.sum() == (471 - 45) * (601 - 41)
    assert inside[45:471, 41:601].all()
    for break_it, message in (
        (lambda: np.save(root / "depth" / "01.npy", np.ones((5, 5))), "5×5 pixels, but its image has 55×44"),
        (lambda: np.save(root / "depth" / "01.npy", np.ones((44, 55, 3))), "has one channel"),
        (lambda: (root / "depth" / "01.npy").write_bytes(b"no"), "cannot be read"),
        (lambda: (root / "depth" / "01.npy").unlink(), "has no depth map"),
    ):
        break_it()
        with pytest.raises(UserError, match=message):
            depth_maps.check(depth_maps.open_set(root), 0)
    with pytest.raises(UserError, match="--depth-scale"):
        depth_maps.check(depth_maps.open_set(paint_depth(tmp_path / "far", 2, 0), scale=1.0), 0)
    with pytest.raises(UserError, match="not a depth set"):
        depth_maps.open_set(tmp_path / "far" / "images")


@pytest.mark.slow
def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test, out = paint_depth(tmp_path / "train", 12, 0), paint_depth(tmp_path / "test", 5, 1), tmp_path / "out"
    common = ["evaluate", "depth", "--checkpoint", str(checkpoint), "--workers", "0", "--out", str(out)]
    sets = ["--train", str(train), "--test", str(test)]
    small = ["--iterations", "80", "--head-batch", "4", "--pixels", "32", "--bins", "16", "--max-depth", "6"]
    assert cli.main([*common, *sets, *small]) == 0
    result = json.loads((out / "depth.json").read_text())
    assert list(result) == [
        *("checkpoint", "step", "train", "test", "n_train", "n_test", "mean_depth", "protocol", "results")
    ]
    linear, constant = result["results"]["linear"], result["results"]["constant"]
    assert constant["rmse"] == pytest.approx(1.05, abs=0.1)  # a uniform depth of 1.4 to 5 m or 1 to 4.6 m
    assert linear["rmse"] < 0.6 * constant["rmse"]  # brightness tells the depth: even untrained features have it
    assert linear["delta1"] > constant["delta1"]
    assert linear["interval"][0] <= linear["rmse"] <= linear["interval"][1]
    assert Image.open(out / "depth.png").width > 500
    assert "windows of 32 every 21, depth maps at their own resolution, 0.001 to 6 m" in capsys.readouterr().out
    assert cli.main([*common, *sets, *small]) == 0  # from the cache
    assert json.loads((out / "depth.json").read_text()) == result
    assert len(list((out / "features").iterdir())) == 1
    for extra, message in (
        (["--min-depth", "7"], "--min-depth 7: must be above 0 and below --max-depth 6"),
        (["--crop", "48"], "--crop 48: larger than the image's short side of 32"),
        (["--checkpoint", "pixels"], "needs tokens on a grid; pixels gives none"),
        (["--test", str(tmp_path / "nowhere")], "no such folder"),
        (["--depth-scale", "1"], "no depth lies within"),
    ):
        capsys.readouterr()
        assert cli.main([*common, *sets, *small, *extra]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_real_disparity_of_a_stereo_pair(checkpoint: Path, tmp_path: Path) -> None:
    """Tiles of scikit-image's photograph of a motorcycle, every third to predict: better than always the mean depth.

    Depth is baseline · focal length / (disparity + offset), with the calibration that scikit-image documents.
    """
    left, _, disparity = samples.stereo_pair()
    metres = np.where(np.isfinite(disparity), 0.193001 * 994.978 / (disparity + 31.086), 0).astype(np.float32)
    for i, (y, x) in enumerate((y, x) for y in range(0, 480, 60) for x in range(0, 700, 70)):
        root = tmp_path / ("test" if i % 3 == 0 else "train")
        for kind in ("images", "depth"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(left[y : y + 60, x : x + 70]).save(root / "images" / f"{i:02d}.png")
        np.save(root / "depth" / f"{i:02d}.npy", metres[y : y + 60, x : x + 70])
    arguments = ["evaluate", "depth", "--checkpoint", str(checkpoint), "--workers", "0", "--out", str(tmp_path)]
    sets = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--size", "60", "--crop", "32"]
    assert cli.main([*arguments, *sets, "--iterations", "200", "--bins", "32"]) == 0
    results = json.loads((tmp_path / "depth.json").read_text())["results"]
    assert results["linear"]["rmse"] < results["constant"]["rmse"]
    assert results["linear"]["delta1"] > results["constant"]["delta1"]
