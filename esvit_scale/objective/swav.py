"""SwAV (Caron et al. 2020): from every crop, predict the code of the image's global views. No teacher.

    L = mean over global views t and crops v ≠ t of mean_i CE(q_i^t, softmax(z_i^v Wᵀ/τ))

W are prototypes of unit norm. The codes q^t are Sinkhorn-Knopp's of the view's own scores at temperature ε, over the
images of all ranks, without gradient. ε is `objective.teacher_temp`.
"""

import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.models.descriptions import ObjectiveCard
from esvit_scale.models.heads import Prototypes
from esvit_scale.models.mlp import ProjectorMlp
from esvit_scale.models.trunk import Features
from esvit_scale.objective.objective import Logs, Objective, spread, unit
from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.objective.prototypes import Entropies, prototype_cross_entropy
from esvit_scale.objective.sinkhorn import sinkhorn_center

VIEWS = 2  # the globals, which have codes


class SwAV(Objective):
    """SwAV's objective: a projector and prototypes, with codes by Sinkhorn-Knopp and without a teacher."""

    has_teacher = False

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projector and the prototypes for trunk features of width `dim`."""
        super().__init__()
        self.projector = ProjectorMlp(dim, config.head_hidden, config.bottleneck)
        self.last_layer = Prototypes(config.bottleneck, config.prototypes, norm_last_layer=True)
        self.temp, self.prototypes = config.student_temp, config.prototypes
        self.passes = TilePasses()

    def forward(self, student: Features, targets: None, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the loss of all of the student's crops.

        It logs teacher_entropy_view (of the codes), student_entropy_view and prototypes_used_view as EsViT does, and
        projection_std, the projections' `spread`.
        """
        projections = self.projector(student.view)  # [V·B, D]; crops of all sizes are normalised together
        images = student.grids[0][0] // VIEWS
        loss, entropies = self.last_layer(
            unit(projections).to(projections.dtype),
            lambda z, rows: self._swapped(z, rows, images, teacher_temp),
        )
        return loss, {
            "teacher_entropy_view": entropies.teacher,
            "student_entropy_view": entropies.student,
            "prototypes_used_view": entropies.usage.exp(),
            "projection_std": spread(projections),
        }

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        return ObjectiveCard(rows=(("prototypes", f"{self.prototypes:,}"),))

    def _swapped(self, z: Tensor, rows: Tensor, images: int, epsilon: float) -> tuple[Tensor, Entropies]:
        """Return the loss of all crops against the codes of both global views, and the entropies.

        The codes of a view are computed from the rows of that view alone, over all ranks.
        """
        others = len(z) // images - 1
        match = torch.arange(images, device=z.device).repeat(others)[:, None]
        wide = torch.promote_types(z.dtype, torch.float32)
        weight = torch.full(match.shape, 1 / (VIEWS * len(match)), dtype=wide, device=z.device)
        terms = []
        for view in range(VIEWS):
            own = slice(view * images, (view + 1) * images)
            codes, fixed = z[own].detach(), rows.detach()
            center = sinkhorn_center(codes, fixed, epsilon, self.passes)
            rest = torch.cat([z[: own.start], z[own.stop :]])
            inputs = rest, rows, codes, fixed, center, match, weight
            terms.append(prototype_cross_entropy(*inputs, self.temp, epsilon, self.passes))
        (first, entropies), (second, other_entropies) = terms
        return first + second, Entropies(*((a + b) / VIEWS for a, b in zip(entropies, other_entropies, strict=True)))
