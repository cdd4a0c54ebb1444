"""What is measured beside the loss at a logged step; every function gives columns of metrics.jsonl."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from esvit_scale.objective.param_groups import part_of

ROWS = 256  # features that the effective rank is taken of


def gradient_norms(squares: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The global gradient norm and that of every part of the network, from squared norms [parameters]."""
    of_part: dict[str, float] = defaultdict(float)
    values = squares.tolist()
    for name, square in zip(names, values, strict=True):
        of_part[f"grad_norm_{part_of(name)}"] += square
    return {"grad_norm": sum(values) ** 0.5} | {part: square**0.5 for part, square in of_part.items()}


def update_ratios(changes: Tensor, names: Sequence[str]) -> dict[str, float]:
    """‖Δw‖/‖w‖ of the parameter that stands for each part, from squared norms [parameters, 2]."""
    pairs = zip(names, changes.sqrt().tolist(), strict=True)
    return {f"update_ratio_{part_of(name)}": change / size for name, (change, size) in pairs if size > 0}


def center_norms(centers: dict[str, Tensor]) -> dict[str, float]:
    """Euclidean norm of each head's centre, over its K logits."""
    return {f"center_norm_{name.partition('.')[0]}": center.norm().item() for name, center in centers.items()}


def rank_me(features: Tensor) -> float:
    """The effective number of dimensions that features [n, C] use: exp of the entropy of their normalised singular
    values (RankMe, Garrido et al. 2023), of at most 256 rows; it cannot exceed min(rows, C)."""
    some = features[:ROWS].to("cpu", torch.float64)
    if not torch.isfinite(some).all():
        return float("nan")
    values = torch.linalg.svdvals(some)
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))
