"""Swin V2 on packed batches: its blocks, patch merging and attention; everything else is inherited from models/swin.py.

Swin Transformer V2 (Liu et al. 2022, https://arxiv.org/abs/2111.09883), with the details of its published code: each
residual branch ends with its norm, before it is added; attention scores are cosines with a learned temperature per
head; the position bias is computed by a small network from log-spaced distances, so its parameters do not depend on
the window. Windows, shifts and padding are those of V1 as EsViT runs it.

Parameter names are those of the published code.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esvit_scale.models import swin_detectors, swin_forms
from esvit_scale.models.block_parts import GeluMlp, add_branch
from esvit_scale.models.descriptions import DetectorForm, HuggingFaceForm, TimmForm, TrunkCard, TrunkFormulas
from esvit_scale.models.distributions import Initializer, constant
from esvit_scale.models.layer_norm import LayerNorm
from esvit_scale.models.products import linear
from esvit_scale.models.swin import Attend, Swin
from esvit_scale.models.swin_costs import SwinV2Formulas
from esvit_scale.models.window_attention import attend_math, bias_of_pairs
from esvit_scale.models.window_attention_implementations import AttendWindows
from esvit_scale.models.windows import (
    Permutation,
    WindowPlan,
    window_partition,
    window_reverse,
)

NORM_EPS = 1e-5
BIAS_HIDDEN = 512  # hidden width of the position-bias network
BIAS_MAX = 16.0  # the position bias is in 0 … 16
LOGIT_SCALE_MAX = math.log(100.0)  # the temperature is at least 0.01
EXTRA_NORM_STAGE = 2  # index of the third stage
SHORTEST = 1e-12  # queries and keys below this length count as zero


class SwinV2(Swin):
    """A Swin V2 trunk.

    Args:
        extra_norm_every: norm the residual stream once more after every so many blocks of the third stage, as the
            paper's sizes H and G do; None: never.
        pretrained_windows: side of each stage's windows in the training that the weights come from, as in the published
            code for other windows: distances are scaled by it, so that the bias between two tokens stays as it was. None:
            the present windows.
        embed_dim, depths, heads, window, size, drop_path: as in `Swin`.
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
        pretrained_windows: Sequence[int] | None = None,
    ) -> None:
        # make_block, which the base constructor calls, reads these.
        self.extra_norm_every, self.pretrained_windows = extra_norm_every, pretrained_windows
        super().__init__(embed_dim, depths, heads, window, size, drop_path)
        self.distance_windows = tuple(pretrained_windows or (stage.window for stage in self.stages))

    def make_block(self, stage: int, index: int, dim: int, heads: int, window: int) -> "BlockV2":
        """Return the new block `index` of a stage (both from 0), of width `dim`."""
        every = self.extra_norm_every
        extra_norm = stage == EXTRA_NORM_STAGE and every is not None and index % every == every - 1
        before = window if self.pretrained_windows is None else self.pretrained_windows[stage]
        return BlockV2(dim, heads, window, extra_norm, before)

    def make_merging(self, dim: int) -> "PatchMergingV2":
        """Return the new patch merging that follows a stage of width `dim`."""
        return PatchMergingV2(dim)

    def formulas(self) -> TrunkFormulas:
        """Return the formulas for the trunk's FLOPs and activation memory."""
        return SwinV2Formulas(self)

    def card(self) -> TrunkCard:
        """Return what a model card says about the trunk."""
        return swin_forms.card(self, "Swin V2")

    def timm_form(self, size: int) -> TimmForm:
        """Return a description of the trunk as a timm network.

        Raises:
            UserError: the trunk has extra norms, or a window needs padding at `size` pixels; timm differs in both.
        """
        return swin_forms.timm_v2(self, size)

    def huggingface_form(self, size: int) -> HuggingFaceForm:
        """Return a description of the trunk as a transformers model; raises UserError as `timm_form` does."""
        return swin_forms.huggingface_v2(self, size)

    def detector_form(self, library: str) -> DetectorForm:
        """Return how the trunk's weights are written for torchvision, the only one of the libraries that has a Swin V2.

        Raises:
            UserError: for other libraries; the trunk has extra norms; or as for a V1.
        """
        return swin_detectors.detector_v2(self, library)


