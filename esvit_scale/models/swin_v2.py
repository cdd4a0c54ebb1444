"""Swin V2 in the packed trunk: its blocks, its patch merging and its attention; everything else is models/swin.py.

Swin Transformer V2 (Liu et al. 2022, https://arxiv.org/abs/2111.09883), with the details of its published code: norms
come after a branch, on its way into the main one; attention is by cosine with a learned temperature per head; the
position bias is a small network over log-spaced distances, so its size does not depend on the window. Windows, shifts
and padding are V1's as EsViT runs it.

Parameter names are those of the published code.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esvit_scale.models import swin_forms
from esvit_scale.models.block_parts import GeluMlp, add_branch
from esvit_scale.models.descriptions import HuggingFaceForm, TimmForm, TrunkCard, TrunkFormulas
from esvit_scale.models.distributions import Initializer, constant
from esvit_scale.models.layer_norm import LayerNorm
from esvit_scale.models.swin import Attend, Attention, Swin
from esvit_scale.models.swin_costs import SwinV2Formulas
from esvit_scale.models.windows import (
    Permutation,
    WindowPlan,
    relative_position_index,
    window_partition,
    window_reverse,
)

NORM_EPS = 1e-5
BIAS_HIDDEN = 512  # width of the position bias's network
BIAS_MAX = 16.0  # the position bias is in 0 … 16
LOGIT_SCALE_MAX = math.log(100.0)  # the temperature is at least 0.01
EXTRA_NORM_STAGE = 2  # the third
SHORTEST = 1e-12  # queries and keys below this length count as zero


class SwinV2(Swin):
    """A Swin V2 trunk.

    Args:
        extra_norm_every: the largest sizes (H and G of the paper) norm the main branch after every so many blocks of
            the third stage; None: never.
        Others as `Swin`.
    """

    norm_eps = NORM_EPS

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        size: int = 224,
        drop_path: float = 0.0,
        extra_norm_every: int | None = None,
    ) -> None:
        self.extra_norm_every = extra_norm_every  # read by make_block, which the base class calls
        super().__init__(embed_dim, depths, heads, window, size, drop_path)

    def make_block(self, stage: int, index: int, dim: int, heads: int, window: int) -> "BlockV2":
        """Return block `index` of a stage, of width `dim`."""
        every = self.extra_norm_every
        return BlockV2(
            dim, heads, window, stage == EXTRA_NORM_STAGE and every is not None and index % every == every - 1
        )

    def make_merging(self, dim: int) -> "PatchMergingV2":
        """Return the patch merging after a stage of width `dim`."""
        return PatchMergingV2(dim)

    def formulas(self) -> TrunkFormulas:
        """Return the costs in closed form."""
        return SwinV2Formulas(self)

    def card(self) -> TrunkCard:
        """Return what a model card says about the trunk."""
        return swin_forms.card(self, "Swin V2")

    def timm_form(self, size: int) -> TimmForm:
        """Return what the trunk is to timm; raise UserError where timm has no extra norms or pads windows otherwise."""
        return swin_forms.timm_v2(self, size)

    def huggingface_form(self, size: int) -> HuggingFaceForm:
        """Return what the trunk is to transformers; raise UserError as `timm_form`."""
        return swin_forms.huggingface_v2(self, size)


class BlockV2(nn.Module):
    """Window attention and MLP, each normed after it and before it is added."""

    def __init__(self, dim: int, heads: int, window: int, extra_norm: bool) -> None:
        super().__init__()
        self.attn = WindowAttentionV2(dim, heads, window)
        self.norm1 = BranchNorm(dim, eps=NORM_EPS)
        self.mlp = GeluMlp(dim)
        self.norm2 = BranchNorm(dim, eps=NORM_EPS)
        self.extra_norm = nn.LayerNorm(dim, eps=NORM_EPS) if extra_norm else None

    def forward(self, tokens: Tensor, plan: WindowPlan, keep_attn: Tensor | None, keep_mlp: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C]; keep_* [N, 1] scales a branch (0: dropped), None keeps it."""
        return self.with_attention(tokens, lambda x: self.attn(x, plan), keep_attn, keep_mlp)

    def with_attention(
        self, tokens: Tensor, attention: Attend, keep_attn: Tensor | None, keep_mlp: Tensor | None
    ) -> Tensor:
        """Compute the block with another function in the place of its window attention."""
        tokens = add_branch(tokens, self.norm1(attention(tokens)), keep_attn)
        tokens = add_branch(tokens, self.norm2(self.mlp(tokens)), keep_mlp)
        return tokens if self.extra_norm is None else self.extra_norm(tokens)


