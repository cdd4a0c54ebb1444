"""The base class of all trunks, which map crops of any sizes to packed features.

Code outside a trunk's own files never asks which trunk it has: methods of the trunk return what `plan`, model cards,
exporters and evaluations need to know. The base class has a default for each of these methods.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esvit_scale.errors import UserError
from esvit_scale.models.attention_maps import BlockAttention
from esvit_scale.models.descriptions import (
    DetectorForm,
    HuggingFaceForm,
    PublishedWeights,
    TimmForm,
    TrunkCard,
    TrunkFormulas,
)
from esvit_scale.models.plain import PlainTrunk
from esvit_scale.models.window_attention_implementations import AttendWindows
from esvit_scale.models.windows import WindowLayout

Grid = tuple[int, int, int]  # (crops, H, W)


class SignalFeatures(NamedTuple):
    """The features of a modality beside the image: n sequences, view 0 of all samples, then view 1 of all samples, …"""

    view: Tensor  # [n, C] pooled
    tokens: Tensor  # [n, T, C] after the final norm
    valid: Tensor  # bool [n, T], False for padding
    present: Tensor  # bool [n], False where a sample lacks the modality


class Kept(NamedTuple):
    """Which tokens of all crops a sparse trunk kept, once for each of its pruning stages."""

    masks: list[Tensor]  # [ΣB·T] per pruning stage, crops in order, row-major: 1 for a kept token, 0 for a pruned one
    grids: list[Grid]  # of these tokens
    ratios: tuple[float, ...]  # fraction of a crop's tokens that each pruning stage shall keep


class Features(NamedTuple):
    """The features that a trunk returns for a multi-crop batch."""

    view: Tensor  # [ΣB, C] pooled, crops in order
    regions: Tensor  # [ΣB·T, C] region tokens after the final norm, crops in order, each row-major
    grids: list[Grid]  # per resolution group; (crops, 0, 0) from a trunk without regions
    signals: Mapping[str, SignalFeatures] = {}  # by modality; from a trunk with `modalities`
    has_image: Tensor | None = None  # bool [B], in training with signals: which samples have an image
    kept: Kept | None = None  # of a sparse trunk (models/sparse.py)


class TokenMap(NamedTuple):
    """One block's output for all crops, or one stage's."""

    tokens: Tensor  # [ΣB·T, C], crops in order, each row-major
    grids: list[Grid]
    view: Tensor | None = None  # [ΣB, C] one feature per crop; None: take the mean of its tokens


class MaskGeometry(NamedTuple):
    """How the cells of the last stage lie on the patches of a trunk whose crops can be masked (models/masking.py)."""

    width: int  # C of the tokens after the patch embedding
    patch: int  # pixels along a patch's side
    patches: int  # patches along a cell's side
    cuts_remainder: bool = False  # whether a crop's last pixels are cut off and not padded to a whole cell


class Trunk(nn.Module):
    """The base class of all trunks.

    A trunk calls each of its layers once per forward, with all crops, because ZeRO-3 gathers a layer at every call and
    reentrant activation checkpointing allows only one call. timm networks are the exception: they run once per
    resolution.

    Attributes:
        name: the trunk's name in the registry, as in `model.trunk`.
        dim: C of the features.
        in_chans: channels of the images, `data.channels`.
        depths: blocks per stage.
        channels, reductions: per stage, the width of its map and the pixels along a cell's side; empty: no pyramid.
        has_regions: whether `Features.regions` has any rows.
        registers: the number of register tokens, `model.registers`; 0 in a trunk that takes none.
        modalities: the modalities beside the image whose signals `forward` takes as a third argument.
        distance_windows: side of the windows, per stage, by which a position network scales distances; None: it has none.
        added: prefixes of the names of parameters that a trunk of the same weights may lack; a run that starts from such
            weights draws them at random, and trains them at the rate of the heads.
        norm: the final norm, of tokens [n, C]; an identity where there is none.
        has_attention_maps: whether `attention_maps` is implemented.
        has_ladder: whether the shapes of a sweep (scaling/shapes.py) are sizes of it.
        run_block: the function through which blocks are called; parallel.activation_checkpointing replaces it. The
            first argument after the block is the input that checkpointing keeps, a tensor or a tuple of tensors.
    """

    dim: int
    in_chans: int = 3
    norm: nn.Module
    depths: tuple[int, ...]
    channels: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()
    has_regions = True
    registers: int = 0
    modalities: tuple[str, ...] = ()
    distance_windows: tuple[int, ...] | None = None
    added: tuple[str, ...] = ()
    has_attention_maps = False
    has_ladder = False

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self.run_block: Callable[..., Any] = call

    # --- what every trunk defines ------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which they run: the units of activation checkpointing and compilation."""
        raise NotImplementedError

    @property
    def mask_geometry(self) -> MaskGeometry | None:
        """The geometry of masks; None: `forward` takes none, because no token is made of a patch of its own."""
        return None

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        raise NotImplementedError

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None) -> Features:
        """Compute the features of all crops.

        Args:
            crops: one tensor per resolution group, [N_g, in_chans, S_g, S_g], normalised pixels.
            drop_keys: int64 [ΣN_g], one key per crop image (`models.drop_path.drop_keys`); None: every branch is kept.
        """
        raise NotImplementedError

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the token map of every block, in order, before the final norm."""
        raise NotImplementedError

    # --- window attention that has several implementations -----------------------------------------------------------

    def use_attention(self, attend: AttendWindows) -> None:
        """Compute window attention with this implementation; trunks without `window_layouts` have nothing to change."""

    def window_layouts(self, crops: Sequence[tuple[int, int]], device: torch.device) -> list[WindowLayout]:
        """Return the layouts of the windows whose attention `use_attention` exchanges, for (number, side in pixels)
        crops; empty: there are none."""
        return []

    # --- token maps for probes and pyramids --------------------------------------------------------------------------

    def last_blocks(self, crops: list[Tensor], n: int) -> list[TokenMap]:
        """Return the token maps of the last n blocks, in order; those of the last stage after the final norm."""
        last_stage = sum(self.depths[:-1])
        maps = deque(enumerate(self.block_maps(crops)), maxlen=n)
        return [self._normed(found) if i >= last_stage else found for i, found in maps]

    def stage_maps(self, crops: list[Tensor]) -> list[TokenMap]:
        """Return the token map of every stage's last block, before the final norm, for feature pyramids."""
        ends = {sum(self.depths[: s + 1]) - 1 for s in range(len(self.depths))}
        return [found for i, found in enumerate(self.block_maps(crops)) if i in ends]

    # --- descriptions of the trunk; every method has a default -------------------------------------------------------

    def formulas(self) -> TrunkFormulas | None:
        """Return formulas for the trunk's FLOPs and activations; None: these are traced instead (models/traced.py)."""
        return None

    def card(self) -> TrunkCard:
        """Return what a model card says about the trunk."""
        depths = "-".join(map(str, self.depths))
        registers = f", {self.registers} registers" if self.registers else ""
        description = f"{self.name} (features of width {self.dim}, {depths} blocks{registers})"
        return TrunkCard(self.name, description, "Any other size works too.")

    def published(self) -> PublishedWeights:
        """Return the weights that were published under the trunk's name and come without a file.

        Raises:
            UserError: there are none.
        """
        raise UserError(f"{self.name} comes without weights; name a file or folder")

    def plain(self, size: int) -> nn.Module:
        """Return a module for exporters that shares the trunk's weights, for inference on images of one size.

        It maps images [B, channels, size, size] to view [B, C] and regions [B, T, C], or to the view alone if the trunk
        has no regions.
        """
        return PlainTrunk(self, size)

    def timm_form(self, size: int) -> TimmForm | None:
        """Return a description of the trunk as a timm network for images of `size` pixels; None if timm lacks it.

        Raises:
            UserError: timm's network would give other features than this trunk; the message is a clause that says why.
        """
        return None

    def huggingface_form(self, size: int) -> HuggingFaceForm | None:
        """Return a description of the trunk as a transformers model for images of `size` pixels.

        It is None where no such export is implemented.

        Raises:
            UserError: transformers' model would give other features than this trunk; the message is a clause that says
                why.
        """
        return None

    def detector_form(self, library: str) -> DetectorForm | None:
        """Return how the trunk's weights are written for a detection library; None if the library lacks the trunk.

        Args:
            library: "mmdet", "detectron2" or "torchvision".

        Raises:
            UserError: the library's network would give other features than this trunk; the message is a clause that says
                why.
        """
        return None

    def attention_maps(self, image: Tensor) -> list[BlockAttention]:
        """Return every block's attention, first to last, on one normalised image [channels, H, W] of any size.

        Raises:
            UserError: the attention of this trunk cannot be shown as maps.
        """
        raise UserError(f"attention maps are stitched from the windows of a Swin; {self.name} has none")

    def _normed(self, found: TokenMap) -> TokenMap:
        view = None if found.view is None else self.norm(found.view)
        return TokenMap(self.norm(found.tokens), found.grids, view)


def call(block: nn.Module, *args: Any) -> Any:
    """Call a block directly and return its output; the default of `Trunk.run_block`."""
    return block(*args)
