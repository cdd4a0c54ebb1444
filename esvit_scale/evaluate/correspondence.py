"""`esvit-scale evaluate correspondence`: how often region tokens match the same place in another view of an image.

Each token of view 1 is matched to the token of view 2 with the highest cosine similarity; nothing is trained. There are
three kinds of pairs of views whose true correspondence is known:

- *mirrored*, as in EsViT's `analyze_models.py` (the official script): view 2 is view 1 flipped, with colour jitter
  (probability 0.8), then converted to grey.
- *cropped*: view 2 is a crop of 0.4 to 1 of the area of view 1, resized, flipped at random, then jittered and grey as
  above. Tokens whose place lies outside the crop do not count.
- *stereo*: two photographs with known disparity, so that view 2 is not made by an augmentation as in training.

Two figures are measured: the percentage of tokens that are matched to exactly the true cell, and the mean distance in
pixels from the matched cell to the true place. Both are given over the 10 most similar pairs, as in the official
script, and over all tokens. The chance level is the accuracy of random features: one over the number of tokens of
view 2.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from esvit_scale import files
from esvit_scale.data import crops, photometric, samples, stream
from esvit_scale.data import manifest as manifests
from esvit_scale.errors import UserError
from esvit_scale.evaluate.attention import read_picture, require_pictures, to_trunk
from esvit_scale.evaluate.features import default_device, load_frozen_trunk, source_info

TOP = 10  # how many of the most similar pairs the official script evaluates
CROP_SCALE = (0.4, 1.0)
KEPT_PAIRS = 3  # how many of the best and of the worst images are kept, to draw figures


class Matches(NamedTuple):
    """The most similar token of view 2 for every one of the T1 tokens of view 1."""

    token: Tensor  # int64 [T1], index into the tokens of view 2
    similarity: Tensor  # float [T1], cosine


class MatchedPairs(NamedTuple):
    """N matched pairs of tokens as positions in the two views, in pixels; the most similar pair comes first."""

    start: Tensor  # [N, 2]: x, y of the cell's centre in view 1
    found: Tensor  # [N, 2]: centre of the matched cell in view 2
    true: Tensor  # [N, 2]: where the point `start` truly is in view 2
    right: Tensor  # bool [N]: whether the matched cell contains the point `true`
    similarity: Tensor  # [N]
    cells: int  # number of tokens of view 2


class View(NamedTuple):
    """A view of an image and its region tokens."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    tokens: Tensor  # [T, C]
    grid: tuple[int, int]  # H, W


class ViewPair(NamedTuple):
    """Two views of an image and their matched tokens: all that a figure of the pair needs."""

    key: str
    first: np.ndarray  # uint8 [H, W, 3]
    second: np.ndarray
    pairs: MatchedPairs


def match(first: Tensor, second: Tensor) -> Matches:
    """Find, for each token of `first` [T1, C], the token of `second` [T2, C] with the highest cosine similarity."""
    similarity, token = (F.normalize(first, dim=1) @ F.normalize(second, dim=1).T).max(1)
    return Matches(token, similarity)


