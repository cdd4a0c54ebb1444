"""Heads that classify pixels by frozen features: linear classifiers trained by SGD, and a vote of nearest neighbours.

Features are those of sampled pixels of the training images, standardised over the samples. Linear heads with several
learning rates are trained at once on the same batches; momentum is 0.9, there is no weight decay, weights start at 0 and
the rates fall to 0 by a cosine.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate.feature_cache import chunks
from esvit_scale.evaluate.neighbours import nearest_neighbours
from esvit_scale.evaluate.progress import progress
from esvit_scale.evaluate.stage_features import StageMap, Window, grid_features
from esvit_scale.parallel import collectives

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
MOMENTUM = 0.9
HELD_OUT = 0.1  # fraction of the training images that selects the learning rate
TEMPERATURE = 0.07
KNN_STRIDE = 8  # pixels between the places that the nearest neighbours vote for


class PixelSamples(NamedTuple):
    """Sampled pixels of N training images."""

    features: Tensor  # [N, P, D] of any floating-point type, possibly memory-mapped
    labels: Tensor  # int64 [N, P]; negative where there is no label
    classes: int  # K


class Standardization(NamedTuple):
    """Mean and standard deviation [D] of the sampled features; a constant feature has deviation 1."""

    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return standardised features."""
        return (features.float() - self.mean.to(features.device)) / self.scale.to(features.device)


class LinearPixelHead(NamedTuple):
    """A linear classifier of unstandardised features."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]
    lr: float
    held_out: float  # mean cross-entropy on the held-out images

    def scores(self, window: Window) -> Window:
        """Return a window's class scores as one map for each stage, [h_s, w_s, K]; their sum is the score."""
        return linear_scores(self.weight, self.bias, window)


class NearestPixelHead(NamedTuple):
    """A bank of sampled pixels whose k nearest ones vote, each with weight exp(cosine similarity / TEMPERATURE)."""

    bank: Tensor  # float32 [M, D], standardised
    labels: Tensor  # int64 [M]
    standardize: Standardization
    classes: int
    k: int

    def scores(self, window: Window, crop: int) -> Window:
        """Return a window's votes as one map [g, g, K] of cells of about KNN_STRIDE pixels, which sum to 1."""
        cells = max(1, round(crop / KNN_STRIDE))
        device = window.maps[0].values.device
        places = (torch.arange(cells, device=device) + 0.5) * crop / cells
        features = self.standardize(grid_features(window, places + window.top, places + window.left)).flatten(0, 1)
        similarity, index = nearest_neighbours(self.bank, features, self.k, device)
        weights = (similarity / TEMPERATURE).softmax(1)
        votes = torch.zeros(len(features), self.classes).scatter_add_(1, self.labels[index], weights)
        return window._replace(maps=[StageMap(votes.view(cells, cells, -1).to(device), crop / cells)])


def linear_scores(weight: Tensor, bias: Tensor, window: Window) -> Window:
    """Return the scores of a linear layer, weight [K, D] and bias [K], as one map for each stage of a window.

    The maps are [h_s, w_s, K]; their sum is the score.
    """
    weight = weight.to(window.maps[0].values.device)
    parts = weight.split([m.values.shape[2] for m in window.maps], dim=1)
    maps = [StageMap(F.linear(m.values, part), m.cell) for m, part in zip(window.maps, parts, strict=True)]
    maps[0] = maps[0]._replace(values=maps[0].values + bias.to(weight.device))
    return window._replace(maps=maps)


