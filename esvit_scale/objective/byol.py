"""BYOL (Grill et al. 2020): predict the teacher's projection of the other view; no negatives.

L = Σ over both orders of mean_i (2 − 2·cos(q_i, k_i))
"""

from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.models.mlp import ProjectorMlp
from esvit_scale.objective.objective import Logs
from esvit_scale.objective.two_views import TwoViews


class BYOL(TwoViews):
    """The objective: projector, predictor, teacher, and the squared distance of unit rows."""

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Args: dim: C of the trunk."""
        hidden, width = config.head_hidden, config.bottleneck
        super().__init__(
            ProjectorMlp(dim, hidden, width), ProjectorMlp(width, config.predictor_hidden or hidden, width)
        )

    def compare(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Logs]:
        """Return the loss of one order of the two views, and nothing to log."""
        return (2 - 2 * (queries * keys).sum(1)).mean(), {}
