"""A linear head that predicts depth from frozen features, as the mean of uniform bins.

As in DINOv2's linear protocol (Oquab et al. 2023), after AdaBins: a linear layer gives a score for each of K depths that
are spread evenly over the range. The weights of a pixel's bins are max(score, 0) + 0.1, divided by their sum, and its
depth is the weighted mean of the bins. The loss is the scale-invariant logarithmic one of Eigen et al. (2014),
√(mean(g²) − 0.85·mean(g)²) with g = log(depth / truth), over the pixels of a batch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.division import share
from esvit_scale.evaluate.pixel_heads import PixelSamples, Standardization, linear_scores, split_images
from esvit_scale.evaluate.progress import progress
from esvit_scale.evaluate.stage_features import Window
from esvit_scale.parallel import collectives

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_DECAY = 0.01  # of AdamW
INITIAL_STD = 0.01  # of weights; at 0 no score would have a gradient
FLOOR = 0.1  # added to every bin's weight
SCALE_INVARIANCE = 0.85
PER_METRE = 1_000_000  # sampled depths are kept as whole micrometres


class DepthHead(NamedTuple):
    """A linear layer over unstandardised features, and the depths of its bins."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    bins: Tensor  # [K], metres
    lr: float
    held_out: float  # root mean squared error on the held-out images, metres

    def scores(self, window: Window) -> Window:
        """Return a window's scores of the bins as one map for each stage, [h_s, w_s, K]; their sum is the score."""
        return linear_scores(self.weight, self.bias, window)

    def depth(self, scores: Tensor) -> Tensor:
        """Return the depth [...] in metres of scores [..., K]."""
        return depth_of(scores, self.bins.to(scores.device))


def depth_of(scores: Tensor, bins: Tensor) -> Tensor:
    """Return the mean of the bins [K], weighted by max(score, 0) + FLOOR, for scores [..., K]."""
    weights = scores.relu() + FLOOR
    return (weights * bins).sum(-1) / weights.sum(-1)


def uniform_bins(least: float, most: float, count: int) -> Tensor:
    """Return `count` depths from `least` to `most` metres at equal distances."""
    return torch.linspace(least, most, count)


def train_depth(
    samples: PixelSamples,
    standardize: Standardization,
    bins: Tensor,
    iterations: int,
    batch: int,
    seed: int,
    device: torch.device,
    rates: Sequence[float] = LEARNING_RATES,
) -> DepthHead:
    """Train a head by AdamW for every learning rate, and return the one of the lowest error on the held-out images.

    All ranks call it: each takes its part of every batch, and sums and gradients are added up. The order of images and
    the initial values are functions of the seed; rates fall to 0 by a cosine.

    Args:
        samples: their labels are depths in micrometres.
        batch: images in a batch, over all ranks.
    """
    fit, held_out = split_images(len(samples.labels), seed)
    d, bins = samples.features.shape[2], bins.to(device)
    start = INITIAL_STD * torch.randn(len(bins), d, generator=torch.Generator().manual_seed(seed))
    weights = [start.to(device, copy=True).requires_grad_() for _ in rates]
    biases = [torch.zeros(len(bins), device=device, requires_grad=True) for _ in rates]
    groups = [{"params": [w, b], "lr": lr} for w, b, lr in zip(weights, biases, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = max(1, len(fit) // batch)
    order = fit
    for step in progress(range(iterations), f"{len(rates)} depth heads", iterations, "iterations"):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))]
        rows = order[place * batch : (place + 1) * batch]
        count = int((samples.labels[rows] >= 0).sum())
        if not count:
            continue
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * (1 + math.cos(math.pi * step / iterations)) / 2
        optimizer.zero_grad()
        mine = rows[share(len(rows), collectives.rank(), collectives.world_size())]
        found, truth = _predictions(samples, mine, standardize, torch.cat(weights), torch.cat(biases), bins)
        loss_with_gradient(found.log() - truth.log()[:, None], count).sum().backward()
        for parameter in (*weights, *biases):
            assert parameter.grad is not None
            collectives.all_reduce_sum_(parameter.grad)
        optimizer.step()
    squares, count = torch.zeros(len(rates), device=device), 0
    with torch.no_grad():
        for rows in held_out.split(batch):
            found, truth = _predictions(samples, rows, standardize, torch.cat(weights), torch.cat(biases), bins)
            squares, count = squares + (found - truth[:, None]).square().sum(0), count + len(truth)
    error = (squares / max(1, count)).sqrt().nan_to_num(nan=math.inf).cpu()
    best = int(error.argmin())
    chosen = weights[best].detach().cpu() / standardize.scale
    offset = biases[best].detach().cpu() - chosen @ standardize.mean
    return DepthHead(chosen, offset, bins.cpu(), rates[best], float(error[best]))


def loss_with_gradient(difference: Tensor, count: int) -> Tensor:
    """Return terms whose gradient is that of every head's loss over the pixels of all ranks: [heads].

    With the sums A = Σg² and B = Σg over all ranks, the loss is L = √(A/n − 0.85·(B/n)²); as A and B are sums, so is
    its gradient: (dA/n − 1.7·B/n·dB/n) / 2L, of which every rank computes its part.

    Args:
        difference: g of this rank's pixels [n_r, heads].
        count: n, pixels of all ranks.
    """
    squares, sums = difference.square().sum(0) / count, difference.sum(0) / count
    totals = collectives.all_reduce_sum_(torch.stack([squares.detach(), sums.detach()]))
    loss = (totals[0] - SCALE_INVARIANCE * totals[1].square()).clamp(min=1e-12).sqrt()
    return (squares - 2 * SCALE_INVARIANCE * totals[1] * sums) / (2 * loss)


def _predictions(
    samples: PixelSamples, rows: Tensor, standardize: Standardization, weight: Tensor, bias: Tensor, bins: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the depths that every head predicts for the pixels with depth of some images [n, heads], and the true ones."""
    labels = samples.labels[rows].to(weight.device)
    known = labels >= 0
    x = standardize(samples.features[rows].to(weight.device)[known])  # [n, D]
    scores = F.linear(x, weight, bias).view(len(x), -1, len(bins))
    return depth_of(scores, bins), labels[known].float() / PER_METRE
