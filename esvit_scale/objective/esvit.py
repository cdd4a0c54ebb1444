"""EsViT's objective (Li et al. 2022): match the teacher per view and per region.

    L = mean over teacher views t of the 2 globals and student crops v ≠ t of
        ½ · mean over images of CE(p_t, q_v)  +  ½ · mean over images and regions i of CE(p_t^{j*(i)}, q_v^i)
    j*(i) = argmax_j cos(f_v^i, f_t^j),   f the trunk's tokens after its final norm

Without regions, the loss is the first term without its ½ (DINO's objective). The teacher's targets are centred by a
moving mean of its logits, or by Sinkhorn-Knopp over the batch (`objective.centering`).

With `objective.mask_weight` λ > 0, some global crops v of the student are masked (models/masking.py), and the loss has
a third term, the masked-image modelling of iBOT (Zhou et al. 2022) in EsViT's own region head:

    L + λ · mean over the 2 globals v and images of [ mean over hidden regions i of CE(p_v^i, q_v^i); 0 if none is ]

p_v^i is the teacher's distribution at the same region of the same crop, which the teacher sees whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.models.descriptions import ObjectiveCard, ObjectiveFormulas
from esvit_scale.models.heads import ProjectionHead
from esvit_scale.models.trunk import Features
from esvit_scale.objective.center import Center
from esvit_scale.objective.esvit_costs import TEACHER_VIEWS, EsViTFormulas
from esvit_scale.objective.objective import Logs, Objective, unit
from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.objective.prototypes import Entropies, prototype_cross_entropy
from esvit_scale.objective.sinkhorn import sinkhorn_center

PAPER = "https://arxiv.org/abs/2106.09785"


class HeadTargets(NamedTuple):
    """The teacher's targets for one head."""

    z: Tensor  # [n, D] bottleneck, unit rows
    rows: Tensor  # [K, D] the teacher's prototypes, in z's precision


class Targets(NamedTuple):
    """The teacher's outputs that the student's loss needs: plain data, as the two may be separate engines."""

    view: HeadTargets  # n = 2B
    region: HeadTargets | None  # n = 2B·T
    features: Tensor | None  # [2B, T, C] unit region features, with which student regions are matched
    images: int  # B


