"""Correspondence: what must be 1, what must be the mirror, what must be chance, and the official script's own numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from esvit_scale.data import samples
from esvit_scale.errors import UserError
from esvit_scale.evaluate import correspondence
from esvit_scale.models.trunk import Features


class Place(nn.Module):
    """A trunk that knows a place by its red and green, as the cosine of angles: similar is near."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell
        self.device = nn.Parameter(torch.zeros(1))

    def forward(self, crops: list[torch.Tensor]) -> Features:
        colours = F.avg_pool2d(crops[0], self.cell)[:, :2]  # [B, 2, H, W]
        n, _, h, w = colours.shape
        angle = colours.permute(0, 2, 3, 1).reshape(-1, 2).double() / 2
        tokens = torch.cat([angle.cos(), angle.sin()], 1)
        return Features(tokens.view(n, -1, 4).mean(1), tokens, [(n, h, w)])


def view(tokens: torch.Tensor, grid: tuple[int, int], cell: int = 10) -> correspondence.View:
    return correspondence.View(
        np.zeros((grid[0] * cell, grid[1] * cell, 3), np.uint8), F.normalize(tokens, dim=1), grid
    )


@pytest.fixture
def places() -> np.ndarray:
    """A picture whose red is x and whose green is y."""
    y, x = np.mgrid[0:128, 0:128].astype(np.uint8)
    return np.stack([2 * x, 2 * y, x], -1)


def test_identical_grids_correspond_fully() -> None:
    grid = (5, 7)
    tokens = torch.randn(35, 16)
    found = correspondence.measure(
        correspondence.match_pairs(view(tokens, grid), view(tokens, grid), correspondence.cell_centres(grid, (50, 70)))
    )
    assert found["top_accuracy"] == found["accuracy"] == 100
    assert found["top_distance_px"] == found["distance_px"] == 0
    assert found["top_similarity"] == pytest.approx(1)
    assert found["chance"] == pytest.approx(100 / 35)


def test_flipped_grid_corresponds_mirrored() -> None:
    grid, tokens = (5, 7), torch.randn(35, 16)
    flipped = tokens.view(5, 7, 16).flip(1).reshape(35, 16)
    here, there = view(tokens, grid), view(flipped, grid)
    mirror = correspondence.cell_centres(grid, (50, 70)) * torch.tensor([-1, 1]) + torch.tensor([70, 0])
    right = correspondence.match_pairs(here, there, mirror)
    assert correspondence.measure(right)["accuracy"] == 100
    assert torch.equal(right.found[:, 0], 70 - right.start[:, 0])
    unmirrored = correspondence.measure(
        correspondence.match_pairs(here, there, correspondence.cell_centres(grid, (50, 70)))
    )
    assert unmirrored["accuracy"] == pytest.approx(100 / 7)  # the middle column is its own mirror
    assert unmirrored["distance_px"] == pytest.approx(10 * (6 + 4 + 2 + 0 + 2 + 4 + 6) / 7)


def test_random_features_score_at_chance() -> None:
    grid, rates = (7, 7), []
    for seed in range(200):
        torch.manual_seed(seed)
        here, there = (view(torch.randn(49, 8), grid) for _ in range(2))
        rates.append(
            correspondence.measure(correspondence.match_pairs(here, there, correspondence.cell_centres(grid, (70, 70))))
        )
    chance = rates[0]["chance"]
    assert chance == pytest.approx(2.04, abs=0.01)
    for name, n in (("accuracy", 200 * 49), ("top_accuracy", 200 * 10)):
        mean = sum(r[name] for r in rates) / len(rates)
        assert abs(mean - chance) < 4 * 100 * (0.0204 * 0.98 / n) ** 0.5, name


def official(first: torch.Tensor, second: torch.Tensor, side: int) -> tuple[float, float]:
    """The official measure in the words of its script: a loop over the ten most similar pairs of a square picture."""
    n = side // 32
    similarity = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    best, index = similarity.max(1)
    right = distance = 0.0
    for i in sorted(range(n * n), key=lambda i: -best[i].item())[:10]:
        j = int(index[i])
        y1, x1, y2, x2 = (32 * v + 16 for v in (*divmod(i, n), *divmod(j, n)))
        off = ((side - x1 - x2) ** 2 + (y1 - y2) ** 2) ** 0.5
        distance += off
        right += off == 0
    return right / 10, distance / 10


