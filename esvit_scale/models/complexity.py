"""What a config costs: parameters, FLOPs and the activations that a backward needs. Arithmetic on the config alone.

A FLOP is a multiplication or an addition of a matrix product; everything else is not counted (as torch's
FlopCounterMode, which the tests compare with). Three ways to count the trunk and the training step:

"published"  Swin as its papers run it: qkv and proj on the zeros that pad a map to whole windows, too. The numbers to
             compare with other work.
"executed"   the products that this package runs: qkv and proj on real tokens; the backward's and the fused loss's own.
"useful"     "published" without any work on padding; what MFU counts, so that padding never looks like progress.

Forward multiply-adds of a crop of S pixels, H = ⌈S/4⌉ tokens a side, padded to P = ⌈H/w⌉·w, widths C:
    H²·48C  +  Σ blocks (4P²C² + 2P²w²C + 8H²C²)  +  Σ merges 8H'²C²   with H' = ⌈H/2⌉ after the merge and C before it
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

from esvit_scale.config import Config
from esvit_scale.models.heads import Head
from esvit_scale.models.registry import build_trunk, trunk_shape
from esvit_scale.models.swin import PATCH, stage_window
from esvit_scale.models.swin_v2 import BIAS_HIDDEN, EXTRA_NORM_STAGE

Count = Literal["published", "executed", "useful"]

GLOBALS = 2  # the teacher's views


class Parameters(NamedTuple):
    trunk: int
    heads: int  # of all heads, prototypes and gains included


class Activations(NamedTuple):
    """Bytes that the student's forward keeps for its backward (without parameters and cached index tables)."""

    per_image: int
    per_step: int  # whatever the number of images: position-bias networks, gradients of the prototypes

    def total(self, images: int) -> int:
        return images * self.per_image + self.per_step


class StageMap(NamedTuple):
    """One stage on one crop."""

    stage: int
    width: int  # C
    depth: int
    heads: int
    window: int
    side: int  # H, tokens along the map
    padded: int  # P, the same in whole windows
    last: bool


def parameters(config: Config) -> Parameters:
    """Raises UserError on a trunk that cannot be built."""
    o = config.objective
    with torch.device("meta"):
        trunk = build_trunk(config)
        head = Head(trunk.dim, o.head_hidden, o.bottleneck, o.prototypes)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return Parameters(count(trunk), count(head) * (2 if o.regions else 1))


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def crop_flops(config: Config, size: int, count: Count = "published") -> int:
    """Forward FLOPs of the trunk on one crop of `size` pixels; see `position_bias_flops` for V2's share by the step."""
    macs = _embedding_macs(config, size)
    for m in _maps(config, size):
        tokens, slots, width = m.side**2, m.padded**2, m.width
        projected = slots if count == "published" else tokens
        queries = tokens if count == "useful" else slots
        macs += m.depth * (4 * projected * width**2 + 2 * queries * m.window**2 * width + 8 * tokens * width**2)
        if not m.last:
            macs += _half(m.side) ** 2 * 8 * width**2
    return 2 * macs


def position_bias_flops(config: Config) -> int:
    """Forward FLOPs of Swin V2's position-bias networks: once a forward, however many crops it has."""
    macs = 0
    if trunk_shape(config).version == 2:
        for m in _maps(config, config.data.global_crops.size):
            macs += m.depth * (2 * m.window - 1) ** 2 * BIAS_HIDDEN * (2 + m.heads)
    return 2 * macs


