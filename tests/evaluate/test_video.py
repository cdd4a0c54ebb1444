"""Label propagation: measures and propagation against slow versions of the published formulas, and the command.

The videos are synthetic moving squares: they show that the tool is right, not that a model is good.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from esvit_scale import cli
from esvit_scale.data import videos
from esvit_scale.evaluate import object_measures, propagation, video
from esvit_scale.evaluate.propagation import Propagator
from tests.evaluate.conftest import paint_videos

# --- measures --------------------------------------------------------------------------------------------------------


def blob(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random mask with holes and several parts that may touch the border."""
    small = rng.random((7, 9)) < 0.4
    picture = Image.fromarray(small.astype(np.uint8) * 255).resize(shape[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture) > 127


def slow_f(truth: np.ndarray, predicted: np.ndarray) -> float:
    """The steps of the published evaluation: boundary maps, dilation by a disk, precision and recall."""
    height, width = truth.shape

    def boundary(mask: np.ndarray) -> set[tuple[int, int]]:
        found = set()
        for y in range(height):
            for x in range(width):
                below, right = min(y + 1, height - 1), min(x + 1, width - 1)
                if y == height - 1 and x == width - 1:
                    continue
                others = [mask[y, right], mask[below, x]]
                if y < height - 1 and x < width - 1:
                    others.append(mask[below, right])
                if any(o != mask[y, x] for o in others):
                    found.add((y, x))
        return found

    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))
    disk = [
        (i, j)
        for i in range(-radius, radius + 1)
        for j in range(-radius, radius + 1)
        if i * i + j * j <= radius * radius
    ]
    of_truth, of_predicted = boundary(truth), boundary(predicted)
    wide_truth = {(y + i, x + j) for y, x in of_truth for i, j in disk}
    wide_predicted = {(y + i, x + j) for y, x in of_predicted for i, j in disk}
    if not of_predicted and of_truth:
        precision, recall = 1.0, 0.0
    elif of_predicted and not of_truth:
        precision, recall = 0.0, 1.0
    elif not of_predicted:
        precision, recall = 1.0, 1.0
    else:
        precision = len(of_predicted & wide_truth) / len(of_predicted)
        recall = len(of_truth & wide_predicted) / len(of_truth)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("shape", [(26, 40), (24, 125)])  # tolerances of 1 and of 2 pixels
