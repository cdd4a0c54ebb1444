"""VATT's objective (Akbari et al. 2021): contrastive losses between modalities of a sample. No teacher.

    L = mean over pairs (a, b) of modalities of NCE(a, b), which is MIL-NCE (Miech et al. 2020) if b is text
    NCE(a, b) = mean over samples i of −log( Σ_{P(i)} exp(x·y/τ) / Σ_{P(i) ∪ N(i)} exp(x·y/τ) )

x and y are unit vectors. P(i) are the pairs of sample i: one view of a with one view of b, or with all views of its text,
of which one may fit better than another. N(i) are the pairs of sample i's a with the b of all other samples of the
global batch, and the other way round. Each pair of views of a and b has its own loss, and their mean counts.

The pairs come in an order of common spaces. Images, videos and audio are projected into a first space, where they are
compared with each other. Text is coarser: it is compared in a second space, into which the vectors of the first space are
projected. The published projections have batch norms; ours have none, since samples that lack a modality would enter
their statistics.

A sample takes part in the pairs whose two modalities it has. The mean is over these samples, of all ranks; a pair of
modalities that no sample has gives 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.descriptions import ObjectiveCard
from esvit_scale.models.trunk import Features
from esvit_scale.objective.objective import Logs, Objective, fixed_precision, unit
from esvit_scale.parallel import collectives

MODALITIES = ("image", "video", "audio", "text")


class Views(NamedTuple):
    """The vectors of one modality in one common space."""

    z: Tensor  # [V, B, D] unit rows
    present: Tensor  # bool [V, B]


class VATT(Objective):
    """VATT's objective: projections into the common spaces, and the losses of pairs of modalities."""

    multi_crop = False
    has_teacher = False
    takes_signals = True
    image_views = (1, 2)

    def __init__(self, dim: int, config: configs.Objective) -> None:
        """Build the projections for trunk features of width `dim`.

        The first space has `head_hidden` dimensions, the second `bottleneck`.

        Raises:
            UserError: `pairs` names no pair, or what is none.
        """
        super().__init__()
        self.pairs = [_pair(name) for name in config.pairs]
        if not self.pairs:
            raise UserError("objective.pairs: vatt needs at least one pair of modalities, such as image-audio")
        self.temp = config.student_temp
        self.modalities = tuple(sorted({name for pair in self.pairs for name in pair}, key=MODALITIES.index))
        first, second = config.head_hidden, config.bottleneck
        self.first = nn.ModuleDict(
            {
                name: nn.Linear(dim, first) if name == "audio" else VisualProjection(dim, first)
                for name in self.modalities
                if name != "text"
            }
        )
        self.second = nn.Linear(first, second) if "text" in self.modalities else None
        self.text = nn.Linear(dim, second) if "text" in self.modalities else None

    def forward(self, student: Features, targets: None, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the loss of all pairs.

        It logs for every pair, such as image-text, loss_image_text and accuracy_image_text: how often the nearest
        of all ranks' views of the second modality is one of the sample's own.
        """
        assert student.has_image is not None
        present = self._present(student)
        samples = len(student.has_image)
        first, second = self.spaces(_views(student))
        terms: list[Tensor] = []
        logs: Logs = {}
        for a, b in self.pairs:
            space = second if "text" in (a, b) else first
            x, y = (Views(space[m].unflatten(0, (-1, samples)), present[m].view(-1, samples)) for m in (a, b))
            loss, accuracy = pair_loss(x, y, self.temp, many=b == "text")
            terms.append(loss)
            logs |= {f"loss_{a}_{b}": loss.detach(), f"accuracy_{a}_{b}": accuracy}
        loss = torch.stack(terms).mean()
        if "image" not in self.modalities:
            loss = (
                loss + 0.0 * student.view.sum()
            )  # so that every parameter has a gradient, as every ZeRO stage expects
        return loss, logs

    def spaces(self, views: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the unit vectors of view features [n, C] in the first space and in the second, by modality.

        Text is in the second space alone; without text there is no second.
        """
        first = {name: self.first[name](views[name]) for name in self.first if name in views}
        second: dict[str, Tensor] = {}
        if self.second is not None and self.text is not None:
            joined = self.second(F.relu(torch.cat([*first.values()]))) if first else None
            if joined is not None:
                second = dict(zip(first, joined.split([len(z) for z in first.values()]), strict=True))
            if "text" in views:
                second["text"] = self.text(views["text"])
        return {k: unit(z) for k, z in first.items()}, {k: unit(z) for k, z in second.items()}

    def comparable(self, views: dict[str, Tensor], a: str, b: str) -> tuple[Tensor, Tensor] | None:
        """Return unit vectors of modalities a and b that can be compared, [n, D] each, given view features [n, C].

        It is None if the objective has learned no projection of one of them.
        """
        first, second = self.spaces(views)
        for space in (first, second):
            if a in space and b in space:
                return space[a], space[b]
        return None

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        pairs = ", ".join(f"{a}-{b}" for a, b in self.pairs)
        paper = "Akbari et al., *VATT: Transformers for Multimodal Self-Supervised Learning*, NeurIPS 2021."
        return ObjectiveCard("VATT's contrastive losses between modalities", (("pairs", pairs),), paper)

    @staticmethod
    def _present(student: Features) -> dict[str, Tensor]:
        """Return which views of every modality are there, bool [V · B]."""
        assert student.has_image is not None
        crops = len(student.view) // len(student.has_image)
        return {"image": student.has_image.repeat(crops)} | {k: s.present for k, s in student.signals.items()}


class VisualProjection(nn.Module):
    """Linear LN ReLU Linear, from the trunk's features to the first common space."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, out)
        self.norm = nn.LayerNorm(out)
        self.out = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [n, C] to [n, D]."""
        hidden: Tensor = self.out(F.relu(self.norm(self.hidden(x))))
        return hidden


def pair_loss(a: Views, b: Views, temp: float, many: bool) -> tuple[Tensor, Tensor]:
    """Return the loss of a pair of modalities, and how often the nearest view of b is the sample's own.

    Args:
        a, b: this rank's views; the loss is over those of all ranks.
        temp: τ.
        many: whether all views of b of a sample are its positives at once (MIL-NCE), or each in a loss of its own.
    """
    sides = [b] if many else [Views(b.z[v : v + 1], b.present[v : v + 1]) for v in range(len(b.z))]
    found = [_mil_nce(a.z[v], a.present[v], side, temp) for v in range(len(a.z)) for side in sides]
    losses, accuracies = (torch.stack(column).mean() for column in zip(*found, strict=True))
    return losses, accuracies


def _mil_nce(x: Tensor, has_x: Tensor, b: Views, temp: float) -> tuple[Tensor, Tensor]:
    """Return the loss of one view of a, [B, D], against all views of b, and the accuracy."""
    world, samples = collectives.world_size(), len(x)
    y, has_y = b.z.transpose(0, 1), b.present.t()  # [B, K, D], [B, K]
    with fixed_precision(x.device):
        all_x, all_y = collectives.gather_rows(x), collectives.gather_rows(y.contiguous())
        all_has_x, all_has_y = (collectives.gather_rows(has.to(x.dtype).contiguous()) > 0 for has in (has_x, has_y))
        rows = torch.einsum("id,jkd->ijk", x, all_y) / temp  # own a with every b
        columns = torch.einsum("jd,ikd->ijk", all_x, y) / temp  # every a with own b
        every = torch.arange(world * samples, device=x.device)
        own = every == (collectives.rank() * samples + torch.arange(samples, device=x.device))[:, None]  # [B, W·B]
        there = has_x & has_y.any(1)  # samples whose loss counts
        others = all_has_x[None, :, None] & has_y[:, None, :] & ~own[:, :, None]
        candidates = torch.cat([all_has_y.expand(samples, -1, -1), others], 1).flatten(1)
        scores = torch.cat([rows, columns], 1).flatten(1)
        positive = F.pad(own[:, :, None] & all_has_y, (0, 0, 0, len(every))).flatten(1)
        # Samples that do not count keep finite scores, and weigh nothing.
        free = ~there[:, None]
        losses = _log_sum(scores, candidates | free) - _log_sum(scores, positive | free)
        count = collectives.all_reduce_sum_(there.sum().to(x.dtype)).clamp_min(1)
        share = world * there / count  # the mean over ranks is the mean over samples
        with torch.no_grad():
            best = scores.masked_fill(~candidates, -torch.inf)[:, : rows[0].numel()].argmax(1)
            right = positive.gather(1, best[:, None])[:, 0]
            accuracy = (right * share).sum()
        return (losses * share).sum(), accuracy


def _log_sum(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf).logsumexp(1)


def _views(features: Features) -> dict[str, Tensor]:
    """Return the view features [n, C] of every modality."""
    return {"image": features.view} | {name: signal.view for name, signal in features.signals.items()}


def _pair(name: str) -> tuple[str, str]:
    a, _, b = name.partition("-")
    if a not in MODALITIES or b not in MODALITIES or a == b:
        raise UserError(
            f"objective.pairs: {name!r} is no pair of modalities; write two of {', '.join(MODALITIES)}, such as image-text"
        )
    return (b, a) if a == "text" else (a, b)