class BlockV2(nn.Module):
    """A Swin V2 block: window attention, then an MLP, each normed before it is added to the residual stream."""

    def __init__(self, dim: int, heads: int, window: int, extra_norm: bool, pretrained_window: int) -> None:
        super().__init__()
        self.attn = WindowAttentionV2(dim, heads, window, pretrained_window)
        self.norm1 = BranchNorm(dim, eps=NORM_EPS)
        self.mlp = GeluMlp(dim)
        self.norm2 = BranchNorm(dim, eps=NORM_EPS)
        self.extra_norm = nn.LayerNorm(dim, eps=NORM_EPS) if extra_norm else None

    def forward(self, tokens: Tensor, plan: WindowPlan, keep_attn: Tensor | None, keep_mlp: Tensor | None) -> Tensor:
        """Map tokens [N, C] to [N, C]; keep_attn and keep_mlp [N, 1] scale the two branches (0: dropped, None: 1)."""
        return self.with_attention(tokens, lambda x: self.attn(x, plan), keep_attn, keep_mlp)

    def with_attention(
        self, tokens: Tensor, attention: Attend, keep_attn: Tensor | None, keep_mlp: Tensor | None
    ) -> Tensor:
        """Compute the block with the function `attention` in place of the block's own window attention."""
        tokens = add_branch(tokens, self.norm1(attention(tokens)), keep_attn)
        tokens = add_branch(tokens, self.norm2(self.mlp(tokens)), keep_mlp)
        return tokens if self.extra_norm is None else self.extra_norm(tokens)


class BranchNorm(LayerNorm):
    """The layer norm that ends a residual branch; its gain starts at 0, so that a block starts as the identity."""

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of gain and bias."""
        return {"weight": constant(0.0), "bias": constant(0.0)}


class WindowAttentionV2(nn.Module):
    """Cosine window attention, softmax(cos(q, k)/τ + position bias + mask) V; qkv and proj run on real tokens only.

    Keys have no bias, as in the published code.
    """

    def __init__(self, dim: int, heads: int, window: int, pretrained_window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window, self.pretrained_window = window, pretrained_window
        self.attend: AttendWindows = attend_math  # `Swin.use_attention` replaces it
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))  # −log τ
        self.cpb_mlp = nn.Sequential(WideLinear(2, BIAS_HIDDEN), nn.ReLU(), WideLinear(BIAS_HIDDEN, heads, bias=False))
        self.qkv = SlotProjection(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, plan: WindowPlan) -> Tensor:  # [N, C] → [N, C]
        """Map tokens [N, C] to [N, C]."""
        mixed = self.attend(self.scaled_qkv(tokens, plan), self.bias_table(tokens.device), plan)  # [slots, C]
        return self.proj(window_reverse(mixed, plan.slots))

    def initial_values(self) -> dict[str, Initializer]:
        """Return the initialisers of temperatures and biases: temperatures start at 1/10."""
        return {"logit_scale": constant(math.log(10.0)), "q_bias": constant(0.0), "v_bias": constant(0.0)}

    def operands(self, tokens: Tensor, plan: WindowPlan) -> tuple[Tensor, Tensor]:
        """Return the inputs of `attention_probabilities`: qkv [slots, 3C] and the position bias [heads, L, L]."""
        return self.scaled_qkv(tokens, plan), self.position_bias(tokens.device)

    def scaled_qkv(self, tokens: Tensor, plan: WindowPlan) -> Tensor:
        """Return qkv of every slot, [slots, 3C], with queries and keys scaled."""
        return UnitQueriesKeys.apply(self.qkv(tokens, plan.slots, self.qkv_bias()), self.scale())

    def qkv_bias(self) -> Tensor:
        """Return the bias of queries, keys (zeros) and values, [3C]."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def scaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale queries and keys […, heads, L, d] so that q kᵀ is the attention score before bias and mask."""
        return F.normalize(q, dim=-1) * self.scale().view(-1, 1, 1), F.normalize(k, dim=-1)

    def scale(self) -> Tensor:
        """Return 1/τ of every head, [heads], in fp32 or wider."""
        wide = torch.promote_types(self.logit_scale.dtype, torch.float32)
        return self.logit_scale.to(wide).clamp(max=LOGIT_SCALE_MAX).exp().flatten()

    def position_bias(self, device: torch.device) -> Tensor:
        """Return the position bias, [heads, L, L] with L = window², in fp32 or wider."""
        return bias_of_pairs(self.bias_table(device), self.window)

    def bias_table(self, device: torch.device) -> Tensor:
        """Return the position bias of every relative distance, [(2·window − 1)², heads], in fp32 or wider."""
        distances = relative_distances(self.window, self.pretrained_window, device)
        return BIAS_MAX * torch.sigmoid(self.cpb_mlp(distances))


