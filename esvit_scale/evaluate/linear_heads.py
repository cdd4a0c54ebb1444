"""Linear heads trained by SGD on frozen features: one by the official protocol, or a grid of heads at once.

The official protocol is DINO's, which EsViT uses: average-pooled tokens of the last four blocks; weights from N(0, 0.01²),
bias 0; SGD with momentum 0.9 and no weight decay, at learning rate lr · B/256 with a cosine schedule over epochs to 0. The
grid follows DINOv2: all heads are trained on the same batches, so that features are read once for all of them.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.evaluate.metrics import predicted_class
from esvit_scale.evaluate.progress import progress
from esvit_scale.parallel import collectives

LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
BLOCKS = (1, 4)
POOLINGS = ("mean", "mean+max")  # over a block's tokens
MOMENTUM = 0.9
ROWS_AT_ONCE = 4096


class HeadConfig(NamedTuple):
    """The settings of one linear head."""

    lr: float  # learning rate at a batch of 256
    blocks: int  # 1 or 4: how many of the last blocks it reads
    pooling: str


class LabelledBatch(NamedTuple):
    """This rank's part of a global batch of features, with labels."""

    features: Tensor  # [b, 2, D], see features.last_blocks
    targets: Tensor  # int64 [b]
    size: int  # of the global batch


EpochBatches = Callable[[int], Iterator[LabelledBatch]]  # epoch → its batches, equally many on every rank

OFFICIAL = HeadConfig(1e-3, 4, "mean")
GRID = tuple(HeadConfig(lr, blocks, pooling) for blocks in BLOCKS for pooling in POOLINGS for lr in LEARNING_RATES)


class LinearHeads(nn.Module):
    """Several linear classifiers of K classes; those that read the same features share one matrix product.

    Args:
        dim: C, the width of the last block.
        width: D, the width of the last four blocks together.
    """

    def __init__(self, heads: tuple[HeadConfig, ...], dim: int, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.heads, self.dim, self.classes = heads, dim, classes
        self.members: dict[str, list[int]] = {}
        for i, head in enumerate(heads):
            self.members.setdefault(f"{head.blocks} {head.pooling}", []).append(i)
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.ModuleDict()
        for name, members in self.members.items():
            head = heads[members[0]]
            d = (dim if head.blocks == 1 else width) * (1 if head.pooling == "mean" else 2)
            linear = nn.Linear(d, len(members) * classes)
            with torch.no_grad():
                linear.weight.normal_(0, 0.01, generator=generator)
                linear.bias.zero_()
            self.linear[name] = linear

    def forward(self, features: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Yield for each group of heads that share features: their numbers, and their scores [B, heads, K].

        `features` are [B, 2, D].
        """
        for name, members in self.members.items():
            head = self.heads[members[0]]
            x = features if head.blocks == 4 else features[..., -self.dim :]
            x = x[:, 0] if head.pooling == "mean" else x.flatten(1)
            yield members, self.linear[name](x).unflatten(1, (len(members), self.classes))


def train(heads: LinearHeads, epochs: int, batch: int, batches_of: EpochBatches) -> None:
    """Train the heads in place. Gradients are summed over the ranks, so that the result does not depend on their number."""
    device = next(heads.parameters()).device
    rates = torch.tensor([head.lr for head in heads.heads], device=device) * batch / 256
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=MOMENTUM)
    for epoch in progress(range(epochs), f"{len(heads.heads)} linear heads", epochs, "epochs"):
        optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * epoch / epochs)) / 2
        for features, targets, size in batches_of(epoch):
            optimizer.zero_grad()
            features, targets = features.to(device).float(), targets.to(device)
            for members, scores in heads(features):
                # A head's learning rate is the weight of its loss: SGD is linear in the gradient.
                of_each = targets.repeat_interleave(len(members))
                losses = F.cross_entropy(scores.flatten(0, 1), of_each, reduction="none").view(-1, len(members))
                (losses.sum(0) / size * rates[members]).sum().backward()
            for parameter in heads.parameters():
                assert parameter.grad is not None
                collectives.all_reduce_sum_(parameter.grad)
            optimizer.step()


@torch.no_grad()
def accuracies(heads: LinearHeads, features: Tensor, targets: Tensor) -> Tensor:
    """Return the accuracy of every head in percent, float64 [heads], on features [N, 2, D] (possibly memory-mapped)."""
    device = next(heads.parameters()).device
    right = torch.zeros(len(heads.heads), dtype=torch.float64)
    for rows in torch.arange(len(targets)).split(ROWS_AT_ONCE):
        truth = targets[rows].to(device)
        for members, scores in heads(features[rows].to(device).float()):
            for i, own in zip(members, scores.unbind(1), strict=True):
                right[i] += int((predicted_class(own) == truth).sum())
    return 100 * right / len(targets)


@torch.no_grad()
def head_scores(heads: LinearHeads, head: int, features: Tensor) -> Tensor:
    """Return the scores of the head with number `head` for features [N, 2, D]: float32 [N, K] on the CPU."""
    device = next(heads.parameters()).device
    found = []
    for rows in torch.arange(len(features)).split(ROWS_AT_ONCE):
        for members, scores in heads(features[rows].to(device).float()):
            if head in members:
                found.append(scores[:, members.index(head)].cpu())
    return torch.cat(found)