class EsViT(Objective):
    """EsViT's objective: heads, centres and loss. Teacher and student each hold an instance.

    Attributes:
        with_own_crop: whether a global crop is also compared with itself as the teacher sees it, each region with the
            region at its own place.
    """

    with_own_crop = False

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the heads for trunk features of width `dim`."""
        super().__init__()
        self.needs_regions = config.regions
        self.takes_masks = config.regions
        self.mask_weight = config.mask_weight
        self.student_temp = config.student_temp
        self.passes = TilePasses()
        self.prototypes = config.prototypes
        self.view_head = _head(dim, config)
        self.region_head = _head(dim, config) if config.regions else None
        self.sinkhorn = config.centering == "sinkhorn"
        self.view_center = Center(config.center_momentum)
        self.region_center = Center(config.center_momentum)

    def targets(self, teacher: Features) -> Targets:
        """Return the targets from the teacher's features of the two global views; called on the teacher's instance.

        Call it without gradient.
        """
        crops = teacher.grids[0][0]
        view = HeadTargets(*bottleneck_and_rows(self.view_head, teacher.view))
        if self.region_head is None:
            return Targets(view, None, None, crops // TEACHER_VIEWS)
        region = HeadTargets(*bottleneck_and_rows(self.region_head, teacher.regions))
        features = unit(teacher.regions.detach()).view(crops, -1, teacher.regions.shape[1])
        return Targets(view, region, features, crops // TEACHER_VIEWS)

    def forward(
        self, student: Features, targets: Targets, teacher_temp: float, hidden: Tensor | None = None
    ) -> tuple[Tensor, Logs]:
        """Return the student's loss over all crops, and scalars to log.

        The centres observe the micro-batch; call `commit` or `discard` after the optimizer step.

        Returns:
            The loss (scalar) and detached scalars: loss_view and loss_region (each a mean cross-entropy without its
            ½); loss_masked, without λ, if crops are masked; and for each head ("…_view", "…_region") teacher_entropy and student_entropy in nats, and
            prototypes_used, the effective number of prototypes among this micro-batch's targets.
        """
        views = len(student.view) // targets.images
        match, weight = view_pairs(views, targets.images, targets.view.rows, self.with_own_crop)
        loss, entropies = self._term(
            self.view_head, self.view_center, student.view, targets.view, match, weight, teacher_temp
        )
        logs = {"loss_view": loss.detach(), **logged(entropies, "view")}
        if self.region_head is None or targets.region is None or targets.features is None:
            return loss, logs
        match, weight = region_pairs(
            student, self._matched_with(student, targets.features), targets.images, self.with_own_crop
        )
        if hidden is not None:
            match, weight = with_hidden(match, weight, hidden, TEACHER_VIEWS * targets.images, self.mask_weight)
        region_loss, entropies = self._term(
            self.region_head, self.region_center, student.regions, targets.region, match, weight, teacher_temp
        )
        logs |= {"loss_region": region_loss.detach(), **logged(entropies, "region")}
        if hidden is not None:
            of_pairs, of_hidden = entropies.columns[:TEACHER_VIEWS].sum(), entropies.columns[-1]
            logs |= {"loss_region": of_pairs, "loss_masked": 0.5 * of_hidden / self.mask_weight}
        return 0.5 * loss + 0.5 * region_loss, logs

    def commit(self) -> None:
        """Update the centres from the observed micro-batches, after an applied optimizer step. All ranks call it."""
        for center in self._centers.values():
            center.commit()

    def discard(self) -> None:
        """Let the centres forget the observed micro-batches, after a skipped optimizer step."""
        for center in self._centers.values():
            center.discard()

    def extra_state(self) -> dict[str, Tensor]:
        """Return the centres, "view.values" and "region.values", fp32 [K].

        There are none before the first forward, nor with Sinkhorn centring.
        """
        states = {head: center.state_dict() for head, center in self._centers.items()}
        return {f"{head}.{name}": value for head, state in states.items() for name, value in state.items()}

    def empty_extra_state(self, device: torch.device) -> dict[str, Tensor]:
        """Return centres of zeros, with the names and shapes of a checkpoint's, to be filled from it."""
        return {f"{head}.values": torch.zeros(self.prototypes, device=device) for head in self._centers}

    def load_extra_state(self, extra_state: dict[str, Tensor]) -> None:
        """Restore the centres from what `extra_state` returned."""
        for head, center in self._centers.items():
            prefix = f"{head}."
            center.load_state_dict({n.removeprefix(prefix): v for n, v in extra_state.items() if n.startswith(prefix)})

    def formulas(self) -> ObjectiveFormulas:
        """Return the formulas for the FLOPs and activations of heads, region matching and loss."""
        return EsViTFormulas(self.view_head, self.region_head is not None)

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        losses = "view loss" if self.region_head is None else "view and region losses"
        return ObjectiveCard(
            f"[EsViT]({PAPER})'s {losses}",
            (("prototypes", f"{self.prototypes:,}"),),
            "Li et al., *Efficient Self-supervised Vision Transformers for Representation Learning*, ICLR 2022.",
        )

    def _matched_with(self, student: Features, teacher: Tensor) -> Tensor:
        """Return the unit region features of the globals, [2B, T, C], with which student regions are matched."""
        return teacher

    @property
    def _centers(self) -> dict[str, Center]:
        if self.sinkhorn:
            return {}
        both = {"view": self.view_center, "region": self.region_center}
        return both if self.region_head is not None else {"view": self.view_center}

    def _term(
        self,
        head: ProjectionHead,
        center: Center,
        features: Tensor,
        targets: HeadTargets,
        match: Tensor,
        weight: Tensor,
        teacher_temp: float,
        mean: Tensor | None = None,
    ) -> tuple[Tensor, Entropies]:
        """Return a head's loss; the centre observes `mean` [D], or the mean of the targets' bottleneck vectors."""
        if self.sinkhorn:
            center_values = sinkhorn_center(targets.z, targets.rows, teacher_temp, self.passes)
        else:
            center_values = center.values(targets.rows)
            if mean is None:
                mean = targets.z.mean(0, dtype=torch.promote_types(targets.z.dtype, torch.float32))
            center.observe(mean, targets.rows)
        return head.last_layer(
            head(features),
            lambda z, rows: prototype_cross_entropy(
                *(z, rows, targets.z, targets.rows, center_values, match, weight),
                *(self.student_temp, teacher_temp, self.passes),
            ),
        )


def logged(entropies: Entropies, part: str) -> dict[str, Tensor]:
    """Return the scalars to log of a head's loss; `part` is "view" or "region"."""
    return {
        f"teacher_entropy_{part}": entropies.teacher,
        f"student_entropy_{part}": entropies.student,
        f"prototypes_used_{part}": entropies.usage.exp(),
    }


