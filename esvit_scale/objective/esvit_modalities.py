"""EsViT's objective with modalities as views: student and teacher see the same sample through different senses.

The teacher sees two global crops of a sample's image and every view of its other modalities, the student all crops and
views, its audio and video shortened by DropToken. Every view of the student learns what the teacher says of every other
view, of the same or another modality:

    L = mean over teacher views t and student views v ≠ t of
        ½ · mean over samples of CE(p_t, q_v)  +  ½ · mean over samples and tokens i of CE(p_t^{j*(i)}, q_v^i)
    j*(i) = argmax_j cos(f_v^i, f_t^j),   f the trunk's tokens after its final norm, j a token of t that is no padding

So the regions of an image are matched with tokens of the sound, the video or the text, and the other way round. Without
`objective.regions`, L is the first term without its ½. One head serves all modalities. A sample takes part in the pairs
(t, v) of which it has both; the mean over samples is over those of all ranks, and a pair that no sample has gives 0. So do
the means that move the centres.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.descriptions import ObjectiveCard
from esvit_scale.models.trunk import Features
from esvit_scale.objective.esvit import EsViT, HeadTargets, bottleneck_and_rows, logged
from esvit_scale.objective.objective import Logs, unit
from esvit_scale.parallel import collectives


class View(NamedTuple):
    """One view of all samples: a crop of their images, or a view of another modality."""

    name: tuple[str, int]  # modality and number of the view
    tokens: Tensor  # [B, T, C]
    valid: Tensor  # bool [B, T]
    present: Tensor  # bool [B]


class TeacherView(NamedTuple):
    """What the student's loss needs of a teacher's view beside its targets."""

    name: tuple[str, int]
    tokens: Tensor | None  # [B, T, C] unit rows; None without a region loss
    valid: Tensor  # bool [B, T]
    present: Tensor  # bool [B]


class ModalTargets(NamedTuple):
    """The teacher's outputs; the rows of the heads' targets are those of all views in order, sample by sample."""

    view: HeadTargets
    view_mean: Tensor  # [D] what the centre observes: the mean of what is there
    region: HeadTargets | None
    region_mean: Tensor | None
    views: list[TeacherView]


class ModalEsViT(EsViT):
    """EsViT's heads, centres and loss over views of several modalities."""

    takes_signals = True

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the heads for trunk features of width `dim`.

        Raises:
            UserError: the targets shall be balanced by Sinkhorn-Knopp, which would count missing views.
        """
        super().__init__(dim, config)
        self.takes_masks = False
        if self.sinkhorn:
            raise UserError("objective.centering: esvit_modalities needs center; set objective.centering=center")

    def targets(self, teacher: Features) -> ModalTargets:  # type: ignore[override]
        """Return the targets from the teacher's features of all its views; call it without gradient."""
        views = views_of(teacher)
        present = torch.cat([view.present for view in views])
        rows = torch.cat([teacher.view, *(signal.view for signal in teacher.signals.values())])
        of_views = HeadTargets(*bottleneck_and_rows(self.view_head, rows))
        mean = _mean(of_views.z, present)
        if self.region_head is None:
            seen = [TeacherView(v.name, None, v.valid, v.present) for v in views]
            return ModalTargets(of_views, mean, None, None, seen)
        tokens = torch.cat([view.tokens.flatten(0, 1) for view in views])
        of_tokens = HeadTargets(*bottleneck_and_rows(self.region_head, tokens))
        seen = [TeacherView(v.name, unit(v.tokens.detach()), v.valid, v.present) for v in views]
        valid = torch.cat([view.valid.flatten() for view in views])
        return ModalTargets(of_views, mean, of_tokens, _mean(of_tokens.z, valid), seen)

    def forward(self, student: Features, targets: ModalTargets, teacher_temp: float) -> tuple[Tensor, Logs]:  # type: ignore[override]
        """Return the loss of all views, and the scalars to log of EsViT's objective; the centres observe the batch."""
        views = views_of(student)
        shares = pair_shares(views, targets.views)  # [V, M, B]
        samples = shares.shape[2]
        rows = torch.cat([student.view, *(signal.view for signal in student.signals.values())])
        own = torch.arange(samples, device=rows.device)
        first = samples * torch.arange(len(targets.views), device=rows.device)
        match = (own[:, None] + first).expand(len(views), -1, -1).flatten(0, 1)  # [V·B, M]
        weight = shares.transpose(1, 2).flatten(0, 1)
        loss, entropies = self._term(
            *(self.view_head, self.view_center, rows, targets.view), *(match, weight, teacher_temp, targets.view_mean)
        )
        logs = {"loss_view": loss.detach(), **logged(entropies, "view")}
        if self.region_head is None or targets.region is None:
            return loss, logs
        match, weight = token_pairs(views, targets.views, shares)
        tokens = torch.cat([view.tokens.flatten(0, 1) for view in views])
        region_loss, entropies = self._term(
            *(self.region_head, self.region_center, tokens, targets.region),
            *(match, weight, teacher_temp, targets.region_mean),
        )
        logs |= {"loss_region": region_loss.detach(), **logged(entropies, "region")}
        return 0.5 * loss + 0.5 * region_loss, logs

    def comparable(self, views: dict[str, Tensor], a: str, b: str) -> tuple[Tensor, Tensor]:
        """Return unit vectors of modalities a and b that can be compared, [n, D] each, given view features [n, C]."""
        x, y = (self.view_head(views[name]) for name in (a, b))
        return x, y

    def formulas(self) -> None:  # type: ignore[override]
        """Return None: costs are traced, because they depend on the lengths of all modalities."""

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        card = super().card()
        return card._replace(method=f"{card.method} with modalities as views")


