"""Sparsification: a trunk that prunes tokens learns to give the features of its dense self, which is frozen.

    L = CE(labels) + d(view) + w_t · mean over kept tokens of d(token) + w_r · mean over stages s and crops of (k_s − ρ_s)²

d(f) = ‖f − f*‖² / ‖f*‖² compares a feature f with that of the dense trunk f* for the same crop. k_s is the fraction of a
crop's tokens that pruning stage s keeps, ρ_s the fraction that it shall keep; w_t is `objective.token_weight`, w_r
`objective.ratio_weight`. The first term is that of a linear classifier on the view feature, where the run learns labels
(`objective.classes`). DynamicViT (Rao et al. 2021) has the divergence of the class probabilities in place of d(view), and
needs labels.

Token features of a trunk whose last stage does not prune are all compared: pruned tokens of a Swin keep their place.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.descriptions import ObjectiveCard
from esvit_scale.models.trunk import Features, Grid, Kept
from esvit_scale.objective.objective import LabelsAndTargets, Logs, Objective, fixed_precision, smoothed_cross_entropy

CITATION = "Rao et al., *DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification*, NeurIPS 2021."


class DenseFeatures(NamedTuple):
    """The features of the dense trunk, of the same crops that the student sees."""

    view: Tensor  # [ΣB, C]
    regions: Tensor  # [ΣB·T, C]


class DenseTargets(Objective):
    """The targets of `Sparsify`, which need no heads."""

    def targets(self, teacher: Features) -> DenseFeatures:
        """Return the features as they are."""
        return DenseFeatures(teacher.view, teacher.regions)


class Sparsify(Objective):
    """The loss of a sparse trunk against its dense self; with labels, a linear classifier too."""

    multi_crop = False
    has_teacher = False
    has_frozen_teacher = True
    teacher_targets = ("features",)

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the objective for trunk features of width `dim`."""
        super().__init__()
        self.dim, self._config = dim, config
        self.takes_labels = config.classes > 0
        self.image_views = (1,) if self.takes_labels else (2,)
        self.classifier = nn.Linear(dim, config.classes) if config.classes else None

    def of_frozen_teacher(self, dim: int, config: configs.Objective) -> Objective:
        """Return the objective that hands the dense features on.

        Raises:
            UserError: these features have another width than the student's.
        """
        if dim != self.dim:
            raise UserError(
                f"objective.teacher: its features have width {dim}, and the student's {self.dim}; name the dense weights from "
                "which the run starts"
            )
        return DenseTargets()

    def targets(self, teacher: Features) -> Tensor:
        """Return the logits [B, K] of images, which evaluation reads; only with labels."""
        assert self.classifier is not None
        logits: Tensor = self.classifier(teacher.view)
        return logits

    def forward(
        self, student: Features, targets: DenseFeatures | LabelsAndTargets, teacher_temp: float
    ) -> tuple[Tensor, Logs]:
        """Return the loss, and its parts without their weights.

        It logs the fraction of the tokens that each pruning stage kept, kept_1 and so on, in the mean over crops.
        """
        labels, dense = targets if isinstance(targets, LabelsAndTargets) else (None, targets)
        with fixed_precision(student.view.device):
            loss = relative_distance(student.view, dense.view).mean()
            logs = {"loss_view": loss.detach()}
            if len(student.regions):
                weights = weights_of_regions(student.kept, student.grids, student.regions)
                of_tokens = relative_distance(student.regions, dense.regions) * weights
                tokens = of_tokens.sum() / weights.sum().clamp(min=1)
                loss, logs = loss + self._config.token_weight * tokens, logs | {"loss_tokens": tokens.detach()}
            if student.kept is not None:
                ratio = ratio_loss(student.kept)
                loss, logs = loss + self._config.ratio_weight * ratio, logs | {"loss_ratio": ratio.detach()}
                logs |= {f"kept_{s}": mask.detach().mean() for s, mask in enumerate(student.kept.masks, start=1)}
        if labels is not None and self.classifier is not None:
            logits = self.classifier(student.view)
            entropy, top1 = smoothed_cross_entropy(logits, labels, self._config.label_smoothing)
            loss, logs = loss + entropy, logs | {"loss_class": entropy.detach(), "train_top1": top1}
        return loss, logs

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        labels = " and of labels" if self.takes_labels else ""
        return ObjectiveCard(f"sparsification: distillation of its dense self's features{labels}", (), CITATION)


def relative_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Return ‖f − f*‖² / ‖f*‖² for rows f of `found` and f* of `wanted`, both [n, C], in fp32 or wider: [n]."""
    wide = torch.promote_types(found.dtype, torch.float32)
    found, wanted = found.to(wide), wanted.to(wide)
    length = wanted.square().sum(1).clamp(min=1e-6)  # a feature of zeros has no scale
    return (found - wanted).square().sum(1) / length


def ratio_loss(kept: Kept) -> Tensor:
    """Return the mean over pruning stages and crops of (kept fraction − wanted fraction)²."""
    crops = sum(n for n, _, _ in kept.grids)
    total = torch.zeros((), device=kept.masks[0].device)
    for mask, ratio in zip(kept.masks, kept.ratios, strict=True):
        of_groups = mask.split([n * h * w for n, h, w in kept.grids])
        for group, (n, _, _) in zip(of_groups, kept.grids, strict=True):
            total = total + (group.view(n, -1).mean(1) - ratio).square().sum()
    return total / (crops * len(kept.masks))


def weights_of_regions(kept: Kept | None, grids: list[Grid], regions: Tensor) -> Tensor:
    """Return 1 for region tokens that the last pruning stage kept and 0 for others, [n]; 1 for all if none are pruned."""
    wide = torch.promote_types(regions.dtype, torch.float32)
    if kept is None or kept.grids != grids:
        return torch.ones(len(regions), dtype=wide, device=regions.device)
    return kept.masks[-1].detach().to(wide)
