"""ResNet-50 (He et al. 2016), with the crops of all sizes packed into one forward.

As in torchvision's, which the EsViT paper trained, the 3×3 convolutions have the strides. Parameter names are also
torchvision's. The region tokens are the cells of the last stage's map, the view feature is their mean.

The maps of all crops form one list of pixels [N, C], crop after crop, row-major within each crop. Viewed as maps, it
has torch's channels_last layout without a copy. 1×1 convolutions are one matrix product over all crops, larger
convolutions run once per resolution on views of the list, and batch norms use each resolution's own statistics
(models/batch_norm.py). A block is called once for all crops.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.block_parts import add_branch
from esvit_scale.models.convolution import Conv2d
from esvit_scale.models.descriptions import TimmForm
from esvit_scale.models.distributions import Initializer, normal
from esvit_scale.models.drop_path import keep_scales, linear_rates, token_factors
from esvit_scale.models.shape import Shape, overridden
from esvit_scale.models.tokens import as_maps, crop_means, split
from esvit_scale.models.trunk import Features, Grid, TokenMap, Trunk

EXPANSION = 4  # output width of a bottleneck block divided by its inner width


class ResNet(Trunk):
    """The ResNet trunk, of bottleneck blocks.

    Args:
        embed_dim: channels of the stem. Blocks of stage s, from 0, have 2ˢ·embed_dim channels inside and four times as
            many in their output.
        depths: blocks per stage.
        drop_path: stochastic-depth rate of the last block (published ResNets have none); rates grow linearly from 0.
    """

    def __init__(self, embed_dim: int, depths: tuple[int, ...], drop_path: float = 0.0) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.channels = tuple(EXPANSION * embed_dim * 2**s for s in range(len(depths)))
        self.reductions = tuple(4 * 2**s for s in range(len(depths)))
        self.dim = self.channels[-1]
        self.drop_rates = linear_rates(drop_path, sum(depths))
        self.conv1 = Conv(3, embed_dim, 7, 2)
        self.bn1 = Norm(embed_dim)
        self.stages, before = [], embed_dim
        for s, depth in enumerate(depths):
            blocks = [Bottleneck(before if i == 0 else self.channels[s], embed_dim * 2**s, s, i) for i in range(depth)]
            self.add_module(f"layer{s + 1}", nn.ModuleList(blocks))
            self.stages.append(blocks)
            before = self.channels[s]
        self.norm = nn.Identity()

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage]

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        return self.conv1

    def timm_form(self, size: int) -> TimmForm:
        """Return the trunk's form as timm's resnet50, the same for any image size.

        Raises:
            UserError: the trunk has stages or a stem that timm's resnet50 cannot have.
        """
        if len(self.depths) != 4 or self.channels[0] != 256:
            raise UserError("timm's resnet50 has 4 stages and a stem of 64 channels")
        return TimmForm(
            "resnet50",
            {"layers": list(self.depths)},
            width=self.dim,
            reduction=self.reductions[-1],
            pool="avg",
            first_conv="conv1",
            classifier="fc",
            tensors=dict,
            fixed_size=False,
        )

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None) -> Features:
        """Compute the features of all crops, as in `Trunk.forward`; crops may have any size."""
        *_, (tokens, grids) = self._block_outputs(crops, drop_keys)
        return Features(crop_means(tokens, grids), tokens, grids)

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield the output map of every block, in order; a ResNet has no final norm."""
        return (TokenMap(tokens, grids) for tokens, grids in self._block_outputs(crops, None))

    def _block_outputs(self, crops: list[Tensor], drop_keys: Tensor | None) -> Iterator[tuple[Tensor, list[Grid]]]:
        """Yield, after each block, the feature vectors [N, C] of all crops' positions and the sizes of the crops' maps."""
        grids = [(x.shape[0], x.shape[-2], x.shape[-1]) for x in crops]
        pixels = torch.cat([x.to(self.conv1.weight.dtype).permute(0, 2, 3, 1).flatten(0, 2) for x in crops])
        tokens = self.bn1(self.conv1(pixels, grids), grids := strided(grids, 2)).relu_()
        tokens, grids = _max_pool(tokens, grids), strided(grids, 2)
        scales = keep_scales(drop_keys, torch.tensor(self.drop_rates)) if drop_keys is not None else None
        for i, block in enumerate(block for stage in self.stages for block in stage):
            after = strided(grids, block.stride)
            keep, _ = token_factors(scales, self.drop_rates, i, after, tokens.dtype)
            tokens, grids = self.run_block(block, tokens, grids, keep), after
            yield tokens, grids