class WideLinear(nn.Linear):
    """A linear layer that computes in fp32 or wider whatever the precision of its parameters.

    It is for the position bias, which is added to attention scores and has few rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x […, C] to […, C'] in fp32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))


class SlotProjection(nn.Linear):
    """A projection of real tokens to queries, keys and values in window slots.

    Swin pads with zero tokens, whose queries, keys and values are the bias: the slots of pads are filled with that.
    """

    def forward(self, tokens: Tensor, plan: Permutation, bias: Tensor) -> Tensor:  # type: ignore[override]
        """Map tokens [N, C] to window slots [slots, 3C]."""
        return window_partition(linear(tokens, self.weight, bias), plan, fill=bias)  # [N, C] → [slots, 3C]


class UnitQueriesKeys(torch.autograd.Function):
    """A rescaling of qkv [slots, 3C]: every head's keys to unit length, its queries to length scale·√d.

    `Attention`, which divides by √d, then computes scale·cos(q, k). Lengths are computed in fp32 or wider. The backward
    is written by hand because autograd would save four fp32 copies of queries and keys. A query or key of length zero
    (that of a pad while the bias is zero) stays zero and has gradient zero.
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
    """Multiply `like` [·, 1 or 2, heads, 1] by the target lengths of queries (scale·√d) and keys (1), with d = `depth`.

    The result is [·, 2, heads, 1].
    """
    lengths = torch.stack([scale * depth**0.5, torch.ones_like(scale)]).unsqueeze(-1)  # [2, heads, 1]
    return like * lengths


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@lru_cache(maxsize=64)
def relative_distances(window: int, pretrained_window: int, device: torch.device) -> Tensor:
    """Return the log-spaced distance (dy, dx) of each row of the bias table, float64 [(2w−1)², 2] with w = `window`.

    Distances are first scaled to −8 … 8 over a window of side `pretrained_window`; the logarithm maps these to about ±1.
    """
    steps = torch.arange(-(window - 1), window, dtype=torch.float64) * (8 / max(pretrained_window - 1, 1))
    spaced = steps.sign() * torch.log2(steps.abs() + 1) / math.log2(8)
    with torch.inference_mode(False):
        return torch.cartesian_prod(spaced, spaced).to(device)


class PatchMergingV2(nn.Module):
    """Patch merging: 2×2 neighbouring tokens become one of twice the width, which is then normed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=NORM_EPS)

    def forward(self, tokens: Tensor, plan: Permutation) -> Tensor:
        """Map the tokens [N, C] of all crops to merged tokens [N', 2C]."""
        return self.reduce(window_partition(tokens, plan).view(-1, 4 * tokens.shape[1]))

    def reduce(self, quads: Tensor) -> Tensor:
        """Map four neighbouring tokens, concatenated to […, 4C], to one merged token […, 2C]."""
        return self.norm(self.reduction(quads))