def image_flops(config: Config, count: Count = "published") -> int:
    """FLOPs of one training step for each image: student's forward and backward, teacher, heads, matching, loss.

    Recomputation under activation checkpointing is not counted. Per-step costs that do not grow with the batch (V2's
    position bias, the centre) are left out: they vanish beside an image.
    """
    o = config.objective
    sizes = config.crop_sizes
    views = [crop_flops(config, size, count) for size in sizes]
    regions = [_region_tokens(config, size) for size in sizes] if o.regions else []
    dim = _dim(config)
    student_tokens = len(sizes) + sum(regions)
    teacher_tokens = GLOBALS + sum(regions[:GLOBALS])
    mlp = 2 * (dim * o.head_hidden + o.head_hidden**2 + o.head_hidden * o.bottleneck)
    logits = 2 * o.bottleneck * o.prototypes
    teacher = sum(views[:GLOBALS]) + teacher_tokens * mlp
    student = 3 * (sum(views) + student_tokens * (mlp + logits))
    compared = (
        sum(regions[1:]) if count != "executed" else sum(regions)
    )  # regions that each teacher view is matched with
    match = 2 * GLOBALS * regions[0] * dim * compared if regions else 0
    if count != "executed":
        return student + teacher + teacher_tokens * logits + match
    # Pixels need no gradient. The fused loss takes four products for a token of either network: the logits twice, the
    # expected prototype, and the prototypes' gradient.
    student -= sum(2 * _embedding_macs(config, size) for size in sizes)
    return student + teacher + (4 * teacher_tokens + student_tokens) * logits + match


# --- activations -----------------------------------------------------------------------------------------------------


def activation_bytes(config: Config, checkpointing: bool | None = None) -> Activations:
    """What the student's forward keeps for the backward, heads and loss included, at the run's precision.

    Args:
        checkpointing: keep every block's input only, and one block's activations while it is recomputed; None: as the
            config says.
    """
    if checkpointing is None:
        checkpointing = config.train.activation_checkpointing != "none"
    sizes = config.crop_sizes
    kept = sum(_kept_outside_blocks(config, size) for size in sizes)
    blocks, inputs = block_activation_bytes(config), block_input_bytes(config)
    bias = _kept_by_position_bias(config)
    if checkpointing:
        return Activations(kept + sum(inputs) + max(blocks), max(bias) + _kept_by_loss(config))
    return Activations(kept + sum(blocks), sum(bias) + _kept_by_loss(config))


def block_activation_bytes(config: Config) -> list[int]:
    """What each block of the trunk keeps for one image, in order, without activation checkpointing."""
    return [sum(column) for column in zip(*(list(_kept_by_blocks(config, s)) for s in config.crop_sizes), strict=True)]


def block_input_bytes(config: Config) -> list[int]:
    """The same with activation checkpointing."""
    return [sum(column) for column in zip(*(list(_block_inputs(config, s)) for s in config.crop_sizes), strict=True)]


def _kept_by_blocks(config: Config, size: int) -> Iterator[int]:
    """Bytes of every block, in order, on one crop."""
    shape, e, wide = trunk_shape(config), _element(config), 4
    for m in _maps(config, size):
        n, s, c = m.side**2, m.padded**2, m.width
        for i in range(m.depth):
            attention = s * (4 * c + m.window**2 * m.heads) * e  # q, k, v, mixed and the probabilities
            if not _windows_are_views(config, m.stage, i):
                attention += n * c * e  # what proj reads is a copy
            stats = 2 * 2 * n * wide  # mean and 1/σ of two norms
            if shape.version == 1:
                own = attention + 8 * n * c * e + stats  # inputs of norm1, qkv, norm2, fc1 (C each) and GELU (4C)
            else:
                # inputs of qkv, norm1, fc1, norm2 (C each) and GELU (4C); unit queries and keys with v; lengths
                own = attention + 8 * n * c * e + stats + s * (3 * c * e + 2 * m.heads * wide)
                if _has_extra_norm(config, m.stage, i):
                    own += n * c * e + 2 * n * wide
            yield own + _keep_factors(config, m, i)


def _block_inputs(config: Config, size: int) -> Iterator[int]:
    for m in _maps(config, size):
        for i in range(m.depth):
            yield m.side**2 * m.width * _element(config) + _keep_factors(config, m, i)