class Bottleneck(nn.Module):
    """A bottleneck block: 1×1, 3×3 and 1×1 convolutions, added to the shortcut.

    The shortcut is the identity; in the first block of a stage it is a 1×1 convolution with batch norm. A forward calls
    a block once, for all crops: it is the unit of ZeRO-3 gathering and of activation checkpointing.

    Args:
        channels, inner: widths of the input and of the 3×3 convolution.
        stage, index: the block's stage and its index within the stage, from 0.
    """

    def __init__(self, channels: int, inner: int, stage: int, index: int) -> None:
        super().__init__()
        self.stride = 2 if stage and not index else 1
        self.conv1, self.bn1 = Conv(channels, inner), Norm(inner)
        self.conv2, self.bn2 = Conv(inner, inner, 3, self.stride), Norm(inner)
        self.conv3, self.bn3 = Conv(inner, EXPANSION * inner), Norm(EXPANSION * inner)
        shortcut = [Conv(channels, EXPANSION * inner, 1, self.stride), Norm(EXPANSION * inner)]
        self.downsample = nn.ModuleList([] if index else shortcut)

    def forward(self, tokens: Tensor, grids: list[Grid], keep: Tensor | None) -> Tensor:
        """Map pixels [N, C] to [N', 4·inner]; keep [N', 1] is the drop-path factor (0: dropped), None is 1."""
        after = strided(grids, self.stride)
        branch = self.bn1(self.conv1(tokens, grids), grids).relu_()
        branch = self.bn2(self.conv2(branch, grids), after).relu_()
        branch = self.bn3(self.conv3(branch, after), after)
        if self.downsample:
            convolution, norm = self.downsample
            tokens = norm(convolution(tokens, grids), after)
        return add_branch(tokens, branch, keep).relu_()


class Conv(Conv2d):
    """A convolution without bias on the pixels [N, C] of all crops, padded so that only the stride shrinks a map."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, kernel // 2, bias=False)

    def for_channels(self, channels: int) -> "Conv":
        """Return a new convolution like this one for `channels` input channels."""
        return Conv(channels, self.out_channels, self.kernel_size[0], self.stride[0])

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialiser of the weight: normal as in torchvision (He et al. 2015, `fan_out` mode)."""
        return {"weight": normal(math.sqrt(2 / (self.out_channels * self.kernel_size[0] ** 2)))}

    def forward(self, tokens: Tensor, grids: list[Grid]) -> Tensor:  # type: ignore[override]
        """Map pixels [N, C] with these grids to pixels [N', C'], whose grids are `strided(grids, stride)`."""
        stride = self.stride[0]
        if self.kernel_size[0] > 1:
            maps = [super(Conv, self).forward(x) for x in _maps(tokens, grids)]
            return _pixels(maps)
        if stride > 1:
            tokens = _pixels([x[..., ::stride, ::stride] for x in _maps(tokens, grids)])
        return F.linear(tokens, self.weight.flatten(1))


class Norm(BatchNorm):
    """A batch norm of the pixels [N, C] of all crops, each resolution by its own statistics."""

    def forward(self, tokens: Tensor, grids: list[Grid]) -> Tensor:  # type: ignore[override]
        """Normalise pixels [N, C], one group of `grids` at a time."""
        return torch.cat([super(Norm, self).forward(group) for group in split(tokens, grids)])


def strided(grids: list[Grid], stride: int) -> list[Grid]:
    """Return the grids (crops, H, W) after a convolution with this stride: sides are divided and rounded up."""
    return [(n, -(-h // stride), -(-w // stride)) for n, h, w in grids]


def _maps(tokens: Tensor, grids: list[Grid]) -> list[Tensor]:
    """View pixels [N, C] as one tensor of maps [n, C, h, w] for each resolution, without a copy."""
    return [maps.permute(0, 3, 1, 2) for maps in as_maps(tokens, grids)]


def _pixels(maps: list[Tensor]) -> Tensor:
    """Return the pixels [N, C] of all crops, given maps [n, C, h, w] for each resolution."""
    return torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps])


def _max_pool(tokens: Tensor, grids: list[Grid]) -> Tensor:
    return _pixels([F.max_pool2d(x, 3, 2, 1) for x in _maps(tokens, grids)])


SHAPES = {"resnet50": Shape(64, (3, 4, 6, 3), ())}


def build(config: Config) -> ResNet:
    """Return the ResNet that `config.model.trunk` names.

    Raises:
        UserError: the config's overrides of the shape do not fit together.
    """
    shape = overridden(config, SHAPES[config.model.trunk])
    return ResNet(shape.embed_dim, shape.depths, config.model.drop_path)
