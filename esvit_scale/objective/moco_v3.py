"""MoCo v3 (Chen, Xie and He 2021): distinguish the other view of an image from the views of all other images.

L = Σ over both orders of 2τ · mean_i CE(q_i · K/τ, i),   K the teacher's keys of all ranks, without a queue
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.models.mlp import ProjectorMlp
from esvit_scale.objective.objective import Logs
from esvit_scale.objective.two_views import TwoViews
from esvit_scale.parallel import collectives


class MoCoV3(TwoViews):
    """MoCo v3's objective: a projector, a predictor, and a contrastive loss over the teacher's keys of all ranks."""

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projector and the predictor for trunk features of width `dim`."""
        hidden, width = config.head_hidden, config.bottleneck
        super().__init__(
            ProjectorMlp(dim, hidden, hidden, width, last_norm=True),
            ProjectorMlp(width, config.predictor_hidden or hidden, width, last_norm=True),
        )
        self.temp = config.student_temp

    def compare(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Logs]:
        """Return the contrastive loss of unit rows `queries` of one view and `keys` of the other, both [B, D].

        It logs contrastive_accuracy: the fraction of queries whose nearest key, of all ranks', is their own image's.
        """
        logits = queries @ collectives.gather_rows(keys).t() / self.temp  # [B, world · B]
        own = torch.arange(len(queries), device=queries.device) + len(queries) * collectives.rank()
        accuracy = (logits.argmax(1) == own).to(logits.dtype).mean()
        return 2 * self.temp * F.cross_entropy(logits, own), {"contrastive_accuracy": accuracy}
