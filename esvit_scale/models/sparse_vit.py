"""Plain vision transformers that prune tokens after each quarter of their blocks (DynamicViT, Rao et al. 2021).

With drop keys, as in training, tokens are drawn and masked. Without, as at inference, the tokens with the highest scores
stay and the others are not computed any further: a pruned token's region feature is its value when it was pruned, after
the final norm. Class token and registers are never pruned.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from esvit_scale.models.attention_maps import BlockAttention, before_forward
from esvit_scale.models.block_parts import add_branch
from esvit_scale.models.descriptions import TimmForm, TrunkCard
from esvit_scale.models.drop_path import keep_scales, token_factors
from esvit_scale.models.masking import Mask
from esvit_scale.models.sparse_parts import (
    KeepPredictor,
    attend_to_kept,
    card_of_pruning,
    count_kept,
    draw_kept,
    highest,
)
from esvit_scale.models.trunk import Features, Grid, Kept
from esvit_scale.models.vit import PATCH, Attention, Block, MoCoViT, ViT
from esvit_scale.models.windows import Grids


def places(depth: int) -> tuple[int, ...]:
    """Return before which of `depth` blocks tokens are pruned, counted from 0: 3, 6 and 9 of 12."""
    return tuple(sorted({place for i in (1, 2, 3) if (place := max(1, round(i * depth / 4))) < depth}))


class SparseViT(ViT):
    """A DeiT trunk that prunes tokens; it has the parameters of `ViT`, and predictors.

    Args:
        embed_dim, depth, heads, drop_path, registers: as for `ViT`.
        keep: fraction of the tokens it is given that a pruning stage keeps; of all, stage s (from 1) keeps keepˢ.
    """

    added = ("predictors.",)
    has_attention_maps = True

    def __init__(
        self, embed_dim: int, depth: int, heads: int, drop_path: float = 0.0, registers: int = 0, keep: float = 0.7
    ) -> None:
        super().__init__(embed_dim, depth, heads, drop_path, registers)
        self.places = places(depth)
        self.ratios = tuple(keep ** (s + 1) for s in range(len(self.places)))
        self.predictors = nn.ModuleList(KeepPredictor(embed_dim) for _ in self.places)

    def make_block(self, dim: int, heads: int) -> nn.Module:
        """Return a new block, which can hide pruned tokens from the others."""
        return SparseBlock(dim, heads)

    def card(self) -> TrunkCard:
        """Return what a model card says about the trunk."""
        return card_of_pruning(super().card(), self.ratios)

    def timm_form(self, size: int) -> TimmForm:
        """Return a description of the trunk as a network that models/sparse_timm.py registers in timm.

        Raises:
            UserError: as `ViT.timm_form`.
        """
        form = super().timm_form(size)
        arguments = form.arguments | {"keep": self.ratios[0]}
        module = "esvit_scale.models.sparse_timm"
        note = f"timm itself has no network that prunes tokens; importing `{module}` registers it."
        return form._replace(architecture="esvit_sparse_vit", arguments=arguments, imports=module, note=note)

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None, mask: Mask | None = None) -> Features:
        """Compute the features of all crops (`Trunk.forward`); drop keys also decide which tokens are kept."""
        pruning = self._pruning(crops, drop_keys)
        *_, (tokens, grids) = self._block_outputs(crops, drop_keys, mask, pruning)
        regions, _, view = self._token_map(self.norm(tokens), grids)
        return Features(cast(Tensor, view), regions, grids, kept=Kept(pruning.masks, grids, self.ratios))

    @torch.no_grad()
    def attention_maps(self, image: Tensor) -> list[BlockAttention]:
        """Return every block's attention on one normalised image [channels, H, W], of the tokens that it computes.

        The tokens of a block are one window; class token and registers have the cell −1.
        """
        pruning = self._pruning([image[None]], None)
        [(_, h, w)] = pruning.grids
        cells = torch.cat([torch.full((pruning.before,), -1), torch.arange(h * w)]).to(image.device)
        found: list[BlockAttention] = []

        def record(module: MaskedAttention, inputs: tuple[Tensor, Grids]) -> None:
            q, k, _ = module.heads_of(module.qkv(inputs[0]), 1, len(inputs[0]))
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            there = cells if pruning.rows is None else cells[pruning.rows]
            found.append(BlockAttention(0, len(found), (h, w), scores.softmax(-1).cpu(), there[None].cpu()))

        with before_forward([cast(SparseBlock, block).attn for block in self.blocks], record):
            for _ in self._block_outputs([image[None]], None, pruning=pruning):
                pass
        return found

    def _pruning(self, crops: list[Tensor], drop_keys: Tensor | None) -> "Pruning":
        grids = [(x.shape[0], -(-x.shape[-2] // PATCH), -(-x.shape[-1] // PATCH)) for x in crops]
        before = 1 + self.registers
        return DroppedTokens(grids, before) if drop_keys is None else MaskedTokens(grids, before, drop_keys)

    def _block_outputs(
        self,
        crops: list[Tensor],
        drop_keys: Tensor | None,
        mask: Mask | None = None,
        pruning: "Pruning | None" = None,
    ) -> Iterator[tuple[Tensor, list[Grid]]]:
        """Yield (tokens, grids) after each block, as `ViT` does; pruned tokens have the values they were pruned with."""
        pruning = pruning or self._pruning(crops, drop_keys)
        tokens = self._embed(crops, pruning.grids, mask)
        scales = keep_scales(drop_keys, torch.tensor(self.drop_rates)) if drop_keys is not None else None
        for i, block in enumerate(self.blocks):
            if i in self.places:
                stage = self.places.index(i)
                tokens = pruning.prune(tokens, stage, self.predictors[stage], self.ratios[stage])
            keep = token_factors(scales, self.drop_rates, i, pruning.sequences, tokens.dtype)
            seen = [] if pruning.seen is None else [pruning.seen]
            tokens = self.run_block(block, tokens, pruning.sequences, *keep, *seen)
            yield pruning.all_tokens(tokens), pruning.grids


class SparseMoCoViT(SparseViT, MoCoViT):
    """MoCo v3's vision transformer that prunes tokens."""


