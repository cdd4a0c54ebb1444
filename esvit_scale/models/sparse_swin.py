"""Swin whose third stage prunes tokens (DynamicSwin, Rao et al. 2023): pruned tokens keep their place on the map.

All tokens take part in window attention, whose windows stay full. What a pruned token is spared is the block's MLP, in
whose place it takes a norm and one linear layer. Every pruning stage decides anew about all tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from esvit_scale.errors import UserError
from esvit_scale.models.block_parts import add_branch
from esvit_scale.models.descriptions import DetectorForm, HuggingFaceForm, TimmForm, TrunkCard
from esvit_scale.models.masking import Mask
from esvit_scale.models.sparse_parts import KeepPredictor, card_of_pruning, count_kept, draw_kept, ranked
from esvit_scale.models.swin import NORM_EPS, Block, BlockInputs, Swin
from esvit_scale.models.swin_plain import PlainSwin
from esvit_scale.models.tokens import crop_means
from esvit_scale.models.trunk import Features, Kept
from esvit_scale.models.windows import Grids, WindowPlan, storage_plan, window_reverse

STAGE = 2  # index of the stage that prunes
PUBLISHED = (0.7, 0.5, 0.3)  # fractions of the tokens that the published DynamicSwins keep, by their code


def places(depth: int) -> tuple[int, ...]:
    """Return before which of the stage's `depth` blocks tokens are pruned: 1, 2 and 3 of 6, 2, 4 and 6 of 18."""
    step = max(1, depth // 9)
    return tuple(place for place in (step, 2 * step, 3 * step) if place < depth)


class SparseSwin(Swin):
    """A Swin V1 trunk whose third stage prunes; it has the parameters of `Swin`, predictors and short MLPs.

    Args:
        embed_dim, depths, heads, window, size, drop_path: as for `Swin`.
        keep: fraction of the tokens that the first pruning stage keeps; the others follow in the published proportion.

    Raises:
        UserError: there is no third stage, or it has a single block.
    """

    has_ladder = False

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        size: int = 224,
        drop_path: float = 0.0,
        keep: float = 0.7,
    ) -> None:
        if len(depths) <= STAGE or depths[STAGE] < 2:
            raise UserError(f"model.depths: {list(depths)} has no third stage of two blocks or more, which would prune")
        self.first = sum(depths[:STAGE])  # index of the stage's first block
        self.places = places(depths[STAGE])
        super().__init__(embed_dim, depths, heads, window, size, drop_path)
        self.ratios = tuple(keep * ratio / PUBLISHED[0] for ratio in PUBLISHED[: len(self.places)])
        self.predictors = nn.ModuleList(KeepPredictor(embed_dim * 2**STAGE) for _ in self.places)
        short = [i for i in range(depths[STAGE]) if i >= self.places[0]]
        self.added = ("predictors.", *(f"layers.{STAGE}.blocks.{i}.short." for i in short))

    def make_block(self, stage: int, index: int, dim: int, heads: int, window: int) -> nn.Module:
        """Return a new block: one with two MLPs from the first pruning on."""
        if stage == STAGE and index >= self.places[0]:
            return SparseSwinBlock(dim, heads, window)
        return super().make_block(stage, index, dim, heads, window)

    def formulas(self) -> None:  # type: ignore[override]
        """Return None: the costs are counted by running the trunk."""
        return None

    def card(self) -> TrunkCard:
        """Return what a model card says about the trunk."""
        return card_of_pruning(super().card(), self.ratios)

    def timm_form(self, size: int) -> TimmForm | None:  # type: ignore[override]
        """Return None: timm has no network that prunes tokens."""
        return None

    def huggingface_form(self, size: int) -> HuggingFaceForm | None:  # type: ignore[override]
        """Return None: transformers has no network that prunes tokens."""
        return None

    def detector_form(self, library: str) -> DetectorForm | None:  # type: ignore[override]
        """Return None: these libraries have no network that prunes tokens."""
        return None

    def plain(self, size: int) -> nn.Module:
        """Return a module for exporters with the same weights, and constant index tables for images of one size."""
        return PlainSparseSwin(self, size)

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None, mask: Mask | None = None) -> Features:
        """Compute the features of all crops (`Trunk.forward`); drop keys also decide which tokens are kept."""
        pruning = _Pruning(self, drop_keys)
        *_, (tokens, grids, window) = self._block_outputs(crops, drop_keys, mask, pruning)
        regions = window_reverse(self.norm(tokens), storage_plan(grids, window, tokens.device))
        return Features(crop_means(regions, grids), regions, list(grids), kept=pruning.kept())

    def block_inputs(self, drop_keys: Tensor | None) -> BlockInputs:
        """Return the function that decides about tokens and tells the blocks."""
        return _Pruning(self, drop_keys)