def view_pairs(views: int, images: int, like: Tensor, with_own_crop: bool = False) -> tuple[Tensor, Tensor]:
    """Return the indices of the two teacher rows that each student crop is compared with, and weights; both [V·B, 2].

    The rows are the two global crops of the same image; a crop has weight 0 with itself unless `with_own_crop`. Both
    tensors are on the device of `like`; the weights are fp32 (fp64 if `like` is).
    """
    device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
    crop = torch.arange(views, device=device)[:, None, None]
    image = torch.arange(images, device=device)[None, :, None]
    teacher = torch.arange(TEACHER_VIEWS, device=device)[None, None, :]
    match = (teacher * images + image).expand(views, images, TEACHER_VIEWS)
    weight = (with_own_crop | (crop != teacher)).to(dtype).expand_as(match) / (_pairs(views, with_own_crop) * images)
    return match.reshape(-1, TEACHER_VIEWS), weight.reshape(-1, TEACHER_VIEWS)


@torch.no_grad()
def region_pairs(student: Features, teacher: Tensor, images: int, with_own_crop: bool = False) -> tuple[Tensor, Tensor]:
    """Return the indices of the two teacher rows that each student region is compared with, and weights; [ΣB·T, 2].

    The rows are the most similar region in either global crop of the same image. A region has weight 0 with its own
    crop; `with_own_crop`, it is compared with the region at its own place there.

    Args:
        student: features of V crops of each image.
        teacher: [2B, T, C] unit region features of the global crops.
        images: B, the number of images.
    """
    regions = teacher.shape[1]
    first_row = torch.arange(TEACHER_VIEWS * images, device=teacher.device).view(TEACHER_VIEWS, 1, images, 1) * regions
    views = sum(n for n, _, _ in student.grids) // images
    tokens = student.regions.detach().split([n * h * w for n, h, w in student.grids])
    matches, weights, first = [], [], 0
    for group, (n, h, w) in zip(tokens, student.grids, strict=True):
        features = unit(group).view(n // images, images, h * w, -1)  # [V_g, B, T_g, C]
        maps = teacher.to(features.dtype).view(TEACHER_VIEWS, 1, images, regions, -1).transpose(-2, -1)
        nearest = torch.stack([(features @ view).argmax(-1) for view in maps])  # [2, V_g, B, T_g]
        crop = torch.arange(first, first + n // images, device=teacher.device)[:, None, None, None]
        other = (crop != torch.arange(TEACHER_VIEWS, device=teacher.device)).expand(*nearest.shape[1:], -1)
        if with_own_crop:
            own_place = torch.arange(h * w, device=teacher.device)
            nearest = torch.where(other.permute(3, 0, 1, 2), nearest, own_place)
            other = torch.ones_like(other)
        matches.append((first_row + nearest).permute(1, 2, 3, 0).reshape(-1, TEACHER_VIEWS))
        pairs = _pairs(views, with_own_crop)
        weights.append(other.reshape(-1, TEACHER_VIEWS).to(teacher.dtype) / (pairs * images * h * w))
        first += n // images
    return torch.cat(matches), torch.cat(weights)


@torch.no_grad()
def with_hidden(match: Tensor, weight: Tensor, hidden: Tensor, crops: int, mask_weight: float) -> tuple[Tensor, Tensor]:
    """Return match and weight [ΣB·T, 3] with a third column: every hidden region with the same region of the teacher.

    Args:
        match, weight: of the region loss (`region_pairs`), [ΣB·T, 2].
        hidden: bool [2B·T], the hidden regions of the global crops, which come first.
        crops: 2B.
        mask_weight: λ, the weight of the hidden regions beside the region loss, which itself has the weight ½.
    """
    of_crops = hidden.view(crops, -1).to(weight.dtype)
    shares = of_crops / of_crops.sum(1, keepdim=True).clamp_min(1)  # 1/n at the n hidden regions of a crop
    own, column = match.new_zeros(len(match), 1), weight.new_zeros(len(weight), 1)
    own[: len(hidden), 0] = torch.arange(len(hidden), device=match.device)
    column[: len(hidden), 0] = shares.flatten() * (2 * mask_weight / crops)
    return torch.cat([match, own], 1), torch.cat([weight, column], 1)


def _pairs(views: int, with_own_crop: bool) -> int:
    return TEACHER_VIEWS * (views if with_own_crop else views - 1)


def _head(dim: int, config: configs.Objective) -> ProjectionHead:
    return ProjectionHead(dim, config.head_hidden, config.bottleneck, config.prototypes, config.norm_last_layer)


def bottleneck_and_rows(head: ProjectionHead, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return a head's bottleneck [n, D] of features [n, C] and its prototypes [K, D], without gradient."""
    return head.last_layer(head(features), lambda z, rows: (z.detach(), rows.detach()))