class Pruning:
    """The pruning of tokens in one forward.

    Attributes:
        grids: (crops, H, W) of the patches of every resolution.
        before: number of tokens in front of each crop's patches, which are never pruned.
        sequences: (crops, 1, tokens that are computed) for each resolution.
        rows: of all tokens, the places of those that are computed; None: all.
        seen: [N], 1 for tokens that others see and 0 for others; None: all are seen.
        masks: those of `Kept`.
    """

    def __init__(self, grids: list[Grid], before: int) -> None:
        self.grids, self.before = grids, before
        self.whole: Grids = tuple((n, 1, before + h * w) for n, h, w in grids)
        self.sequences = self.whole
        self.rows: Tensor | None = None
        self.seen: Tensor | None = None
        self.masks: list[Tensor] = []

    def prune(self, tokens: Tensor, stage: int, predictor: nn.Module, ratio: float) -> Tensor:
        """Decide which tokens [N, C] are kept, and return those that are computed from now on."""
        raise NotImplementedError

    def all_tokens(self, tokens: Tensor) -> Tensor:
        """Return the tokens that are computed together with those that no longer are, in their places."""
        return tokens


class MaskedTokens(Pruning):
    """Pruning in training: tokens are drawn, and pruned ones are computed on, but seen by themselves alone.

    Args:
        keys: int64 [crops], `drop_path.drop_keys`.
    """

    def __init__(self, grids: list[Grid], before: int, keys: Tensor) -> None:
        super().__init__(grids, before)
        self.keys = keys

    def prune(self, tokens: Tensor, stage: int, predictor: nn.Module, ratio: float) -> Tensor:
        """Draw which of the tokens that were kept so far are kept; all tokens are returned."""
        kept = self.masks[-1] if self.masks else None
        scores = predictor(patches_of(tokens, self.whole, self.before), self.grids, kept)
        drawn = draw_kept(scores, self.keys, stage, self.grids)
        self.masks.append(drawn if kept is None else drawn * kept)
        self.seen = self._with_first(self.masks[-1])
        return tokens

    def _with_first(self, mask: Tensor) -> Tensor:
        """Put ones for the tokens in front of each crop's patches into a mask of the patches."""
        parts = []
        for group, (n, h, w) in zip(mask.split([n * h * w for n, h, w in self.grids]), self.grids, strict=True):
            parts.append(torch.cat([group.new_ones(n, self.before), group.view(n, h * w)], 1).flatten())
        return torch.cat(parts)