class _Pruning:
    """The pruning of one forward: called before each block, it returns the block's inputs after the drop factors.

    With drop keys these are the weights of the two MLPs' results; without, the rows of tokens for either of them.
    """

    def __init__(self, trunk: SparseSwin, drop_keys: Tensor | None) -> None:
        self.trunk, self.keys = trunk, drop_keys
        self.masks: list[Tensor] = []  # of `Kept`, in the stage's storage order
        self.grids: Grids = ()
        self.inputs: tuple[Tensor | None, ...] = ()

    def __call__(self, i: int, tokens: Tensor, grids: Grids) -> tuple[Tensor | None, ...]:
        index = i - self.trunk.first
        if not self.trunk.places[0] <= index < self.trunk.depths[STAGE]:
            return ()
        if index in self.trunk.places:
            stage = self.trunk.places.index(index)
            scores = self.trunk.predictors[stage](tokens, grids)
            if self.keys is None:
                self._choose(scores, grids, self.trunk.ratios[stage])
            else:
                self.masks.append(draw_kept(scores, self.keys, stage, grids))
                self.inputs = (self.masks[-1],)
            self.grids = grids
        return self.inputs

    def _choose(self, scores: Tensor, grids: Grids, ratio: float) -> None:
        kept, pruned, start = [], [], 0
        for group, (n, h, w) in zip(scores.split([n * h * w for n, h, w in grids]), grids, strict=True):
            k = count_kept(ratio, h * w)
            order = ranked(group.view(n, h * w))
            rows = order + start + torch.arange(n, device=order.device)[:, None] * h * w
            kept.append(rows[:, :k].flatten())
            pruned.append(rows[:, k:].flatten())
            start += n * h * w
        self.inputs = (None, torch.cat(kept), torch.cat(pruned))
        self.masks.append(torch.zeros_like(scores).index_fill(0, torch.cat(kept), 1.0))

    def kept(self) -> Kept:
        """Return the masks of all pruning stages, row-major."""
        side = self.trunk.stages[STAGE].window
        plan = storage_plan(self.grids, side, self.masks[0].device)
        masks = [window_reverse(mask[:, None], plan)[:, 0] for mask in self.masks]
        return Kept(masks, list(self.grids), self.trunk.ratios)


class SparseSwinBlock(Block):
    """A block with two MLPs: its own for kept tokens, and a short one, a norm and a linear layer, for pruned tokens."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__(dim, heads, window)
        self.mlp.fc2.ends_block = False  # the gradient of the weights needs its result
        self.short = ShortMlp(dim)

    def forward(
        self,
        tokens: Tensor,
        plan: WindowPlan,
        keep_attn: Tensor | None,
        keep_mlp: Tensor | None,
        weight: Tensor | None = None,
        kept: Tensor | None = None,
        pruned: Tensor | None = None,
    ) -> Tensor:
        """Map tokens [N, C] to [N, C], as `Block` does.

        Args:
            weight: [N], in training: 1 for tokens that take the block's own MLP, 0 for those that take the short one.
            kept, pruned: int64, at inference: the rows of tokens for the two MLPs.
        """
        tokens = add_branch(tokens, self.attn(self.norm1(tokens), plan), keep_attn)
        if kept is not None and pruned is not None:
            own, short = tokens.index_select(0, kept), tokens.index_select(0, pruned)
            branch = torch.zeros_like(tokens).index_copy(0, kept, self.mlp(self.norm2(own)))
            branch = branch.index_copy(0, pruned, self.short(short))
        else:
            assert weight is not None
            share = weight[:, None].to(tokens.dtype)
            branch = share * self.mlp(self.norm2(tokens)) + (1 - share) * self.short(tokens)
        return add_branch(tokens, branch, keep_mlp)


class PlainSparseSwin(PlainSwin):
    """A sparse Swin for exporters: `PlainSwin`, whose third stage prunes."""

    def __init__(self, trunk: SparseSwin, size: int) -> None:
        super().__init__(trunk, size)
        self.predictors, self.places, self.ratios = trunk.predictors, trunk.places, trunk.ratios

    def run_stage(self, index: int, tokens: Tensor) -> Tensor:
        """Map the tokens [B, T, C] of a stage to those of the next one."""
        if index != STAGE:
            return super().run_stage(index, tokens)
        stage: Any = self.stages[index]
        order, k = None, 0
        for i, block in enumerate(stage.blocks):
            if i in self.places:
                s, (n, length, _) = self.places.index(i), tokens.shape
                scores = self.predictors[s](tokens.flatten(0, 1), [(n, 1, length)]).view(n, length)
                order, k = ranked(scores), count_kept(self.ratios[s], length)
            tokens = block(tokens) if order is None else _plain_block(block, tokens, order[:, :k], order[:, k:])
        return stage.merging(tokens)


def _plain_block(plain: Any, tokens: Tensor, kept: Tensor, pruned: Tensor) -> Tensor:
    """Compute a `SparseSwinBlock` in its plain form on tokens [B, T, C], given the tokens for its two MLPs."""
    block = cast(SparseSwinBlock, plain.block)
    tokens = tokens + plain.attention(block.norm1(tokens))
    kept, pruned = (rows[:, :, None].expand(-1, -1, tokens.shape[2]) for rows in (kept, pruned))
    branch = torch.zeros_like(tokens).scatter(1, kept, block.mlp(block.norm2(tokens.gather(1, kept))))
    return tokens + branch.scatter(1, pruned, block.short(tokens.gather(1, pruned)))


class ShortMlp(nn.Module):
    """What a pruned token takes in place of an MLP: a layer norm and a linear layer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.linear = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens [N, C] to [N, C]."""
        return self.linear(self.norm(tokens))
