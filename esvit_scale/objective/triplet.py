"""The truncated triplet (Wang et al. 2021, "Solving Inefficiency of Self-supervised Representation Learning").

A prediction shall be nearer to the teacher's projection of its image's other view than to those of some hard negatives
from the local batch; the hardest, which may show the same kind of thing, is left out. With D = −2·cos:

    L = Σ over both orders of mean_i max(0, margin + 2·D_ii − mean of the 2nd to 10th smallest D_ij, j ≠ i)

At the published margin of 100 the maximum is never 0, because the other terms lie within ±6: the loss is linear. It
begins near 200, as both orders have a margin.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.objective.byol import BYOL
from esvit_scale.objective.objective import Logs

MARGIN = 100.0
RANKS = slice(1, 10)  # the negatives that are used, in order of their distance: the 2nd to the 10th


class Triplet(BYOL):
    """The truncated triplet's objective: BYOL's projector, predictor and teacher with another loss."""

    images_at_least = RANKS.stop + 1

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projector and the predictor for trunk features of width `dim`."""
        super().__init__(dim, config)

    def compare(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Logs]:
        """Return the triplet loss of unit rows `queries` of one view and `keys` of the other, both [B, D].

        It logs negative_similarity, the mean cosine of queries and their chosen negatives.
        """
        distances = -2 * queries @ keys.t()  # [B, B]
        itself = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
        nearest = distances.masked_fill(itself, torch.inf).topk(RANKS.stop, largest=False).values[:, RANKS]
        loss = F.relu(MARGIN + 2 * distances.diagonal() - nearest.mean(1)).mean()
        return loss, {"negative_similarity": -nearest.mean() / 2}
