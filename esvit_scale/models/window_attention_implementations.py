"""The implementations of window attention, by their names in `model.attention`.

All have the signature of `window_attention.attend_math` and its result, up to rounding:

- math: written out (window_attention.py); any device and type, and what evaluation and export use.
- sdpa: torch's scaled_dot_product_attention with the position bias as a mask; any device.
- flex: torch's FlexAttention, compiled; CUDA.
- triton: fused kernels (window_attention_triton.py); CUDA.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.models import triton_support
from esvit_scale.models.recompile_limit import raise_recompile_limit
from esvit_scale.models.window_attention import attend_math, bias_of_pairs
from esvit_scale.models.windows import MASKED, WindowPlan

AttendWindows = Callable[[Tensor, Tensor, WindowPlan], Tensor]

NAMES = ("math", "sdpa", "flex", "triton")


def implementation(name: str) -> AttendWindows:
    """Return the implementation of a name in `NAMES`; triton is imported only when it is asked for."""
    if name == "triton":
        from esvit_scale.models import window_attention_triton

        return window_attention_triton.attend
    return {"math": attend_math, "sdpa": attend_sdpa, "flex": attend_flex}[name]


def unavailable(name: str, device: torch.device) -> str | None:
    """Return why an implementation cannot run on a device, as a clause; None when it may."""
    if name in ("math", "sdpa"):
        return None
    return triton_support.unavailable(device) if name == "triton" else triton_support.unsuitable_gpu(device)


def attend_sdpa(qkv: Tensor, table: Tensor, plan: WindowPlan) -> Tensor:
    """Compute `attend_math` with scaled_dot_product_attention, one call per kind of window."""
    length, heads = plan.window**2, table.shape[1]
    bias = bias_of_pairs(table, plan.window)
    packed = qkv.view(-1, length, 3, heads, qkv.shape[1] // (3 * heads))
    mixed = []
    for first, end, mask in _parts(plan, len(packed)):
        q, k, v = packed[first:end].permute(2, 0, 3, 1, 4)  # each [windows, heads, L, d]
        added = (bias if mask is None else bias + mask).to(qkv.dtype)
        part = F.scaled_dot_product_attention(q, k, v, attn_mask=added[None])
        mixed.append(part.transpose(1, 2).reshape(-1, qkv.shape[1] // 3))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _parts(plan: WindowPlan, windows: int) -> Iterator[tuple[int, int, Tensor | None]]:
    """Yield (first, end, mask) for each kind of window that occurs, in order."""
    unmasked = plan.masks[0][0] if plan.masks else windows
    if unmasked:
        yield 0, unmasked, None
    yield from plan.masks


def attend_flex(qkv: Tensor, table: Tensor, plan: WindowPlan) -> Tensor:
    """Compute `attend_math` with FlexAttention, which looks position bias and mask up inside its kernel."""
    return flex(_compiled_flex_attention(), qkv, table, plan)


def flex(flex_attention: Callable[..., Any], qkv: Tensor, table: Tensor, plan: WindowPlan) -> Tensor:
    """Compute `attend_flex` with the given flex_attention, compiled or not."""
    side, shift, heads = plan.window, plan.shift, table.shape[1]
    start1, start2, start3 = plan.kind_starts

    def modify(score: Tensor, window: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dy, dx = i // side - j // side + side - 1, i % side - j % side + side - 1
        score = score + table[dy * (2 * side - 1) + dx, head]
        if not shift:
            return score
        in_last_row = window >= start2
        in_last_column = ((window >= start1) & (window < start2)) | (window >= start3)
        below = (i // side >= side - shift) != (j // side >= side - shift)
        right = (i % side >= side - shift) != (j % side >= side - shift)
        return torch.where((below & in_last_row) | (right & in_last_column), score + MASKED, score)

    q, k, v = qkv.view(-1, side**2, 3, heads, qkv.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)
    mixed = flex_attention(q, k, v, score_mod=modify)
    return mixed.transpose(1, 2).reshape(len(qkv), -1)


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    raise_recompile_limit()
    return torch.compile(flex_attention, dynamic=False)
