"""Mixup and CutMix: two images of a batch are mixed, and so are their labels (Zhang et al. 2018, Yun et al. 2019).

The images at positions 2i and 2i + 1 of the global batch are a pair, and each takes a part of the other, as timm's
`Mixup` does in its mode "pair". How they are mixed depends on (seed, batch, i) alone: every pair has its own random
generator, in place of the global one that timm draws from. A pair is never divided between ranks or micro-batches, so a
global batch is the same at any world size, and after a resume.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from esvit_scale.data.crops import generator_of

CUTMIX_SHARE = 0.5  # of the pairs, where mixup is on, too: timm's `switch_prob`


class SoftLabels(NamedTuple):
    """The labels of B images: each has two classes, with weights that sum to 1."""

    classes: Tensor  # int64 [B, 2]: an image's own class, and its partner's
    weights: Tensor  # float32 [B, 2]


class Mixture(NamedTuple):
    """How B images are mixed with their partners, on the host or on a device."""

    blend: Tensor  # float32 [B]: the weight of the image's own pixels outside the box
    boxes: (
        Tensor  # int64 [B, 4], top, bottom, left and right of the box with the partner's pixels alone; empty for mixup
    )
    own: Tensor  # float32 [B]: the weight of the image's own label


def draw(seed: int, batch_index: int, positions: Tensor, size: int, mixup: float, cutmix: float) -> Mixture:
    """Draw how the images of a batch are mixed, on the host.

    Args:
        positions: int64 [B], places in the global batch: whole pairs, in order.
        size: side of a crop in pixels.
        mixup, cutmix: the strengths α; 0 for neither of the two.
    """
    pairs = [_draw_pair(seed, batch_index, pair, size, mixup, cutmix) for pair in (positions[::2] // 2).tolist()]
    blend, boxes, own = (torch.tensor([pair[i] for pair in pairs]).repeat_interleave(2, 0) for i in range(3))
    return Mixture(blend.float(), boxes.long(), own.float())


def mix_images(images: Tensor, mixture: Mixture) -> Tensor:
    """Return images [B, C, S, S], each mixed with its partner: those of rows 2i and 2i + 1 are partners."""
    side = torch.arange(images.shape[-1], device=images.device)
    top, bottom, left, right = mixture.boxes.unbind(1)
    rows = (side >= top[:, None]) & (side < bottom[:, None])  # [B, S]
    columns = (side >= left[:, None]) & (side < right[:, None])
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # [B, 1, S, S]
    weight = mixture.blend.to(images.dtype)[:, None, None, None].masked_fill(inside, 0.0)
    return torch.lerp(_partners(images), images, weight)


def mix_labels(labels: Tensor, mixture: Mixture | None) -> SoftLabels:
    """Return the labels int64 [B] of mixed images; with None, of images that are not mixed."""
    if mixture is None:
        weights = torch.tensor([1.0, 0.0], device=labels.device).expand(len(labels), 2)
        return SoftLabels(torch.stack([labels, labels], 1), weights)
    return SoftLabels(torch.stack([labels, _partners(labels)], 1), torch.stack([mixture.own, 1 - mixture.own], 1))


def _partners(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _draw_pair(
    seed: int, batch_index: int, pair: int, size: int, mixup: float, cutmix: float
) -> tuple[float, tuple[int, int, int, int], float]:
    """Return a pair's weight outside the box, the box (top, bottom, left, right), and the weight of the own label."""
    rng = generator_of(f"mix/{seed}/{batch_index}/{pair}")
    choice, level, y, x = (rng.random() for _ in range(4))
    takes_box = bool(cutmix) and (not mixup or choice < CUTMIX_SHARE)
    share = _beta(cutmix if takes_box else mixup, level)
    if not takes_box:
        return share, (0, 0, 0, 0), share
    side = int(size * math.sqrt(1 - share))
    (top, bottom), (left, right) = (_interval(int(at * size), side, size) for at in (y, x))
    return 1.0, (top, bottom, left, right), 1 - (bottom - top) * (right - left) / size**2


def _beta(alpha: float, level: float) -> float:
    """Return a quantile of the distribution Beta(α, α): of a uniform number, a draw from it."""
    return float(np.clip(betaincinv(alpha, alpha, level), 0.0, 1.0))


def _interval(centre: int, length: int, size: int) -> tuple[int, int]:
    """Return begin and end of an interval around a centre, cut to 0..size, as timm's `rand_bbox` does."""
    return max(centre - length // 2, 0), min(centre + (length + 1) // 2, size)