class DroppedTokens(Pruning):
    """Pruning at inference: a fixed number of tokens stays, those with the highest scores; the rest is not computed."""

    def __init__(self, grids: list[Grid], before: int) -> None:
        super().__init__(grids, before)
        self.last: Tensor | None = None  # all tokens at the last pruning

    def prune(self, tokens: Tensor, stage: int, predictor: nn.Module, ratio: float) -> Tensor:
        """Return the tokens that stay: those in front of the patches, and the patches with the highest scores."""
        patches = [(n, 1, length - self.before) for n, _, length in self.sequences]
        scores = predictor(patches_of(tokens, self.sequences, self.before), patches)
        stay, sequences, start = [], [], 0
        of_groups = scores.split([n * length for n, _, length in patches])
        for group, (n, h, w), (_, _, there) in zip(of_groups, self.grids, patches, strict=True):
            best = highest(group.view(n, there), min(count_kept(ratio, h * w), there))  # [n, k]
            first = torch.arange(self.before, device=best.device).expand(n, -1)
            crop = torch.arange(n, device=best.device)[:, None] * (self.before + there)
            stay.append((torch.cat([first, self.before + best], 1) + crop + start).flatten())
            sequences.append((n, 1, self.before + best.shape[1]))
            start += n * (self.before + there)
        chosen = torch.cat(stay)
        self.last, self.sequences = self.all_tokens(tokens), tuple(sequences)
        self.rows = chosen if self.rows is None else self.rows[chosen]
        nothing = torch.zeros(self.last.shape[0], 1, dtype=scores.dtype, device=scores.device)
        self.masks.append(patches_of(nothing.index_fill(0, self.rows, 1.0), self.whole, self.before)[:, 0])
        return tokens.index_select(0, chosen)

    def all_tokens(self, tokens: Tensor) -> Tensor:
        """Return all tokens; pruned ones have the values that they were pruned with."""
        if self.rows is None or self.last is None:
            return tokens
        return self.last.index_copy(0, self.rows, tokens)


def patches_of(tokens: Tensor, sequences: Grids, before: int) -> Tensor:
    """Return the tokens [N, C] of packed sequences without the first `before` of each crop."""
    parts = tokens.split([n * length for n, _, length in sequences])
    return torch.cat(
        [
            group.view(n, length, -1)[:, before:].flatten(0, 1)
            for group, (n, _, length) in zip(parts, sequences, strict=True)
        ]
    )


class SparseBlock(Block):
    """A block whose attention can be restricted to the kept tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.attn = MaskedAttention(dim, heads)

    def forward(
        self,
        tokens: Tensor,
        sequences: Grids,
        keep_attn: Tensor | None,
        keep_mlp: Tensor | None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Map tokens [N, C] to [N, C], as `Block` does; `seen` [N] is that of `Pruning`."""
        tokens = add_branch(tokens, self.attn(self.norm1(tokens), sequences, seen), keep_attn)
        return add_branch(tokens, self.mlp(self.norm2(tokens)), keep_mlp)


class MaskedAttention(Attention):
    """Multi-head self-attention in which every token sees the kept tokens of its crop, and itself."""

    def forward(self, tokens: Tensor, sequences: Grids, seen: Tensor | None = None) -> Tensor:
        """Map tokens [N, C] to [N, C]; arguments as in `SparseBlock`."""
        if seen is None:
            return super().forward(tokens, sequences)
        dim, mixed = tokens.shape[1], []
        lengths = [n * length for n, _, length in sequences]
        for qkv, mask, (n, _, length) in zip(
            self.qkv(tokens).split(lengths), seen.split(lengths), sequences, strict=True
        ):
            q, k, v = self.heads_of(qkv, n, length)
            mixed.append(attend_to_kept(q, k, v, mask.view(n, length)).transpose(1, 2).reshape(n * length, dim))
        return self.proj(torch.cat(mixed))