def test_measure_equals_the_official_one() -> None:
    torch.manual_seed(3)
    first = torch.randn(49, 8)
    second = first.view(7, 7, 8).flip(1).reshape(49, 8) + 1.5 * torch.randn(49, 8)
    pixels = np.zeros((224, 224, 3), np.uint8)
    mirror = correspondence.cell_centres((7, 7), (224, 224)) * torch.tensor([-1, 1]) + torch.tensor([224, 0])
    found = correspondence.measure(
        correspondence.match_pairs(
            correspondence.View(pixels, first, (7, 7)), correspondence.View(pixels, second, (7, 7)), mirror
        )
    )
    accuracy, distance = official(first, second, 224)
    assert 0 < accuracy < 1
    assert found["top_accuracy"] == pytest.approx(100 * accuracy)
    assert found["top_distance_px"] == pytest.approx(distance)


def test_second_view_is_flipped_and_grey() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
    views = [
        correspondence.mirrored(Place(8), correspondence.extract_view(Place(8), pixels), key).second
        for key in ("a", "b", "c")
    ]
    for second in views:
        assert (second == second[:, :, :1]).all()
        grey = pixels[:, ::-1] @ np.array([0.299, 0.587, 0.114])
        alike, unflipped = (np.corrcoef(second[..., 0].ravel(), g.ravel())[0, 1] for g in (grey, grey[:, ::-1]))
        assert alike > 0.8  # the hue has moved
        assert abs(unflipped) < 0.2
    assert not np.array_equal(views[0], views[1])
    assert np.array_equal(
        views[0], correspondence.mirrored(Place(8), correspondence.extract_view(Place(8), pixels), "a").second
    )


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_crop_position_is_correct(places: np.ndarray, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Whatever is cropped and flipped, a trunk that knows places finds each token's cell, or the one beside it."""
    monkeypatch.setattr(correspondence, "jitter_and_grey", lambda pixels, key, seed: pixels)
    monkeypatch.setattr(correspondence, "CROP_SCALE", (scale, scale))
    flips = set()
    for key in "abcdefgh":
        found = correspondence.cropped(Place(16), correspondence.extract_view(Place(16), places), key).pairs
        assert (len(found.right) == 64) == (scale == 1)
        assert (found.found - found.true).abs().max() <= 8 + 1
        x = torch.stack([found.start[:, 0], found.found[:, 0]])
        flips.add(bool(torch.corrcoef(x)[0, 1] < 0))
    assert flips == {True, False}


def test_stereo_pairs_use_the_true_disparity() -> None:
    left, right, disparity = samples.stereo_pair()
    y, x = np.nonzero(np.isfinite(disparity))
    there = np.round(x - disparity[y, x]).astype(int)
    inside = there >= 0
    same = np.abs(left[y, x].astype(int) - right[y, there].astype(int))[inside].mean()
    assert same < 10  # of 255; to the other side it is 45
    case = correspondence.stereo(Place(20))
    shift = case.pairs.start - case.pairs.true
    assert (shift[:, 1] == 0).all()
    assert 7 < shift[:, 0].min() < shift[:, 0].max() < 60
    assert len(case.pairs.right) > 700
    assert correspondence.measure(case.pairs)["chance"] == pytest.approx(100 / (25 * 37))


def test_folder_evaluation_writes_results_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    monkeypatch.setattr(correspondence, "load_frozen_trunk", lambda _: c_teacher())
    result = correspondence.run_correspondence(
        tmp_path / "x", tmp_path / "images", tmp_path / "out", images=8, workers=0
    )
    assert json.loads((tmp_path / "out" / "correspondence.json").read_text()) == result.summary
    assert result.summary["images"] == 8
    assert set(result.summary["measures"]) == {"mirrored", "cropped", "stereo"}
    assert (len(result.best), len(result.worst)) == (3, 3)
    rates = [float(case.pairs.right.float().mean()) for case in (*result.best, *result.worst[::-1])]
    assert rates == sorted(rates, reverse=True)
    assert "mirrored" in correspondence.table(result.summary)
    one = correspondence.run_correspondence(tmp_path / "x", tmp_path / "images" / "0.png", tmp_path / "one")
    assert one.summary["images"] == 1


def c_teacher() -> object:
    from esvit_scale.evaluate.features import FrozenTrunk

    return FrozenTrunk(Place(8), 32, 5)


def test_trunk_without_a_grid_is_refused() -> None:
    class Flat(Place):
        def forward(self, crops: list[torch.Tensor]) -> Features:
            return super().forward(crops)._replace(grids=[])

    with pytest.raises(UserError, match="needs region tokens on a grid; the trunk Flat gives none"):
        correspondence.extract_view(Flat(8), np.zeros((32, 32, 3), np.uint8))
