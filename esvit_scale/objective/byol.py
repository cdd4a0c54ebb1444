"""BYOL (Grill et al. 2020): predict the teacher's projection of the other view; no negatives.

L = Σ over both orders of mean_i (2 − 2·cos(q_i, k_i))
"""

from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.models.mlp import ProjectorMlp
from esvit_scale.objective.objective import Logs
from esvit_scale.objective.two_views import TwoViews


class BYOL(TwoViews):
    """BYOL's objective: a projector, a predictor, and the squared distance of unit predictions from the teacher's."""

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projector and the predictor for trunk features of width `dim`."""
        hidden, width = config.head_hidden, config.bottleneck
        super().__init__(
            ProjectorMlp(dim, hidden, width), ProjectorMlp(width, config.predictor_hidden or hidden, width)
        )

    def compare(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Logs]:
        """Return the mean squared distance of unit rows `queries` and `keys`, both [B, D], and nothing to log."""
        return (2 - 2 * (queries * keys).sum(1)).mean(), {}
