"""Window attention as fused Triton kernels, forward and backward; importing this module imports triton.

Memory holds qkv, the output, their gradients, of large windows two numbers per query, and partial gradients of the bias
table, which are summed in a fixed order. So results do not depend on timing, and nothing of size windows × L × L is in
memory (L = window²). window_attention_kernels.py has the kernels, and this module their launches, as operators of torch
that torch.compile and activation checkpointing see as a whole.
"""

from typing import Any

import torch
from torch import Tensor

from esvit_scale.models import window_attention_kernels as kernels
from esvit_scale.models.triton_support import interpreted
from esvit_scale.models.windows import WindowPlan

DEPTHS = (16, 32, 64)  # C / heads
LARGEST_WINDOW = 32  # tokens along a side
PROGRAMS_PER_MULTIPROCESSOR = 8
PROGRAMS_INTERPRETED = 6  # few, so that programs have several windows each in tests


def unsupported(window: int, depth: int) -> str | None:
    """Return why windows of side `window` with heads of `depth` values are not supported; None when they are."""
    if window > LARGEST_WINDOW:
        return f"windows of {window}×{window} tokens (at most {LARGEST_WINDOW}×{LARGEST_WINDOW})"
    if depth not in DEPTHS:
        return f"heads of {depth} values (only {', '.join(map(str, DEPTHS))})"
    return None


def attend(qkv: Tensor, table: Tensor, plan: WindowPlan) -> Tensor:
    """Return the attention output of every slot, [slots, C]; arguments are those of `window_attention.attend_math`."""
    return _attention(qkv, table.float().contiguous(), plan.window, plan.shift, list(plan.kind_starts))[0]


# --- launches --------------------------------------------------------------------------------------------------------


class _Launch:
    """The grid and the common arguments of the kernels for one batch of windows."""

    def __init__(self, qkv: Tensor, table: Tensor, window: int, shift: int, kind_starts: list[int]) -> None:
        self.heads, self.length = table.shape[1], window**2
        depth = qkv.shape[1] // (3 * self.heads)
        if problem := unsupported(window, depth):
            raise ValueError(f"the Triton window attention does not support {problem}")
        self.windows, side = len(qkv) // self.length, kernels.tile_side(window)
        self.blocks = -(-self.length // side)
        self.programs = PROGRAMS_INTERPRETED
        if qkv.is_cuda:
            processors = torch.cuda.get_device_properties(qkv.device).multi_processor_count
            self.programs = PROGRAMS_PER_MULTIPROCESSOR * processors
        self.numbers = (self.windows, *kind_starts, self.heads, depth**-0.5)
        wide = interpreted() and qkv.dtype == torch.bfloat16
        self.meta = {"WINDOW": window, "SHIFT": shift, "D": depth, "S": side, "WIDE": wide}
        self.meta |= {"num_warps": kernels.WARPS, "num_stages": kernels.STAGES}

    def grid(self, tiles: int) -> tuple[int, int, int]:
        """Return the grid for a kernel with so many tiles per window and head."""
        return max(1, min(self.windows, self.programs // (self.heads * tiles))), self.heads, tiles

    def __call__(self, kernel: Any, tiles: int, *tensors: Tensor) -> None:
        """Launch a kernel on the device of its tensors."""
        with torch.cuda.device_of(tensors[0]):
            kernel[self.grid(tiles)](*tensors, *self.numbers, **self.meta)


@torch.library.custom_op("esvit_scale::window_attention", mutates_args=())
def _attention(qkv: Tensor, table: Tensor, window: int, shift: int, kind_starts: list[int]) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    launch = _Launch(qkv, table, window, shift, kind_starts)
    out, rowwise = _outputs(qkv, table, launch.blocks)
    launch(kernels.forward, launch.blocks, qkv, table, out, rowwise)
    return out, rowwise


@torch.library.custom_op("esvit_scale::window_attention_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    rowwise: Tensor,
    grad: Tensor,
    window: int,
    shift: int,
    kind_starts: list[int],
) -> tuple[Tensor, Tensor]:
    qkv, grad = qkv.contiguous(), grad.contiguous()
    launch = _Launch(qkv, table, window, shift, kind_starts)
    grad_qkv, tiles = torch.empty_like(qkv), launch.blocks**2
    partials = table.new_empty(launch.grid(tiles)[0], tiles, launch.heads, len(table))
    if launch.blocks == 1:
        launch(kernels.backward_whole, 1, qkv, table, grad, grad_qkv, partials)
    else:
        rowwise = rowwise.clone()  # an operator must not change its arguments
        launch(kernels.backward_queries, launch.blocks, qkv, table, out, grad, grad_qkv, rowwise)
        launch(kernels.backward_keys, launch.blocks, qkv, table, grad, grad_qkv, rowwise)
        launch(kernels.backward_table, tiles, qkv, table, grad, partials, rowwise)
    return grad_qkv, partials.sum((0, 1)).t().contiguous()


def _outputs(qkv: Tensor, table: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Return the empty output [slots, C], and numbers of each query [slots, heads, 2] if windows have several tiles."""
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    return out, table.new_empty((0,) if blocks == 1 else (qkv.shape[0], table.shape[1], 2))


@_attention.register_fake
def _(qkv: Tensor, table: Tensor, window: int, shift: int, kind_starts: list[int]) -> tuple[Tensor, Tensor]:
    return _outputs(qkv, table, -(-(window**2) // kernels.tile_side(window)))


@_attention_backward.register_fake
def _(qkv: Tensor, table: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), torch.empty_like(table)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, *ctx.layout = inputs
    out, rowwise = output
    ctx.mark_non_differentiable(rowwise)
    whole = not rowwise.numel()
    ctx.save_for_backward(qkv, table, rowwise if whole else out, rowwise)  # windows of one tile need no output


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_qkv, grad_table = torch.ops.esvit_scale.window_attention_backward(*ctx.saved_tensors, grad, *ctx.layout)
    return grad_qkv, grad_table, None, None, None


_attention.register_autograd(_gradients, setup_context=_save)
