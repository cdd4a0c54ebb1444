"""SimCLR (Chen et al. 2020): the NT-Xent loss, with all other views of the global batch as negatives. No teacher.

    L = mean over the 2N views i of −log( exp(z_i·z_j/τ) / Σ_{l ≠ i} exp(z_i·z_l/τ) ),   j the other view of i's image

The views of all ranks are gathered with their gradients, so the losses of all ranks contribute to a view's gradient.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.models.mlp import ProjectorMlp
from esvit_scale.models.trunk import Features
from esvit_scale.objective.objective import Logs, Objective, fixed_precision, spread, unit
from esvit_scale.parallel import collectives


class SimCLR(Objective):
    """SimCLR's objective: a projector and the NT-Xent loss, without a teacher."""

    multi_crop = False
    has_teacher = False

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projector for trunk features of width `dim`."""
        super().__init__()
        self.projector = ProjectorMlp(dim, config.head_hidden, config.bottleneck, last_norm=True)
        self.temp = config.student_temp

    def forward(self, student: Features, targets: None, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the loss of the student's two views.

        It logs positive_similarity, the mean cosine of an image's two views; contrastive_accuracy, the fraction of
        views whose nearest view, of all ranks', is the other of their image; projection_std, the projections' `spread`.
        """
        z = unit(self.projector(student.view))  # [2B, D]; both views are normalised together
        with fixed_precision(z.device):
            similarities = z @ collectives.gather_rows(z).t()  # [2B, world · 2B]
            row = torch.arange(len(z), device=z.device)
            first = len(z) * collectives.rank()
            itself, other = first + row, first + row.roll(len(z) // 2)
            every = torch.arange(similarities.shape[1], device=z.device)
            logits = similarities.masked_fill(every == itself[:, None], -torch.inf) / self.temp
            loss = F.cross_entropy(logits, other)
        accuracy = (logits.argmax(1) == other).to(z.dtype).mean()
        similarity = similarities.detach()[row, other].mean()
        return loss, {
            "positive_similarity": similarity,
            "contrastive_accuracy": accuracy,
            "projection_std": spread(z),
        }
