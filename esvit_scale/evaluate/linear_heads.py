"""Linear heads trained by SGD on frozen features: a single head (official protocol) or a grid of heads at once.

The official protocol is DINO's, which EsViT uses too. The input is the average-pooled tokens of the last four blocks.
Weights are initialised from N(0, 0.01²), biases with 0. SGD has momentum 0.9, no weight decay and, for a global batch
of B, the learning rate lr · B/256 with a cosine schedule to 0 that is updated every epoch. The grid follows DINOv2: all
heads are trained on the same batches, so that features are read once for all heads.
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
POOLINGS = ("mean", "mean+max")  # pooling over a block's tokens; "mean+max" concatenates both
MOMENTUM = 0.9
ROWS_AT_ONCE = 4096


class HeadConfig(NamedTuple):
    """The hyperparameters of one linear head."""

    lr: float  # learning rate at a batch of 256
    blocks: int  # 1 or 4: number of last blocks whose features are its input
    pooling: str


class LabelledBatch(NamedTuple):
    """This rank's part (b samples) of a global batch of features with labels."""

    features: Tensor  # [b, 2, D], see features.last_blocks
    targets: Tensor  # int64 [b]
    size: int  # samples in the global batch


EpochBatches = Callable[[int], Iterator[LabelledBatch]]  # epoch → this rank's batches, equally many on every rank

OFFICIAL = HeadConfig(1e-3, 4, "mean")
GRID = tuple(HeadConfig(lr, blocks, pooling) for blocks in BLOCKS for pooling in POOLINGS for lr in LEARNING_RATES)


class LinearHeads(nn.Module):
    """Several linear classifiers of K classes; heads with the same input features share one matrix product.

    Args:
        dim: C, the width of the last block's features.
        width: D, the total width of the last four blocks' features.
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
        """Yield the indices and the scores [B, heads, K] of the heads, in groups of heads with the same input features.

        Args:
            features: [B, 2, D], see features.last_blocks.
        """
        for name, members in self.members.items():
            head = self.heads[members[0]]
            x = features if head.blocks == 4 else features[..., -self.dim :]
            x = x[:, 0] if head.pooling == "mean" else x.flatten(1)
            yield members, self.linear[name](x).unflatten(1, (len(members), self.classes))


def train(heads: LinearHeads, epochs: int, batch: int, batches_of: EpochBatches) -> None:
    """Train the heads in place by SGD.

    Gradients are summed over the ranks, so that the result does not depend on the number of ranks.

    Args:
        batch: global batch size, which scales the learning rates.
    """
    device = next(heads.parameters()).device
    rates = torch.tensor([head.lr for head in heads.heads], device=device) * batch / 256
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=MOMENTUM)
    for epoch in progress(range(epochs), f"{len(heads.heads)} linear heads", epochs, "epochs"):
        optimizer.param_groups[0]["lr"] = (1 + math.cos(math.pi * epoch / epochs)) / 2
        for features, targets, size in batches_of(epoch):
            optimizer.zero_grad()
            features, targets = features.to(device).float(), targets.to(device)
            for members, scores in heads(features):
                # Each head's loss is multiplied by its learning rate; this is exact, as SGD is linear in the gradient.
                of_each = targets.repeat_interleave(len(members))
                losses = F.cross_entropy(scores.flatten(0, 1), of_each, reduction="none").view(-1, len(members))
                (losses.sum(0) / size * rates[members]).sum().backward()
            for parameter in heads.parameters():
                assert parameter.grad is not None
                collectives.all_reduce_sum_(parameter.grad)
            optimizer.step()


@torch.no_grad()
def accuracies(heads: LinearHeads, features: Tensor, targets: Tensor) -> Tensor:
    """Return every head's accuracy in percent on features [N, 2, D] (possibly memory-mapped): float64 [heads]."""
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
    """Return the scores of the head at index `head` for features [N, 2, D]: float32 [N, K] on the CPU."""
    device = next(heads.parameters()).device
    found = []
    for rows in torch.arange(len(features)).split(ROWS_AT_ONCE):
        for members, scores in heads(features[rows].to(device).float()):
            if head in members:
                found.append(scores[:, members.index(head)].cpu())
    return torch.cat(found)
