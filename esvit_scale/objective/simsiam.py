"""SimSiam (Chen and He 2021): predict the network's own projection of the other view, which gets no gradient.

L = Σ over both orders of ½ · mean_i (−cos(q_i, k_i))
"""

from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.models.mlp import ProjectorMlp
from esvit_scale.objective.objective import Logs
from esvit_scale.objective.two_views import TwoViews


class SimSiam(TwoViews):
    """SimSiam's objective: a projector, a predictor and the negative cosine, without a teacher."""

    has_teacher = False

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projector and the predictor for trunk features of width `dim`."""
        hidden, width = config.head_hidden, config.bottleneck
        super().__init__(
            ProjectorMlp(dim, hidden, hidden, width, last_norm=True),
            ProjectorMlp(width, config.predictor_hidden or hidden, width),
        )

    def compare(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Logs]:
        """Return −½ times the mean cosine of the unit rows `queries` and `keys`, both [B, D], and nothing to log."""
        return -(queries * keys).sum(1).mean() / 2, {}
