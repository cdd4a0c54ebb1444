"""Stochastic depth without a random generator: every decision is a hash of what it is for.

A crop of an image at a step has a key; a residual branch of a block is kept for that crop or not by a hash of
(key, block, branch). So the draws do not depend on rank, world size, micro-batches or recomputation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esvit_scale.models.trunk import Grid
from esvit_scale.models.windows import crop_of_token

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64 (Steele, Lea and Flood 2014): increment and finaliser
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_OTHER_DRAWS = 1 << 20  # beyond every (block, branch) that is kept or dropped


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right without keeping the sign, as torch's >> on int64 does."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _hash(state: Tensor, value: Tensor | int) -> Tensor:
    """Fold `value` into `state`, int64 → int64, every output bit depending on every input bit."""
    if isinstance(value, int):
        x = state + _signed((value + 1) * _GOLDEN)
    else:
        x = state + (value + 1) * _signed(_GOLDEN)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)


def drop_keys(seed: int, step: int, positions: Tensor, crops: int) -> Tensor:
    """Return one key per crop image.

    Args:
        seed, step: the run's seed, and the index of the batch.
        positions: int64 [B], each image's position in the global batch.
        crops: V, crops per image.

    Returns:
        int64 [V·B] in the order in which crops are stacked: crop 0 of all images, crop 1 of all images, …
    """
    state = _hash(_hash(torch.zeros_like(positions), seed), step)
    images = _hash(state, positions)
    return _hash(images[None, :], torch.arange(crops, device=positions.device)[:, None]).reshape(-1)


def linear_rates(last: float, blocks: int) -> list[float]:
    """Return the drop rates of `blocks` blocks, growing linearly from 0 for the first to `last`."""
    return [last * i / max(blocks - 1, 1) for i in range(blocks)]


def keep_scales(keys: Tensor, rates: Tensor) -> Tensor:
    """The factor of every residual branch: 0 where it is dropped, else 1/(1 − rate).

    Args:
        keys: int64 [n], one per crop image.
        rates: float32 [depth], the blocks' drop rates.

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
    """Return the factors of a block's two branches, each [N, 1] over the tokens of all crops; None keeps a branch whole.

    Args:
        scales: what `keep_scales` gave, or None: everything is kept.
        rates: the blocks' drop rates; with 0 everything is kept.
        grids: (crops, H, W) of every resolution in this block; (crops, 1, tokens) where they are no map.
    """
    if scales is None or not rates[block]:
        return None, None
    of_crop = crop_of_token(tuple(grids), scales.device)
    attention, mlp = scales[block].to(dtype).index_select(1, of_crop).unsqueeze(-1)
    return attention, mlp


def draw_of(keys: Tensor, block: int, choices: int) -> Tensor:
    """Whatever else a block draws at random: int64 [n] in 0 … choices − 1, each as likely (exactly so for a power of
    two), one for each of the keys."""
    return _shift_right(_hash(keys, _OTHER_DRAWS + block), 40) % choices  # of 24 bits