def _keep_factors(config: Config, m: StageMap, index: int) -> int:
    first = m.stage == 0 and index == 0  # its drop rate is 0
    return 0 if first or not config.model.drop_path else 2 * m.side**2 * _element(config)


def _kept_outside_blocks(config: Config, size: int) -> int:
    """Patch embedding, patch merging, final norm and heads, for one crop."""
    shape, o, e, wide = trunk_shape(config), config.objective, _element(config), 4
    maps = list(_maps(config, size))
    first, last = maps[0], maps[-1]
    kept = first.side**2 * ((3 * PATCH**2 + first.width) * e + 2 * wide)
    for m in maps[:-1]:
        widths = 8 * m.width if shape.version == 1 else 6 * m.width  # inputs of the norm and of the reduction
        kept += _half(m.side) ** 2 * (widths * e + 2 * wide)
    regions, dim = last.side**2, last.width
    kept += regions * (dim * e + 2 * wide)
    # A head's token: the inputs of its layers and GELUs, the bottleneck with its length, the loss's gradient.
    token = (dim + 4 * o.head_hidden + o.bottleneck) * e + (o.bottleneck if e != wide else 0) * wide + 2 * wide
    token += o.bottleneck * (wide - e)  # the bottleneck is normalised in fp32
    return kept + token * (1 + (regions if o.regions else 0))


def _kept_by_position_bias(config: Config) -> list[int]:
    """Bytes of every block's position-bias network; zeros for V1, whose bias is a gather of its parameter."""
    shape, wide, found = trunk_shape(config), 4, []
    for m in _maps(config, config.data.global_crops.size):
        rows = (2 * m.window - 1) ** 2
        weights = 0 if _element(config) == wide else BIAS_HIDDEN * m.heads  # a wide copy
        bytes_ = rows * (2 + BIAS_HIDDEN + m.heads) * wide + weights * wide
        found += [bytes_ if shape.version == 2 else 0] * m.depth
    return found


def _kept_by_loss(config: Config) -> int:
    """The gradient of each head's prototypes, known in the forward."""
    o = config.objective
    return (2 if o.regions else 1) * o.prototypes * o.bottleneck * _element(config)


# --- shapes ----------------------------------------------------------------------------------------------------------


def _maps(config: Config, size: int) -> Iterator[StageMap]:
    """The stages that a crop of `size` pixels goes through."""
    shape, build = trunk_shape(config), config.data.global_crops.size
    side, stages = -(-size // PATCH), len(shape.depths)
    for s, (depth, heads) in enumerate(zip(shape.depths, shape.heads, strict=True)):
        window, _ = stage_window(build, config.model.window, s)
        padded = -(-side // window) * window
        yield StageMap(s, shape.embed_dim * 2**s, depth, heads, window, side, padded, s == stages - 1)
        side = _half(side)


def _windows_are_views(config: Config, stage: int, index: int) -> bool:
    """Whether tokens already lie in the order of a block's windows: no shift, and no crop needs padding."""
    _, shift = stage_window(config.data.global_crops.size, config.model.window, stage)
    maps = [list(_maps(config, size))[stage] for size in set(config.crop_sizes)]
    return not (shift and index % 2) and all(m.side == m.padded for m in maps)


def _has_extra_norm(config: Config, stage: int, index: int) -> bool:
    every = trunk_shape(config).extra_norm_every
    return stage == EXTRA_NORM_STAGE and every is not None and index % every == every - 1


def _embedding_macs(config: Config, size: int) -> int:
    return (-(-size // PATCH)) ** 2 * 3 * PATCH**2 * trunk_shape(config).embed_dim


def _region_tokens(config: Config, size: int) -> int:
    return list(_maps(config, size))[-1].side ** 2


def _dim(config: Config) -> int:
    shape = trunk_shape(config)
    return shape.embed_dim * 2 ** (len(shape.depths) - 1)


def _element(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else 4


def _half(side: int) -> int:
    return -(-side // 2)
