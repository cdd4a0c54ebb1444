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
    and the probabilities. Scores and probabilities are stored in qkv's precision; each operator (product, softmax, sum)
    computes in fp32 or wider and rounds its result once.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, masks: tuple[tuple[int, int, Tensor], ...]) -> Tensor:
        """Return the attention output of every slot, [slots, C]."""
        ctx.bias_dtype = bias.dtype
        packed, probabilities = attention_probabilities(qkv, bias, masks)
        ctx.save_for_backward(packed, probabilities)
        return (probabilities @ packed[2]).transpose(1, 2).reshape(len(qkv), -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of qkv and bias."""
        packed, probabilities = ctx.saved_tensors
        _, windows, heads, length, depth = packed.shape
        grad = grad.reshape(windows, length, heads, depth).transpose(1, 2).reshape(-1, length, depth)
        # From here on, windows and heads are one dimension of the batched products.
        p, (q, k, v) = probabilities.flatten(0, 1), packed.flatten(1, 2)
        grad_packed = torch.empty_like(packed)
        grad_q, grad_k, grad_v = grad_packed.flatten(1, 2)
        torch.bmm(p.transpose(1, 2), grad, out=grad_v)
        grad_scores = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), p, -1, p.dtype)
        scale = depth**-0.5
        torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
        torch.baddbmm(grad_k, grad_scores.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)
        grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_bias = grad_scores.view(windows, heads, length, length).sum(0).to(ctx.bias_dtype)
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


def attention_probabilities(
    qkv: Tensor, bias: Tensor, masks: tuple[tuple[int, int, Tensor], ...]
) -> tuple[Tensor, Tensor]:
    """Return packed q, k, v [3, windows, heads, L, d] and the attention probabilities [windows, heads, L, L].

    A row of the probabilities is one query's distribution over the slots of its window. Both are in qkv's precision.

    Args:
        qkv: [slots, 3C].
        bias: [heads, L, L].
        masks: for each kind of shifted window (first, end, mask): mask [L, L] is added to the scores of windows
            first … end − 1.
    """
    heads, length, _ = bias.shape
    packed = qkv.view(-1, length, 3, heads, qkv.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4).contiguous()
    q, k, _ = packed.flatten(1, 2)  # each [windows · heads, L, d]
    scores = qkv.new_empty(packed.shape[1], heads, length, length)
    # A row's mean changes no probability, but the narrow sums below would be less exact with it.
    bias = bias - bias.mean(-1, keepdim=True)
    unmasked = bias.to(qkv.dtype).contiguous()
    done = 0
    for first, end, mask in masks:
        scores[done:first] = unmasked
        scores[first:end] = (bias + mask).to(qkv.dtype)
        done = end
    scores[done:] = unmasked
    flat = scores.flatten(0, 1)  # the product is added to bias and mask, in one pass
    torch.baddbmm(flat, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5, out=flat)
    return packed, scores.softmax(-1, dtype=scores.dtype)  # autocast on a GPU would widen it