class BranchNorm(LayerNorm):
    """The norm at the end of a branch; its gain starts at 0, so that a block starts as the identity."""

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of gain and bias."""
        return {"weight": constant(0.0), "bias": constant(0.0)}


class WindowAttentionV2(nn.Module):
    """softmax(τ⁻¹ cos(q, k) + position bias + mask) V within windows; qkv and proj run on real tokens only.

    Keys have no bias (softmax would not see most of it).
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))  # −log τ
        self.cpb_mlp = nn.Sequential(WideLinear(2, BIAS_HIDDEN), nn.ReLU(), WideLinear(BIAS_HIDDEN, heads, bias=False))
        self.qkv = SlotProjection(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, plan: WindowPlan) -> Tensor:  # [N, C] → [N, C]
        """Map tokens [N, C] to [N, C]."""
        mixed = Attention.apply(*self.operands(tokens, plan), plan.masks)  # [slots, C]
        return self.proj(window_reverse(mixed, plan.slots))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of temperatures and biases: temperatures start at 1/10."""
        return {"logit_scale": constant(math.log(10.0)), "q_bias": constant(0.0), "v_bias": constant(0.0)}

    def operands(self, tokens: Tensor, plan: WindowPlan) -> tuple[Tensor, Tensor]:
        """Return what `Attention` takes: qkv [slots, 3C], queries and keys scaled, and the position bias [heads, L, L]."""
        qkv = self.qkv(tokens, plan.slots, self.qkv_bias())
        return UnitQueriesKeys.apply(qkv, self.scale()), self.position_bias(tokens.device)

    def qkv_bias(self) -> Tensor:
        """Return the bias of queries, keys (zeros) and values, [3C]."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale queries and keys […, heads, L, d] so that their product is the score."""
        return F.normalize(q, dim=-1) * self.scale().view(-1, 1, 1), F.normalize(k, dim=-1)

    def scale(self) -> Tensor:
        """Return 1/τ of every head, [heads], in fp32 or wider."""
        wide = torch.promote_types(self.logit_scale.dtype, torch.float32)
        return self.logit_scale.to(wide).clamp(max=LOGIT_SCALE_MAX).exp().flatten()

    def position_bias(self, device: torch.device) -> Tensor:
        """Return the position bias, [heads, L, L], in fp32 or wider."""
        length = self.window**2
        table = BIAS_MAX * torch.sigmoid(self.cpb_mlp(relative_distances(self.window, device)))  # [(2w−1)², heads]
        index = relative_position_index(self.window, device)
        return table.index_select(0, index).view(length, length, -1).permute(2, 0, 1)


class WideLinear(nn.Linear):
    """A linear layer in fp32 or wider whatever the parameters' precision: its rows are few and its outputs scores."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, C] to […, C'] in fp32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


class SlotProjection(nn.Linear):
    """The projection to queries, keys and values, laid into window slots; a pad is a zero token, so its qkv is the
    bias."""

    def forward(self, tokens: Tensor, plan: Permutation, bias: Tensor) -> Tensor:  # type: ignore[override]
        """Map tokens [N, C] to window slots [slots, 3C]."""
        return window_partition(F.linear(tokens, self.weight, bias), plan, fill=bias)  # [N, C] → [slots, 3C]


class UnitQueriesKeys(torch.autograd.Function):
    """The map of qkv [slots, 3C] to the same with every head's key at unit length and its query at length scale·√d.

    `Attention`, which divides by √d, then computes scale·cos(q, k). Lengths are computed in fp32 or wider. Written
    out with its backward because autograd's keeps four wide copies of queries and keys. A query or key of length zero
    (a pad's, before there is a bias) stays zero and has gradient zero.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor) -> Tensor:
        """Return qkv [slots, 3C] with queries and keys rescaled."""
        parts = qkv.view(len(qkv), 3, len(scale), -1)  # [slots, 3, heads, d]
        lengths = torch.linalg.vector_norm(parts[:, :2], dim=-1, keepdim=True, dtype=_wide(qkv))  # [slots, 2, heads, 1]
        inverse = torch.where(lengths > SHORTEST, lengths.reciprocal(), 0.0)
        out = qkv.clone()
        unit = out.view_as(parts)
        unit[:, :2] = parts[:, :2] * _factors(inverse, scale, parts.shape[-1])
        ctx.save_for_backward(out, inverse, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of qkv and scale."""
        out, inverse, scale = ctx.saved_tensors
        slots, heads = len(out), len(scale)
        unit, grad = out.view(slots, 3, heads, -1), grad.reshape(slots, 3, heads, -1)
        depth = unit.shape[-1]
        # y = f·x/‖x‖ with f = (scale·√d, 1): dx = f/‖x‖·(dy − y (y·dy)/f²), and Σ y·dy/f over slots is df.
        dots = (unit[:, :2] * grad[:, :2]).sum(-1, keepdim=True, dtype=_wide(out))  # [slots, 2, heads, 1]
        factors = _factors(torch.ones_like(scale).view(1, 1, heads, 1), scale, depth)  # [1, 2, heads, 1]
        grad_qkv = grad.clone()
        inner = grad[:, :2] - unit[:, :2] * (dots / factors.square())
        grad_qkv[:, :2] = inner * (inverse * factors)
        grad_scale = dots[:, 0].sum(0).flatten() / scale if ctx.needs_input_grad[1] else None
        return grad_qkv.view(slots, -1), grad_scale


def _factors(like: Tensor, scale: Tensor, depth: int) -> Tensor:
    """Multiply `like` [·, 1 or 2, heads, 1] by the lengths of queries (scale·√d) and keys (1): [·, 2, heads, 1]."""
    lengths = torch.stack([scale * depth**0.5, torch.ones_like(scale)]).unsqueeze(-1)  # [2, heads, 1]
    return like * lengths


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@lru_cache(maxsize=64)
def relative_distances(window: int, device: torch.device) -> Tensor:
    """Return (dy, dx) of each row of the bias table, float64 [(2w−1)², 2].

    Distances are scaled to −8 … 8 over the window and log-spaced to about ±1.
    """
    steps = torch.arange(-(window - 1), window, dtype=torch.float64) * (8 / max(window - 1, 1))
    spaced = steps.sign() * torch.log2(steps.abs() + 1) / math.log2(8)
    with torch.inference_mode(False):
        return torch.cartesian_prod(spaced, spaced).to(device)


class PatchMergingV2(nn.Module):
    """Four neighbouring tokens to one of twice the width, then the norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=NORM_EPS)

    def forward(self, tokens: Tensor, plan: Permutation) -> Tensor:
        """Map tokens [N, C] to [N', 2C]."""
        return self.reduce(window_partition(tokens, plan).view(-1, 4 * tokens.shape[1]))

    def reduce(self, quads: Tensor) -> Tensor:
        """Map four neighbours in a row, […, 4C], to one token […, 2C]."""
        return self.norm(self.reduction(quads))
