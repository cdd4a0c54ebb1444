"""The parts of sparse trunks: the network that scores tokens, the choice of tokens, and attention among the kept ones.

DynamicViT (Rao et al. 2021) prunes tokens in stages. In training, a stage draws for every token whether it is kept, and
pruned tokens are hidden by masks, through which gradients reach the scores. At inference, a stage keeps a fixed number of
tokens, those with the highest scores, and the others are no longer computed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.models.descriptions import TrunkCard
from esvit_scale.models.drop_path import draw_of
from esvit_scale.models.tokens import groups
from esvit_scale.models.trunk import Grid

# Largest logarithm of how much more weight than the kept tokens a pruned one would have had, in gradients. DynamicViT
# bounds the same ratio by the ε = 10⁻⁶ that it adds to the sum of the weights.
LARGEST_EXCESS = math.log(1e6)
_FIRST_DRAW = 1 << 32  # of `draw_of`, above the draws of masks (models/masking.py)
_CHOICES = 1 << 23  # so that (draw + ½) / choices is neither 0 nor 1 in fp32


class KeepPredictor(nn.Module):
    """The network that scores tokens, from what each one holds and from the mean of the tokens that were kept so far."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own_width = dim // 2
        self.norm = nn.LayerNorm(dim)
        self.mix = nn.Linear(dim, dim)
        self.narrow = nn.Linear(dim, self.own_width)
        self.narrower = nn.Linear(self.own_width, max(1, dim // 4))
        self.logits = nn.Linear(max(1, dim // 4), 2)

    def forward(self, tokens: Tensor, grids: Sequence[Grid], kept: Tensor | None = None) -> Tensor:
        """Return log p(keep) − log p(prune) of tokens [N, C], in fp32 or wider: [N].

        Args:
            grids: (crops, H, W) of every resolution; (crops, 1, tokens) if a crop's tokens form no map.
            kept: [N], 1 for tokens that the mean is over and 0 for others; None: all tokens.
        """
        x = F.gelu(self.mix(self.norm(tokens)))  # [N, C]
        own, shared = x.split([self.own_width, x.shape[1] - self.own_width], 1)
        weights = None if kept is None else kept[:, None].to(x.dtype)
        means = []
        for (group, (n, h, w)), of_group in zip(
            groups(shared, grids), _like(weights, grids), strict=True
        ):  # [n·h·w, C/2]
            group = group.view(n, h * w, -1)
            if of_group is None:
                mean = group.mean(1, keepdim=True)
            else:
                of_group = of_group.view(n, h * w, 1)
                mean = (group * of_group).sum(1, keepdim=True) / of_group.sum(1, keepdim=True).clamp(min=1)
            means.append(mean.expand(n, h * w, -1).reshape(n * h * w, -1))
        x = self.narrower(F.gelu(self.narrow(torch.cat([own, torch.cat(means)], 1))))
        keep, prune = self.logits(F.gelu(x)).to(_wide(x)).unbind(1)
        return keep - prune


def _like(weights: Tensor | None, grids: Sequence[Grid]) -> Sequence[Tensor | None]:
    """Return the weights [N, 1] of each resolution's tokens; None for each without weights."""
    return [None] * len(grids) if weights is None else [group for group, _ in groups(weights, grids)]


def draw_kept(scores: Tensor, keys: Tensor, stage: int, grids: Sequence[Grid]) -> Tensor:
    """Draw for every token whether it is kept, with probability sigmoid(score): 1 or 0, [N].

    This is Gumbel-softmax over the two choices at temperature 1, hard with a straight-through gradient, that of
    sigmoid(score + noise); the difference of two Gumbel variables is a logistic one. The noise is a hash of the crop's drop
    key, the pruning stage and the token, so that it does not depend on the rank or on the rest of the batch.

    Args:
        scores: [N], from `KeepPredictor`.
        keys: int64 [crops], `drop_path.drop_keys`.
        stage: index of the pruning stage.
        grids: (crops, H, W) of every resolution.
    """
    soft = (scores + logistic_noise(keys, stage, grids).to(scores.dtype)).sigmoid()
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


@torch.no_grad()
def logistic_noise(keys: Tensor, stage: int, grids: Sequence[Grid]) -> Tensor:
    """Return a draw of the logistic distribution for every token, float32 [N]; arguments as in `draw_kept`."""
    found = []
    for of_group, (_, h, w) in zip(keys.split([n for n, _, _ in grids]), grids, strict=True):
        token = torch.arange(h * w, device=keys.device)
        draws = draw_of(of_group[:, None], _FIRST_DRAW + (stage << 24) + token, _CHOICES)  # [n, h·w]
        found.append(((draws.float() + 0.5) / _CHOICES).logit().flatten())
    return torch.cat(found)


def count_kept(ratio: float, tokens: int) -> int:
    """Return how many of a crop's tokens a pruning stage keeps at inference: ⌊ratio · tokens⌋, but one at least."""
    return max(1, math.floor(ratio * tokens + 1e-6))


def ranked(scores: Tensor) -> Tensor:
    """Return the indices of each row of scores [n, T], the highest score first; of equal scores, the lower index first.

    An exporter gets topk, because ONNX has no stable sort; its own TopK orders equal values by their index.
    """
    if torch.compiler.is_exporting():
        return scores.topk(scores.shape[1], dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)


def highest(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k highest scores of each row of [n, T], ascending: int64 [n, k]; ties as in `ranked`."""
    return ranked(scores)[:, :k].sort(dim=1).values


def attend_to_kept(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Return attention in which every token sees the kept tokens and itself, [n, heads, L, d].

    A kept token's result is that of attention among the kept tokens alone. The weights exp(score) · mask are relative to
    the highest score that a token sees: relative to the highest of all, those of all tokens that it sees could vanish,
    which would be 0 / 0.

    Args:
        q, k, v: [n, heads, L, d].
        kept: [n, L], 1 for a kept token and 0 for a pruned one; it gets a gradient.
    """
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).to(_wide(q))  # [n, heads, L, L]
    own = torch.eye(kept.shape[1], dtype=kept.dtype, device=kept.device)
    seen = (kept[:, None, None, :] * (1 - own) + own).to(scores.dtype)  # [n, 1, L, L]
    highest_seen = scores.detach().masked_fill(seen.detach() == 0, -math.inf).amax(-1, keepdim=True)
    weights = (scores - highest_seen).clamp(max=LARGEST_EXCESS).exp() * seen
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def card_of_pruning(card: TrunkCard, ratios: Sequence[float]) -> TrunkCard:
    """Return a trunk's card with the fractions of tokens that its pruning stages keep."""
    percent = ", ".join(f"{100 * ratio:.3g} %" for ratio in ratios)
    return card._replace(description=f"{card.description}, which keeps {percent} of the tokens in turn")