def split_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the images to fit on and of those held out, at least one each; both ascending.

    Raises:
        UserError: there is only one image.
    """
    if n < 2:
        raise UserError("train set: one image; selecting the learning rate on held-out images needs two or more")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = max(1, round(HELD_OUT * n))
    return order[count:].sort().values, order[:count].sort().values


def standardization(samples: PixelSamples) -> Standardization:
    """Return the moments of the labelled features; memory does not grow with the number of images."""
    d = samples.features.shape[2]
    total, squares, count = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64), 0
    origin = samples.features[0, 0].double()  # near the mean, so that squares do not cancel
    row = 0
    for part in chunks(samples.features):
        labelled = part[samples.labels[row : row + len(part)] >= 0].double() - origin
        row += len(part)
        total, squares, count = total + labelled.sum(0), squares + labelled.square().sum(0), count + len(labelled)
    if not count:
        raise UserError("train set: no mask has a labelled pixel")
    mean = total / count
    scale = (squares / count - mean.square()).clamp(min=0).sqrt()
    return Standardization((mean + origin).float(), torch.where(scale > 1e-6, scale, 1.0).float())


def train_linear(
    samples: PixelSamples,
    standardize: Standardization,
    iterations: int,
    batch: int,
    seed: int,
    device: torch.device,
    rates: Sequence[float] = LEARNING_RATES,
) -> LinearPixelHead:
    """Train a linear head for every learning rate, and return the one of the lowest loss on the held-out images.

    All ranks call it: each takes its part of every batch, and gradients are summed. The order of images is a function of
    (seed, epoch).

    Args:
        batch: images in a batch, over all ranks.
    """
    fit, held_out = split_images(len(samples.labels), seed)
    k, d, heads = samples.classes, samples.features.shape[2], len(rates)
    weight = torch.zeros(heads * k, d, device=device, requires_grad=True)
    bias = torch.zeros(heads * k, device=device, requires_grad=True)
    of_head = torch.tensor(rates, device=device)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=MOMENTUM)
    steps_per_epoch = max(1, len(fit) // batch)
    order = fit
    for step in progress(range(iterations), f"{heads} linear heads", iterations, "iterations"):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = fit[torch.randperm(len(fit), generator=generator)]
        rows = order[place * batch : (place + 1) * batch]
        optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * step / iterations)) / 2
        optimizer.zero_grad()
        mine = rows[share(len(rows), collectives.rank(), collectives.world_size())]
        size = max(1, int((samples.labels[rows] >= 0).sum()))
        losses = _losses(samples, mine, standardize, weight, bias, heads)
        # Each head's loss is multiplied by its learning rate; this is exact, as SGD is linear in the gradient.
        (losses / size * of_head).sum().backward()
        for parameter in (weight, bias):
            assert parameter.grad is not None
            collectives.all_reduce_sum_(parameter.grad)
        optimizer.step()
    with torch.no_grad():
        parts = [_losses(samples, rows, standardize, weight, bias, heads) for rows in held_out.split(batch)]
    count = max(1, int((samples.labels[held_out] >= 0).sum()))
    loss = (torch.stack(parts).sum(0) / count).nan_to_num(nan=math.inf).cpu()
    best = int(loss.argmin())
    chosen = weight.detach().view(heads, k, d)[best].cpu() / standardize.scale
    offset = bias.detach().view(heads, k)[best].cpu() - chosen @ standardize.mean
    return LinearPixelHead(chosen, offset, rates[best], float(loss[best]))


def nearest_head(samples: PixelSamples, standardize: Standardization, most: int, k: int) -> NearestPixelHead:
    """Return the head of nearest neighbours over at most `most` labelled samples, evenly spaced.

    Raises:
        UserError: `k` is larger than the bank.
    """
    labelled = (samples.labels >= 0).flatten().nonzero()[:, 0]
    if len(labelled) > most:
        labelled = labelled[torch.linspace(0, len(labelled) - 1, most).round().long()]
    if k > len(labelled):
        raise UserError(f"--k {k}: larger than the bank of {len(labelled)} pixels")
    image, pixel = labelled // samples.labels.shape[1], labelled % samples.labels.shape[1]
    bank = torch.cat(
        [standardize(samples.features[i, p]) for i, p in zip(image.split(64), pixel.split(64), strict=True)]
    )
    return NearestPixelHead(bank, samples.labels[image, pixel], standardize, samples.classes, k)


def _losses(
    samples: PixelSamples, rows: Tensor, standardize: Standardization, weight: Tensor, bias: Tensor, heads: int
) -> Tensor:
    """Return the cross-entropy of every head, summed over the labelled pixels of some images: [heads]."""
    labels = samples.labels[rows].to(weight.device)
    labelled = labels >= 0
    x = standardize(samples.features[rows].to(weight.device)[labelled])  # [n, D]
    scores = F.linear(x, weight, bias).view(len(x), heads, -1)
    targets = labels[labelled].unsqueeze(-1).expand(-1, heads)
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(-1, heads).sum(0)
