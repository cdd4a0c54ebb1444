"""Distillation: a student learns what a frozen, usually larger teacher says of the same images.

The teacher (`objective.teacher`) sees the two global crops t, the student all V crops v, and every pair counts, a global
crop with itself too: a teacher that does not move cannot collapse.

    L = mean over t and v of  ½ · mean over images of d(t, v)  +  ½ · mean over images and regions i of d(t^{j*(i)}, v^i)

Without `objective.regions`, L is the first term without its ½. The distance d is one of two (`objective.targets`):

    prototypes  CE(p_t, q_v): p_t over the prototypes of the teacher's own heads, with the temperatures and the centring of
                EsViT's loss (objective/esvit.py); q_v over as many prototypes of the student's heads
    cosine      1 − cos(f_t, P f_v): f are features before any head, P a linear projection of the student's to the
                teacher's width

j*(i) is the region of the teacher's crop that the student's region i is compared with. Features of the two networks
cannot be compared, as their widths differ, so that regions are matched by the student's own features f: j*(i) =
argmax_j cos(f_v^i, f_t^j), and j*(i) = i for v = t. Both networks must thus cut a crop into the same grid of regions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.descriptions import Activations, Count, ObjectiveCard
from esvit_scale.models.heads import ProjectionHead
from esvit_scale.models.trunk import Features
from esvit_scale.objective import frozen
from esvit_scale.objective.esvit import EsViT, region_pairs, view_pairs
from esvit_scale.objective.esvit_costs import TEACHER_VIEWS, WIDE, EsViTFormulas
from esvit_scale.objective.objective import Logs, Objective, fixed_precision, unit

CITATION = "Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015."


def build(dim: int, config: configs.Objective) -> Objective:
    """Build the objective for trunk features of width `dim`, with the targets that `config.targets` names."""
    return (DistillPrototypes if config.targets == "prototypes" else DistillCosine)(dim, config)


class DistillPrototypes(EsViT):
    """EsViT's heads and loss, with the prototypes of a frozen teacher as targets."""

    has_teacher = False
    has_frozen_teacher = True
    with_own_crop = True

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the student's heads for trunk features of width `dim`."""
        super().__init__(dim, config)
        self.takes_masks = False
        self._config = config

    def of_frozen_teacher(self, dim: int, config: configs.Objective) -> Objective:
        """Return the teacher's heads, those that the student has.

        Raises:
            UserError: the teacher's heads have other prototypes than the student's.
        """
        for key in ("prototypes", "bottleneck"):
            ours, theirs = getattr(self._config, key), getattr(config, key)
            if ours != theirs:
                raise UserError(f"objective.{key}: {ours}, but the teacher's heads have {theirs}; set it to {theirs}")
        sizes = {key: getattr(config, key) for key in ("prototypes", "head_hidden", "bottleneck")}
        return EsViT(dim, self._config.model_copy(update=sizes))

    def formulas(self) -> EsViTFormulas:
        """Return EsViT's formulas, with the teacher's heads for its tokens."""
        teacher = self.view_head
        if self._config.teacher_config is not None:
            dim, hidden = frozen.teacher_dim(self._config), frozen.teacher_config(self._config).objective.head_hidden
            with torch.device("meta"):
                teacher = ProjectionHead(dim, hidden, self.view_head.bottleneck, 1)
        return EsViTFormulas(self.view_head, self.region_head is not None, teacher)

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        rows = (("prototypes", f"{self.prototypes:,}"), ("teacher", frozen.teacher_name(self._config)))
        return ObjectiveCard("distillation over a teacher's prototypes", rows, CITATION)

    def _matched_with(self, student: Features, teacher: Tensor) -> Tensor:
        return _own_maps(student)


class FeatureTargets(NamedTuple):
    """The teacher's features of the two global crops."""

    view: Tensor  # [2B, C] unit rows, fp32
    regions: Tensor | None  # [2B·T, C] unit rows, fp32
    images: int  # B