def test_boundary_accuracy_is_the_published_formula(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape[0])
    values = []
    for i in range(6):
        truth = blob(shape, rng)
        predicted = np.roll(truth, (i % 3, i // 3), (0, 1)) if i < 5 else blob(shape, rng)
        values.append(object_measures.boundary_accuracy(truth, predicted))
        assert values[-1] == pytest.approx(slow_f(truth, predicted))
    assert values[0] == 1
    assert min(values) < 0.8
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    for pair in ((empty, empty), (empty, truth), (truth, empty), (full, empty), (full, full)):
        assert object_measures.boundary_accuracy(*pair) == slow_f(*pair)


def test_region_similarity() -> None:
    a, b = np.zeros((4, 5), bool), np.zeros((4, 5), bool)
    assert object_measures.region_similarity(a, b) == 1
    a[:2], b[1:3] = True, True
    assert object_measures.region_similarity(a, b) == pytest.approx(5 / 15)
    assert object_measures.region_similarity(a, np.zeros_like(a)) == 0


def test_void_pixels_belong_to_no_object() -> None:
    truth, predicted = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    truth[5:10, 5:10], predicted[5:10, 5:15] = 7, 7
    truth[:, 10:] = 255
    scores = video.Scores([7])
    scores.add(truth, {"propagated": predicted, "static": np.zeros_like(predicted)})
    assert scores.means() == {"propagated": [[1.0, 1.0]], "static": [[0.0, 0.0]]}


# --- propagation -----------------------------------------------------------------------------------------------------


def slow_propagation(
    features: list[torch.Tensor], labels: torch.Tensor, last: int, k: int, radius: int
) -> list[torch.Tensor]:
    """Each cell by itself, in float64: the most similar cells in its neighbourhood of the first and the last frames."""
    height, width, _ = features[0].shape
    known = [labels.double()]
    for t in range(1, len(features)):
        found = torch.zeros_like(known[0])
        context = sorted({0, *range(max(1, t - last), t)})
        for y in range(height):
            for x in range(width):
                near = [
                    (float(F.cosine_similarity(features[t][y, x].double(), features[s][a, b].double(), dim=0)), s, a, b)
                    for s in context
                    for a in range(max(0, y - radius), min(height, y + radius + 1))
                    for b in range(max(0, x - radius), min(width, x + radius + 1))
                ]
                near = sorted(near, reverse=True)[:k]
                weights = [math.exp(similarity / 0.1) for similarity, *_ in near]
                for weight, (_, s, a, b) in zip(weights, near, strict=True):
                    found[y, x] += weight / sum(weights) * known[s][a, b]
        known.append(found)
    return known[1:]


def test_propagation_is_that_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagation, "ELEMENTS_AT_ONCE", 150)  # several bands of cells
    rng = torch.Generator().manual_seed(0)
    features = [torch.randn(4, 5, 3, generator=rng) for _ in range(5)]
    labels = F.one_hot(torch.randint(3, (4, 5), generator=rng), 3).float()
    propagator = Propagator(features[0], labels, last=2, k=3, radius=1)
    found = [propagator.step(frame) for frame in features[1:]]
    for ours, expected in zip(found, slow_propagation(features, labels, 2, 3, 1), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.sum(2), torch.ones(4, 5))


def test_memory_does_not_grow_with_the_number_of_frames() -> None:
    features = torch.randn(4, 5, 3)
    propagator = Propagator(features, F.one_hot(torch.zeros(4, 5).long(), 2).float(), last=3, k=3, radius=2)

    def held() -> int:
        return sum(x.nbytes for pair in (propagator.first, *propagator.recent) for x in pair)

    sizes = []
    for _ in range(12):
        propagator.step(torch.randn(4, 5, 3))
        sizes.append(held())
    assert sizes[2:] == [4 * 20 * 5 * 4] * 10  # the first frame and three more: 20 cells of 3 features and 2 labels


def test_objects_are_those_of_stretched_maps() -> None:
    labels = torch.zeros(2, 2, 3)
    labels[..., 0] = 0.7
    labels[0, 0] = torch.tensor([0.6, 0.4, 0.0])  # a small object whose fraction faded; none of the third
    found = propagation.objects_of(labels, (2, 2))
    assert found.tolist() == [[1, 0], [0, 0]]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = paint_videos(tmp_path / "DAVIS", 3, 5, 0), tmp_path / "out"
    listed = root / "ImageSets" / "2017" / "val.txt"
    arguments = ["evaluate", "video", "--checkpoint", str(checkpoint), "--workers", "0", "--out", str(out)]
    small = ["--size", "64", "--stage", "1", "--radius", "4"]
    assert cli.main([*arguments, "--data", str(listed), *small]) == 0
    result = json.loads((out / "video.json").read_text())
    assert list(result) == [
        *("checkpoint", "step", "data", "n_videos", "n_objects", "protocol", "results", "per_video")
    ]
    assert (result["n_videos"], result["n_objects"]) == (3, 6)
    moved, kept = result["results"]["propagated"], result["results"]["static"]
    assert moved["j"] > kept["j"] + 10  # colours tell the squares: even untrained features follow them
    assert moved["jf"] == pytest.approx((moved["j"] + moved["f"]) / 2)
    assert moved["interval"][0] <= moved["jf"] <= moved["interval"][1]
    j = np.mean([o["propagated"]["j"] for row in result["per_video"] for o in row["objects"]])
    assert moved["j"] == pytest.approx(100 * j)
    # the first square moves 6 pixels a frame, its first mask is kept: frames 1 to 3 count, not the last
    expected = np.mean([20 * (20 - 6 * i) / (2 * 400 - 20 * (20 - 6 * i)) for i in (1, 2, 3)])
    assert result["per_video"][0]["objects"][0]["static"]["j"] == pytest.approx(expected)
    assert result["protocol"]["cell"] == 4
    assert Image.open(out / "video.png").width > 500
    assert "6 objects of 3 videos, short side 64 pixels, stage 1 (cells of 4 pixels)" in capsys.readouterr().out
    assert cli.main([*arguments, "--data", str(root), *small]) == 0
    assert json.loads((out / "video.json").read_text())["per_video"] == result["per_video"]

    def fails(message: str, *more: str) -> None:
        capsys.readouterr()
        assert cli.main([*arguments, "--data", str(listed), *small, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    fails("--k 26: larger than the 25 cells that a corner", "--k", "26")
    fails("--stage 9: the trunk has 3 stages", "--stage", "9")
    fails("needs tokens on a grid; pixels gives none", "--checkpoint", "pixels")
    fails("no such folder", "--data", str(tmp_path / "nowhere"))
    masks, frames = (root / kind / "480p" / "video1" for kind in ("Annotations", "JPEGImages"))
    Image.fromarray(np.full((64, 96), 9, np.uint8)).save(masks / "00003.png")
    fails("00003.png: holds object 9, which the first frame lacks")
    Image.fromarray(np.zeros((64, 95), np.uint8)).save(masks / "00003.png")
    fails("00003.png: 95×64 pixels, but its frame has 96×64")
    (masks / "00003.png").unlink()
    fails("00003.jpg: has no mask")
    (frames / "00003.jpg").unlink()
    fails("frames are missing between 00002.jpg and 00004.jpg")
    shutil.rmtree(frames)
    fails("video1: no such folder of frames")


def test_frames_are_resized_to_whole_cells(tmp_path: Path) -> None:
    sequences = videos.open_set(paint_videos(tmp_path / "DAVIS", 2, 3, 0))
    found = list(videos.frames_of(sequences, [1], 100, 32, 0))
    assert [(f.sequence, f.number) for f in found] == [(1, 0), (1, 1), (1, 2)]
    assert found[0].pixels.shape == (96, 160, 3)  # 64×96 at a short side of 100: 100×150
    assert found[0].mask.shape == (64, 96)
