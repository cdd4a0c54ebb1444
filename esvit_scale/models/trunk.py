"""What every trunk is: crops of any sizes in, one list of features out. The objective never asks which trunk it is."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

Grid = tuple[int, int, int]  # (crops, H, W)


class Features(NamedTuple):
    """What a trunk returns for a multi-crop batch."""

    view: Tensor  # [ΣB, C] pooled, crops in order
    regions: Tensor  # [ΣB·T, C] region tokens after the final norm, crops in order, each row-major
    grids: list[Grid]  # per resolution group; (crops, 0, 0) from a trunk without regions


class TokenMap(NamedTuple):
    """The output of one block."""

    tokens: Tensor  # [ΣB·T, C], crops in order, each row-major
    grids: list[Grid]
    view: Tensor | None = None  # [ΣB, C] what stands for the crop; None: the mean of its tokens


class Trunk(nn.Module):
    """A trunk calls each of its layers once a forward, with all crops: ZeRO-3 gathers a layer for each call, and
    reentrant activation checkpointing allows one only. Where a library's network must run once per resolution, its
    blocks take the list of maps.

    Attributes:
        dim: C of the features.
        in_chans: channels of the images, `data.channels`.
        depths: blocks per stage.
        channels, reductions: of every stage's map, its width and the pixels a cell covers; empty: no pyramid.
        has_regions: whether `Features.regions` has any rows.
        norm: the final norm, of tokens [n, C]; an identity where there is none.
        run_block: how a block is called: parallel.activation_checkpointing puts a checkpointing call here. The first
            argument after the block is the tensor (or the tuple of tensors) to keep.
    """

    dim: int
    in_chans: int = 3
    norm: nn.Module
    depths: tuple[int, ...]
    channels: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()
    has_regions = True

    def __init__(self) -> None:
        super().__init__()
        self.run_block: Callable[..., Any] = call

    @property
    def blocks(self) -> list[nn.Module]:
        """In order; the units of activation checkpointing and compilation."""
        raise NotImplementedError

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        raise NotImplementedError

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None) -> Features:
        """
        Args:
            crops: one tensor per resolution group, [N_g, in_chans, S_g, S_g], normalised pixels.
            drop_keys: int64 [ΣN_g], one key per crop image (`models.drop_path.drop_keys`); None: every branch is kept.
        """
        raise NotImplementedError

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """The token map of every block, in order, before the final norm."""
        raise NotImplementedError

    def last_blocks(self, crops: list[Tensor], n: int) -> list[TokenMap]:
        """Token maps of the last n blocks, in order; those of the last stage after the final norm."""
        last_stage = sum(self.depths[:-1])
        maps = deque(enumerate(self.block_maps(crops)), maxlen=n)
        return [self._normed(found) if i >= last_stage else found for i, found in maps]

    def stage_maps(self, crops: list[Tensor]) -> list[TokenMap]:
        """The token map of every stage's last block, before the final norm: what a feature pyramid is made of."""
        ends = {sum(self.depths[: s + 1]) - 1 for s in range(len(self.depths))}
        return [found for i, found in enumerate(self.block_maps(crops)) if i in ends]

    def _normed(self, found: TokenMap) -> TokenMap:
        view = None if found.view is None else self.norm(found.view)
        return TokenMap(self.norm(found.tokens), found.grids, view)


def call(block: nn.Module, *args: Any) -> Any:
    return block(*args)