class TeacherFeatures(Objective):
    """The targets of `DistillCosine`, which need no heads."""

    def __init__(self, regions: bool) -> None:
        super().__init__()
        self.needs_regions = regions

    def targets(self, teacher: Features) -> FeatureTargets:
        """Return the features of the two global views as unit vectors."""
        regions = unit(teacher.regions) if self.needs_regions else None
        return FeatureTargets(unit(teacher.view), regions, teacher.grids[0][0] // TEACHER_VIEWS)


class DistillCosine(Objective):
    """Linear projections of the student's features, which shall have the direction of a frozen teacher's."""

    has_teacher = False
    has_frozen_teacher = True

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projections for trunk features of width `dim`.

        Raises:
            UserError: the width of the teacher is not known, because the config does not describe it.
        """
        super().__init__()
        self.needs_regions, self._config = config.regions, config
        out = frozen.teacher_dim(config)
        self.view_projection = nn.Linear(dim, out)
        self.region_projection = nn.Linear(dim, out) if config.regions else None

    def of_frozen_teacher(self, dim: int, config: configs.Objective) -> Objective:
        """Return the objective that hands the teacher's features on."""
        return TeacherFeatures(self.needs_regions)

    def forward(self, student: Features, targets: FeatureTargets, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the loss of all crops, and its parts without their ½, loss_view and loss_region."""
        views = len(student.view) // targets.images
        match, weight = view_pairs(views, targets.images, targets.view, with_own_crop=True)
        loss = _distance(self.view_projection(student.view), targets.view, match, weight)
        logs = {"loss_view": loss.detach()}
        if self.region_projection is None or targets.regions is None:
            return loss, logs
        match, weight = region_pairs(student, _own_maps(student), targets.images, with_own_crop=True)
        of_regions = _distance(self.region_projection(student.regions), targets.regions, match, weight)
        return 0.5 * loss + 0.5 * of_regions, {**logs, "loss_region": of_regions.detach()}

    def formulas(self) -> "CosineFormulas":
        """Return the formulas for the FLOPs and activations of projections, region matching and loss."""
        return CosineFormulas(self.view_projection, self.needs_regions)

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        rows = (("teacher", frozen.teacher_name(self._config)),)
        return ObjectiveCard("distillation of a teacher's features", rows, CITATION)


class CosineFormulas:
    """Formulas for the FLOPs and activation bytes of `DistillCosine`; `projection` is that of views or of regions."""

    def __init__(self, projection: nn.Linear, regions: bool) -> None:
        self.dim, self.out, self.regions = projection.in_features, projection.out_features, regions

    def image_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return the FLOPs per image: projections forward and backward, and region matching."""
        regions = [h * w for h, w in grids] if self.regions else []
        compared = sum(regions) if count == "executed" else sum(regions[1:])  # with either teacher view
        match = 2 * TEACHER_VIEWS * regions[0] * self.dim * compared if regions else 0
        return 3 * (len(grids) + sum(regions)) * 2 * self.dim * self.out + match

    def teacher_flops(self, grids: Sequence[tuple[int, int]], count: Count) -> int:
        """Return 0: the teacher has no heads."""
        return 0

    def kept(self, grids: Sequence[tuple[int, int]], element: int) -> Activations:
        """Return the bytes that projections and loss keep for the backward, at `element` bytes per value."""
        # Per token: the projection's input; in fp32 its output, the mean of its targets, and a length before and after
        # it is clamped.
        token = self.dim * element + (2 * self.out + 2) * WIDE
        return Activations(token * sum(1 + (h * w if self.regions else 0) for h, w in grids), 0)


def _own_maps(student: Features) -> Tensor:
    """Return the student's own unit region features of the global crops, [2B, T, C], without gradient."""
    crops, h, w = student.grids[0]
    return unit(student.regions[: crops * h * w].detach()).view(crops, h * w, -1)


def _distance(projected: Tensor, targets: Tensor, match: Tensor, weight: Tensor) -> Tensor:
    """Return Σ over rows s and columns m of weight[s, m] · (1 − cos(projected[s], targets[match[s, m]])).

    Args:
        projected: [N_s, C].
        targets: [N_t, C] unit rows.
        match, weight: [N_s, M].
    """
    with fixed_precision(projected.device):
        rows = unit(projected)
        mean = torch.zeros_like(rows)  # of a row's targets: the cosine is linear in them
        for m in range(match.shape[1]):
            mean.addcmul_(targets[match[:, m]].to(rows.dtype), weight[:, m, None].to(rows.dtype))
        return weight.to(rows.dtype).sum() - (rows * mean).sum()