def cell_centres(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the centres (x, y) in pixels of a grid's cells on an image, row by row: [H·W, 2].

    Args:
        grid: number of cells (H, W).
        size: height and width of the image in pixels.
    """
    cell_y, cell_x = size[0] / grid[0], size[1] / grid[1]
    y, x = torch.meshgrid(torch.arange(grid[0]) + 0.5, torch.arange(grid[1]) + 0.5, indexing="ij")
    return torch.stack([x * cell_x, y * cell_y], -1).flatten(0, 1)


def match_pairs(first: View, second: View, true: Tensor) -> MatchedPairs:
    """Match the tokens of view 1 (`first`) to those of view 2 (`second`), and compare them with the true places.

    Args:
        true: for each token of view 1, where its centre is in view 2, (x, y) in pixels, [T1, 2]. Tokens whose place is
            NaN or outside view 2 are left out.
    """
    height, width = second.pixels.shape[:2]
    inside = ((true >= 0) & (true < torch.tensor([width, height]))).all(1)  # False for NaN
    found = match(first.tokens[inside], second.tokens)
    order = found.similarity.argsort(descending=True, stable=True)
    cell = torch.tensor([width / second.grid[1], height / second.grid[0]])
    true_cell = (true[inside][order] / cell).floor().long()
    token = found.token[order]
    right = token == true_cell[:, 1] * second.grid[1] + true_cell[:, 0]
    starts = cell_centres(first.grid, first.pixels.shape[:2])[inside][order]
    ends = cell_centres(second.grid, (height, width))[token]
    return MatchedPairs(starts, ends, true[inside][order], right, found.similarity[order], len(second.tokens))


def measure(found: MatchedPairs, top: int = TOP) -> dict[str, float]:
    """Return accuracy in percent and mean distance in pixels, over the `top` most similar pairs and over all pairs."""
    distance = (found.found - found.true).norm(dim=1)
    best = slice(0, top)
    return {
        "top_accuracy": 100 * float(found.right[best].float().mean()),
        "top_distance_px": float(distance[best].mean()),
        "top_similarity": float(found.similarity[best].mean()),
        "accuracy": 100 * float(found.right.float().mean()),
        "distance_px": float(distance.mean()),
        "chance": 100 / found.cells,
    }


# --- the views -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_view(trunk: nn.Module, pixels: np.ndarray) -> View:
    """Run the trunk on an image uint8 [H, W, 3] and return the image as a view with its region tokens.

    Raises:
        UserError: the trunk gives no region tokens on a grid.
    """
    weights = next(trunk.parameters(), torch.empty(0))
    features = trunk([to_trunk(pixels)[None].to(weights.device)])
    grids = list(getattr(features, "grids", ()))
    if len(grids) != 1 or not len(features.regions) or math.prod(grids[0]) != len(features.regions):
        raise UserError(f"correspondence needs region tokens on a grid; the trunk {type(trunk).__name__} gives none")
    return View(pixels, F.normalize(features.regions.float().cpu(), dim=1), grids[0][1:])


def mirrored(trunk: nn.Module, first: View, key: str, seed: int = 0) -> ViewPair:
    """Return the *mirrored* pair of the module's description: view 2 is `first` flipped, jittered and grey.

    Args:
        key: the image's key; with `seed` it determines the jitter.
    """
    height, width = first.pixels.shape[:2]
    second = extract_view(trunk, jitter_and_grey(first.pixels[:, ::-1], key, seed))
    true = cell_centres(first.grid, (height, width)) * torch.tensor([-1, 1]) + torch.tensor([width, 0])
    return ViewPair(key, first.pixels, second.pixels, match_pairs(first, second, true))


def cropped(trunk: nn.Module, first: View, key: str, seed: int = 0) -> ViewPair:
    """Return the *cropped* pair of the module's description: view 2 is a crop of `first`, resized, jittered and grey.

    Args:
        key: the image's key; with `seed` it determines the crop and the jitter.
    """
    height, width = first.pixels.shape[:2]
    rng = crops.keyed_generator(seed, 0, key, 1)
    left, top, right, bottom = crops.crop_box(rng, width, height, CROP_SCALE)
    part = Image.fromarray(first.pixels).crop((left, top, right, bottom))
    patch = np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
    flipped = rng.random() < 0.5
    second = extract_view(trunk, jitter_and_grey(patch[:, ::-1] if flipped else patch, key, seed))
    scale = torch.tensor([width / (right - left), height / (bottom - top)])
    true = (cell_centres(first.grid, (height, width)) - torch.tensor([left, top])) * scale
    if flipped:
        true = true * torch.tensor([-1, 1]) + torch.tensor([width, 0])
    return ViewPair(key, first.pixels, second.pixels, match_pairs(first, second, true))


def stereo(trunk: nn.Module) -> ViewPair:
    """Return the *stereo* pair: scikit-image's motorcycle at its original size.

    The disparity of a cell is the median over the pixels in it whose disparity is known.
    """
    left, right, disparity = samples.stereo_pair()
    first, second = extract_view(trunk, left), extract_view(trunk, right)
    shift = torch.tensor(
        [
            [_median(cell) for cell in np.array_split(rows, first.grid[1], axis=1)]
            for rows in np.array_split(disparity, first.grid[0], axis=0)
        ]
    ).flatten()
    true = cell_centres(first.grid, left.shape[:2]) - torch.stack([shift, torch.zeros_like(shift)], 1)
    return ViewPair("stereo_motorcycle", left, right, match_pairs(first, second, true))


def jitter_and_grey(pixels: np.ndarray, key: str, seed: int = 0) -> np.ndarray:
    """Apply colour jitter with probability 0.8 to an image uint8 [H, W, 3] and convert it to grey, at the same size.

    The jitter is a function of (seed, key).
    """
    draw = photometric.draw_params(crops.keyed_generator(seed, 0, key, 0), photometric.ESVIT[0])._replace(
        grayscale=True, radius=0.0
    )
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
    x = photometric.apply(image, photometric.stack([[draw]]).crops(0, 1))[0]
    return _to_uint8(x)


def _median(disparity: np.ndarray) -> float:
    """Return the median of the known (finite) disparities; NaN if fewer than half are known."""
    known = disparity[np.isfinite(disparity)]
    return float(np.median(known)) if 2 * len(known) >= disparity.size else math.nan


def _to_uint8(x: Tensor) -> np.ndarray:
    """Convert a tensor [3, H, W], normalised by ImageNet's mean and deviation, to an image uint8 [H, W, 3]."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (photometric.MEAN, photometric.STD))
    return (x * std + mean).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()


# --- over a data set---------------------------------------------------------------------------------------------------


class CorrespondenceResult(NamedTuple):
    """The result of correspondence on a data set, and the pairs of views to draw."""

    summary: dict[str, Any]  # the content of correspondence.json
    best: list[ViewPair]  # pairs with the highest accuracy of the mirrored pair over all tokens
    worst: list[ViewPair]
    stereo: ViewPair


def run_correspondence(
    checkpoint: Path, data: Path, out: Path, images: int = 500, workers: int = 4, seed: int = 0
) -> CorrespondenceResult:
    """Run `esvit-scale evaluate correspondence`: write `out`/correspondence.json and return the result.

    report/evaluation_figures.py draws the figure.

    Args:
        data: one image, a folder of images, or shards.
        images: largest number of images to use; the first ones of `data` are taken.

    Raises:
        UserError: `data` cannot be read, or the trunk gives no region tokens on a grid.
    """
    teacher = load_frozen_trunk(checkpoint)
    require_pictures(teacher)
    rows: list[dict[str, dict[str, float]]] = []
    cases: list[tuple[float, ViewPair]] = []
    trunk = teacher.trunk.to(default_device()).eval()
    total = 1 if data.is_file() else min(images, source_info(data).images)
    pictures = _pictures(data, teacher.size, images, workers)
    for key, pixels in tqdm(pictures, "correspondence", total, unit=" images", disable=None, leave=False):
        first = extract_view(trunk, pixels)
        case, crop = mirrored(trunk, first, key, seed), cropped(trunk, first, key, seed)
        rows.append({"mirrored": measure(case.pairs)})
        if len(crop.pairs.right):  # a small crop may contain no token's centre if the grid is coarse
            rows[-1]["cropped"] = measure(crop.pairs)
        cases = _keep_best_and_worst([*cases, (rows[-1]["mirrored"]["accuracy"], case)])
    if not rows:
        raise UserError(f"{data}: holds no readable image")
    pair = stereo(trunk)
    means = {name: _mean([row[name] for row in rows if name in row]) for name in ("mirrored", "cropped")}
    summary = {
        **teacher.origin(checkpoint),
        "data": manifests.address(data),
        "images": len(rows),
        "size": teacher.size,
        "measures": {**means, "stereo": measure(pair.pairs)},
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "correspondence.json", summary)
    ranked = [case for _, case in sorted(cases, key=lambda c: -c[0])]
    return CorrespondenceResult(summary, ranked[:KEPT_PAIRS], ranked[KEPT_PAIRS:][::-1][:KEPT_PAIRS], pair)


def table(summary: dict[str, Any]) -> str:
    """Format the content of correspondence.json as a text table, with a line for each kind of pair."""
    lines = [f"{'correspondence':<16}{'top-10, %':>12}{'distance, px':>14}{'all, %':>10}{'px':>8}{'chance, %':>11}"]
    for name, m in summary["measures"].items():
        cells = f"{m['top_accuracy']:12.1f}{m['top_distance_px']:14.1f}{m['accuracy']:10.1f}{m['distance_px']:8.1f}"
        lines.append(f"{name:<16}{cells}{m['chance']:11.1f}")
    return "\n".join([*lines, f"{summary['images']} images at {summary['size']} pixels, and one stereo pair"])


def _pictures(data: Path, size: int, images: int, workers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the key and the centre crop (uint8 [S, S, 3], S = `size`) of the first `images` images in `data`."""
    if data.is_file() and not manifests.is_shard_set(data):
        pixels = Image.fromarray(read_picture(data, size))
        yield data.name, stream.centre_crop(pixels, size).transpose(1, 2, 0)
        return
    seen = 0
    for batch in stream.evaluation_batches(data, size, min(images, 16), workers):
        for x, key in zip(batch.images, batch.keys, strict=True):
            if seen == images:
                return
            yield key, _to_uint8(x)
            seen += 1


def _keep_best_and_worst(cases: list[tuple[float, ViewPair]]) -> list[tuple[float, ViewPair]]:
    """Return the KEPT_PAIRS cases (accuracy, pair) of highest accuracy and as many of lowest, to save memory."""
    if len(cases) <= 2 * KEPT_PAIRS:
        return cases
    ranked = sorted(cases, key=lambda c: -c[0])
    return ranked[:KEPT_PAIRS] + ranked[-KEPT_PAIRS:]


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}
