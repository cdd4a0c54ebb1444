"""Window attention written out: scores, softmax and product as matrix products, with a backward by hand.

It is the reference for every other implementation of window attention, and the one that CPUs and exporters use.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit_scale.models.windows import WindowPlan, relative_position_index


class Attention(torch.autograd.Function):
    """softmax(QKᵀ/√d + bias + mask) V in every window: qkv [slots, 3C], bias [heads, L, L] → [slots, C].

    The backward is written by hand because autograd would save and copy more: this saves one packed copy of q, k and v,
    the probabilities and the output. Products run in qkv's precision, softmax and the bias's gradient in fp32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, masks: tuple[tuple[int, int, Tensor], ...]) -> Tensor:
        """Return the attention output of every slot, [slots, C]."""
        ctx.bias_dtype = bias.dtype
        packed, probabilities = attend(qkv, bias, masks)
        attention = probabilities.to(qkv.dtype)
        _, _, v = packed
        mixed = (attention @ v).transpose(1, 2).reshape(len(qkv), -1)  # [slots, C]
        ctx.save_for_backward(packed, attention, mixed)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of qkv and bias."""
        packed, attention, mixed = ctx.saved_tensors
        q, k, v = packed
        windows, heads, length, depth = q.shape
        wide = torch.promote_types(grad.dtype, torch.float32)
        # The inner sum of the softmax's gradient is Σ_j P_ij dP_ij = dO_i·O_i: d terms per token instead of L.
        inner = (grad * mixed).view(windows, length, heads, depth).sum(-1, dtype=wide).transpose(1, 2).unsqueeze(-1)
        grad = grad.reshape(windows, length, heads, depth).transpose(1, 2).contiguous()
        grad_packed = torch.empty_like(packed)
        torch.matmul(attention.transpose(-2, -1), grad, out=grad_packed[2])
        grad_scores = torch.sub(grad @ v.transpose(-2, -1), inner).mul_(attention)  # [windows, heads, L, L]
        grad_bias = grad_scores.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        grad_scores = grad_scores.mul_(depth**-0.5).to(grad.dtype)
        torch.matmul(grad_scores, k, out=grad_packed[0])
        torch.matmul(grad_scores.transpose(-2, -1), q, out=grad_packed[1])
        return grad_packed.permute(1, 3, 0, 2, 4).reshape(windows * length, -1), grad_bias, None


def attend_math(qkv: Tensor, table: Tensor, plan: WindowPlan) -> Tensor:
    """Return the attention output of every slot, [slots, C].

    Args:
        qkv: [slots, 3C].
        table: the position bias of every relative distance, [(2·window − 1)², heads].
        plan: the windows, their shift and masks.
    """
    return Attention.apply(qkv, bias_of_pairs(table, plan.window), plan.masks)


def bias_of_pairs(table: Tensor, window: int) -> Tensor:
    """Return the position bias of every (query, key) of a window, [heads, L, L] with L = window².

    `table` is [(2·window − 1)², heads].
    """
    index = relative_position_index(window, table.device)
    return table.index_select(0, index).view(window**2, window**2, -1).permute(2, 0, 1)


def attend(qkv: Tensor, bias: Tensor, masks: tuple[tuple[int, int, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Return packed q, k, v [3, windows, heads, L, d] and the attention probabilities [windows, heads, L, L].

    A row of the probabilities is one query's distribution over the slots of its window, in fp32 or wider.

    Args:
        qkv: [slots, 3C].
        bias: [heads, L, L].
        masks: for each kind of shifted window (first, end, mask): mask [L, L] is added to the scores of windows
            first … end − 1.
    """
    heads, length, _ = bias.shape
    packed = qkv.view(-1, length, 3, heads, qkv.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4).contiguous()
    q, k, _ = packed  # each [windows, heads, L, d]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    scores = torch.add(bias.to(wide), q @ k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)
    for first, end, mask in masks:
        scores[first:end].add_(mask)
    return packed, scores.softmax(-1)
