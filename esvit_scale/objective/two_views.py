"""The base class of MoCo v3, BYOL, SimSiam and the truncated triplet: predict each view's projection from the other.

    q = predictor(projector(f))     of the student, for both views
    k = projector(f)                of the teacher; without one, the student's own without gradient
    L = compare(q₁, k₂) + compare(q₂, k₁)

Batch norms in projector and predictor normalise one view of the images of all ranks at a time, as if each view had its
own forward.
"""

from torch import Tensor

from esvit_scale.models.mlp import ProjectorMlp
from esvit_scale.models.trunk import Features
from esvit_scale.objective.objective import Logs, Objective, fixed_precision, spread, unit

VIEWS = 2


class TwoViews(Objective):
    """An objective that predicts each view's projection from the other's."""

    multi_crop = False

    def __init__(self, projector: ProjectorMlp, predictor: ProjectorMlp) -> None:
        super().__init__()
        self.projector = projector
        self.predictor = predictor

    def compare(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Logs]:
        """Return the loss of predicting one view from the other, and scalars to log.

        Args:
            queries: [B, D], the student's predictions from one view: unit rows, in fp32 or wider.
            keys: [B, D], the projections of the other view: unit rows in the same precision, without gradient.
        """
        raise NotImplementedError

    def targets(self, teacher: Features) -> Tensor:
        """Return the projections of both views as unit rows, [2B, D]."""
        return unit(self.projector(teacher.view, VIEWS))

    def forward(self, student: Features, targets: Tensor | None, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the sum of the losses of predicting view 2 from view 1 and view 1 from view 2.

        It logs the scalars of `compare`, averaged over the two; positive_similarity, the mean cosine of predictions and
        targets; projection_std, the projections' `spread`.
        """
        projections = self.projector(student.view, VIEWS)
        queries = unit(self.predictor(projections, VIEWS))
        keys = unit(projections.detach()) if targets is None else targets.to(queries.dtype)
        keys = keys.roll(len(keys) // VIEWS, 0)  # of the other view: swaps the two halves
        with fixed_precision(queries.device):
            orders = [self.compare(q, k) for q, k in zip(queries.chunk(VIEWS), keys.chunk(VIEWS), strict=True)]
        (first, logs), (second, others) = orders
        means = {name: (value + others[name]).detach() / VIEWS for name, value in logs.items()}
        similarity = (queries.detach() * keys).sum(1).mean()
        return first + second, {"positive_similarity": similarity, "projection_std": spread(projections), **means}
