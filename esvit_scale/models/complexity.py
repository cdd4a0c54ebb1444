"""What a Swin costs: FLOPs and the activations that a backward needs. Arithmetic on the config alone.

Other trunks are counted by running them (models/traced.py); objective/costs.py adds the heads and asks the right one.

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

from esvit_scale.config import Config
from esvit_scale.models.registry import trunk_shape
from esvit_scale.models.swin import PATCH, stage_window
from esvit_scale.models.swin_v2 import BIAS_HIDDEN, EXTRA_NORM_STAGE

Count = Literal["published", "executed", "useful"]


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


def embedding_flops(config: Config, size: int) -> int:
    """The patch projection's share of `crop_flops`."""
    return 2 * _embedding_macs(config, size)


def region_side(config: Config, size: int) -> int:
    """Region tokens along a side of the last map."""
    return list(_maps(config, size))[-1].side


# --- activations -----------------------------------------------------------------------------------------------------


def block_activation_bytes(config: Config) -> list[int]:
    """What each block of the trunk keeps for one image, in order, without activation checkpointing."""
    return [sum(column) for column in zip(*(list(_kept_by_blocks(config, s)) for s in config.crop_sizes), strict=True)]


def block_input_bytes(config: Config) -> list[int]:
    """The same with activation checkpointing."""
    return [sum(column) for column in zip(*(list(_block_inputs(config, s)) for s in config.crop_sizes), strict=True)]


def _kept_by_blocks(config: Config, size: int) -> Iterator[int]:
    """Bytes of every block, in order, on one crop."""
    shape, e, wide = trunk_shape(config), element(config), 4
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
            yield m.side**2 * m.width * element(config) + _keep_factors(config, m, i)


def _keep_factors(config: Config, m: StageMap, index: int) -> int:
    first = m.stage == 0 and index == 0  # its drop rate is 0
    return 0 if first or not config.model.drop_path else 2 * m.side**2 * element(config)


def kept_outside_blocks(config: Config, size: int) -> int:
    """Bytes of patch embedding, patch merging and final norm, on one crop."""
    shape, e, wide = trunk_shape(config), element(config), 4
    maps = list(_maps(config, size))
    first, last = maps[0], maps[-1]
    kept = first.side**2 * ((config.data.channels * PATCH**2 + first.width) * e + 2 * wide)
    for m in maps[:-1]:
        widths = 8 * m.width if shape.version == 1 else 6 * m.width  # inputs of the norm and of the reduction
        kept += _half(m.side) ** 2 * (widths * e + 2 * wide)
    return kept + last.side**2 * (last.width * e + 2 * wide)


def kept_by_position_bias(config: Config) -> list[int]:
    """Bytes of every block's position-bias network; zeros for V1, whose bias is a gather of its parameter."""
    shape, wide, found = trunk_shape(config), 4, []
    for m in _maps(config, config.data.global_crops.size):
        rows = (2 * m.window - 1) ** 2
        weights = 0 if element(config) == wide else BIAS_HIDDEN * m.heads  # a wide copy
        bytes_ = rows * (2 + BIAS_HIDDEN + m.heads) * wide + weights * wide
        found += [bytes_ if shape.version == 2 else 0] * m.depth
    return found


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
    return (-(-size // PATCH)) ** 2 * config.data.channels * PATCH**2 * trunk_shape(config).embed_dim


def element(config: Config) -> int:
    """Bytes of an activation."""
    return 2 if config.train.precision in ("bf16", "fp16") else 4


def _half(side: int) -> int:
    return -(-side // 2)
