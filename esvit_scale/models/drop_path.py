"""Stochastic depth without a random generator: whether a residual branch is dropped is computed by a hash.

Each crop of an image has a key, a hash of (seed, step, position of the image in the global batch, crop). A hash of
(key, block, branch) decides whether the branch is dropped for that crop. So the decisions do not depend on rank, world
size, micro-batches or recomputation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esvit_scale.models.trunk import Grid
from esvit_scale.models.windows import crop_of_token

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea and Flood 2014): increment and finaliser
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_OTHER_DRAWS = 1 << 20  # offset of the hash inputs of `draw_of`, above the indices of all (block, branch) pairs


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros; torch's own >> fills with the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(state: Tensor, value: Tensor | int) -> Tensor:
    """Return the int64 hash of `state` and `value`, in which every output bit depends on every input bit."""
    if isinstance(value, int):
        x = state + _signed((value + 1) * _GOLDEN)
    else:
        x = state + (value + 1) * _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def drop_keys(seed: int, step: int, positions: Tensor, crops: int) -> Tensor:
    """Return the key of every crop, from which its stochastic-depth decisions are computed.

    Args:
        seed, step: the run's seed, and the index of the training step.
        positions: int64 [B], each image's position in the global batch.
        crops: V, crops per image.

    Returns:
        int64 [V·B] in the order of the packed crops: crop 0 of all images, crop 1 of all images, …
    """
    state = _hash(_hash(torch.zeros_like(positions), seed), step)
    images = _hash(state, positions)
    return _hash(images[None, :], torch.arange(crops, device=positions.device)[:, None]).reshape(-1)


def linear_rates(last: float, blocks: int) -> list[float]:
    """Return the drop rate of each of `blocks` blocks, growing linearly from 0 for the first to `last` for the last."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def keep_scales(keys: Tensor, rates: Tensor) -> Tensor:
    """Return the factor of every residual branch for every crop: 0 if it is dropped, else 1/(1 − rate).

    Args:
        keys: int64 [n], one per crop (`drop_keys`).
        rates: float32 [depth], the drop rate of each block.

    Returns:
        float32 [depth, 2, n]; the two branches (attention, MLP) are drawn independently.
    """
    branches = torch.arange(2 * len(rates), device=keys.device)[:, None]
    uniform = _shift_right(_hash(keys[None, :], branches), 40).float() / (1 << 24)  # exact: 24 bits
    rate = rates.to(keys.device).repeat_interleave(2)[:, None]
    scale = torch.where(uniform >= rate, 1 / (1 - rate).clamp_min(1e-6), torch.zeros_like(rate))
    return scale.view(len(rates), 2, -1)


def token_factors(
    scales: Tensor | None, rates: Sequence[float], block: int, grids: Sequence[Grid], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Return the factors of a block's two branches (attention, MLP), each [N, 1] over the tokens of all crops.

    Both are None, which stands for factors of 1, without `scales` and in a block that has a drop rate of 0.

    Args:
        scales: the factors of every crop, from `keep_scales`; None: nothing is dropped.
        rates: the drop rate of each block.
        block: index of the block.
        grids: (crops, H, W) of every resolution in this block; (crops, 1, tokens) if a crop's tokens form no map.
    """
    if scales is None or not rates[block]:
        return None, None
    of_crop = crop_of_token(tuple(grids), scales.device)
    attention, mlp = scales[block].to(dtype).index_select(1, of_crop).unsqueeze(-1)
    return attention, mlp


def draw_of(keys: Tensor, block: int | Tensor, choices: int) -> Tensor:
    """Draw a uniform integer from 0 to choices − 1 for each key, int64 [n], independent of stochastic depth.

    It is computed by a hash of (key, block). The distribution is exactly uniform if `choices` is a power of two.
    """
    return _shift_right(_hash(keys, _OTHER_DRAWS + block), 40) % choices  # the modulus is taken of 24 bits
