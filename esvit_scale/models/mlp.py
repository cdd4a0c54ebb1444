"""The MLP with batch norms between its layers, which most objectives use as projector and predictor."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.distributions import Initializer, uniform


class ProjectorMlp(nn.Module):
    """Linear BN ReLU Linear BN ReLU … Linear. A linear layer before a batch norm has no bias: the norm would remove it.

    Args:
        widths: the input width C, the widths of the hidden layers, and the output width D.
        last_norm: whether a batch norm without weight and bias follows the last layer.
    """

    def __init__(self, *widths: int, last_norm: bool = False) -> None:
        super().__init__()
        self.widths = widths
        sizes = list(pairwise(widths))
        last = len(sizes) - 1
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=i == last and not last_norm) for i, (a, b) in enumerate(sizes))
        self.norms = nn.ModuleList(BatchNorm(b) for _, b in sizes[:-1])
        if last_norm:
            self.norms.append(BatchNorm(widths[-1], affine=False))

    def forward(self, x: Tensor, parts: int = 1) -> Tensor:  # [n, C] → [n, D]
        """Map features [n, C] to [n, D].

        Args:
            parts: number of equal, consecutive parts of the rows (views); batch norms normalise each part by its own
                statistics, over all ranks.
        """
        x = x.to(next(self.parameters()).dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.norms):
                x = torch.cat([self.norms[i](part) for part in x.chunk(parts)])
            if i < len(self.layers) - 1:
                x = F.relu(x)
        return x

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of the linear layers: torch's defaults, which the published codes do not change."""
        inits = [(f"layers.{i}", uniform(width**-0.5)) for i, width in enumerate(self.widths[:-1])]
        return {f"{layer}.{kind}": init for layer, init in inits for kind in ("weight", "bias")}
