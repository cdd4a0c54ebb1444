"""Measures of features that need no labels: their effective rank, and how many nearest neighbours stay the same."""

import json
from pathlib import Path

import torch
from torch import Tensor

from esvit_scale import files
from esvit_scale.evaluate.neighbours import nearest_neighbours

START_FILE = "neighbours.json"  # in the run dir


def effective_rank(features: Tensor) -> float:
    """Return the effective rank of the features [n, C]: how many dimensions they use (RankMe, Garrido et al. 2023).

    It is exp of the entropy of the normalised singular values, and cannot exceed min(n, C). It is NaN when a feature is
    not finite.
    """
    some = features.to("cpu", torch.float64)
    if not torch.isfinite(some).all():
        return float("nan")
    values = torch.linalg.svdvals(some)
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def neighbours_of(features: Tensor, count: int, device: torch.device) -> Tensor:
    """Return the rows of the `count` nearest others of each row by cosine [n, count], given features [n, C]."""
    similarity, rows = nearest_neighbours(features, features, count + 1, device)
    similarity[rows == torch.arange(len(rows))[:, None]] = -torch.inf  # an image is no neighbour of itself
    return rows.gather(1, similarity.topk(count).indices)


def kept(now: Tensor, before: Tensor) -> float:
    """Return the fraction of the neighbours `before` [n, k] that are still among those of `now` [n, k]."""
    return (now[:, :, None] == before[:, None, :]).any(1).float().mean().item()


def write_start(run: Path, held_out: str, step: int, neighbours: Tensor) -> None:
    """Record the nearest neighbours [n, k] of the held-out images at the step at which they were first measured."""
    values = {"held_out": held_out, "step": step, "neighbours": neighbours.tolist()}
    files.write_json(run / START_FILE, values)


def read_start(run: Path, held_out: str, images: int, step: int) -> Tensor | None:
    """Return the recorded neighbours [n, k]; None if there are none of these images from `step` or before."""
    try:
        found = json.loads((run / START_FILE).read_text())
        neighbours = torch.tensor(found["neighbours"])
        is_same = found["held_out"] == held_out and len(neighbours) == images
        return neighbours if is_same and found["step"] < step else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