def views_of(features: Features) -> list[View]:
    """Return the views of all samples: the crops of images in order, then those of every other modality."""
    assert features.has_image is not None
    samples, found, first, crop = len(features.has_image), [], 0, 0
    for n, h, w in features.grids:
        tokens = features.regions[first : first + n * h * w].view(n // samples, samples, h * w, -1)
        first += n * h * w
        for of_crop in tokens:
            valid = features.has_image[:, None].expand(-1, h * w)
            found.append(View(("image", crop), of_crop, valid, features.has_image))
            crop += 1
    for name, signal in features.signals.items():
        parts = zip(
            *(x.unflatten(0, (-1, samples)) for x in (signal.tokens, signal.valid, signal.present)), strict=True
        )
        found += [View((name, v), *part) for v, part in enumerate(parts)]
    return found


@torch.no_grad()
def pair_shares(student: list[View], teacher: list[TeacherView]) -> Tensor:
    """Return the weight of every sample in every pair of a student's and a teacher's view, [V, M, B].

    Summed over the samples of all ranks and divided by their number, it is 1 / number of pairs for each pair that a sample
    has; a view has weight 0 with itself.
    """
    has_student, has_teacher = (torch.stack([v.present for v in views]) for views in (student, teacher))
    differ = torch.tensor([[v.name != t.name for t in teacher] for v in student], device=has_student.device)
    wide = torch.promote_types(student[0].tokens.dtype, torch.float32)
    both = (has_student[:, None] & has_teacher & differ[:, :, None]).to(wide)
    samples = collectives.all_reduce_sum_(both.sum(2)).clamp_min(1)
    pairs = sum(v.name != t.name for v in student for t in teacher)
    return collectives.world_size() * both / (samples[:, :, None] * pairs)


@torch.no_grad()
def token_pairs(student: list[View], teacher: list[TeacherView], shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's token that each student token is compared with in each view, and weights; both [N, M].

    Args:
        shares: what `pair_shares` returned; the valid tokens of a view divide it evenly.
    """
    first, firsts = 0, []
    for t in teacher:
        firsts.append(first)
        first += t.valid.numel()
    matches, weights = [], []
    for v, view in enumerate(student):
        features = unit(view.tokens.detach().flatten(0, 1)).view_as(view.tokens)
        own = view.valid.to(shares.dtype) / view.valid.sum(1, keepdim=True).clamp_min(1)  # [B, T]
        columns = []
        for t, start in zip(teacher, firsts, strict=True):
            assert t.tokens is not None
            similarity = features @ t.tokens.to(features.dtype).transpose(1, 2)  # [B, T, T of the teacher]
            nearest = similarity.masked_fill(~t.valid[:, None], -torch.inf).argmax(2)
            of_sample = t.valid.shape[1] * torch.arange(len(nearest), device=nearest.device)
            columns.append((start + of_sample[:, None] + nearest).flatten())
        matches.append(torch.stack(columns, 1))
        weights.append((own[:, :, None] * shares[v].t()[:, None]).flatten(0, 1))
    return torch.cat(matches), torch.cat(weights)


def _mean(z: Tensor, present: Tensor) -> Tensor:
    """Return what a centre observes of the rows z [n, D] that are there; its mean over ranks is that of all of them."""
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    weight = present.to(wide.dtype)
    count = collectives.all_reduce_sum_(weight.sum()).clamp_min(1)
    return collectives.world_size() * (weight @ wide) / count
