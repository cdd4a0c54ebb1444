"""The interface through which the loss over prototypes goes over all logits, and its implementations by name.

The names are those of `objective.prototype_loss`. Both implementations give the same results up to rounding:

- tiles: matrix products and elementwise operations of torch on tiles of logits (prototype_tiles.py); any device and type.
- triton: fused kernels that keep the tiles in registers (prototype_triton.py); CUDA, products in bf16.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from esvit_scale.models import triton_support

NAMES = ("tiles", "triton")
LARGEST_BOTTLENECK = 256  # numbers of a prototype; wider accumulators of the Triton kernels would spill registers


class Side(NamedTuple):
    """The tokens z of one network, and the prototypes W, temperature τ and centre c of their logits (z Wᵀ − c)/τ."""

    z: Tensor  # [n, D]
    rows: Tensor  # [K, D], of z's type
    temp: float
    center: Tensor | None  # [K]


class Expectations(NamedTuple):
    """What the loss takes from the logits of N_s student and N_t teacher tokens; fp32 (fp64 for fp64)."""

    log_sums: Tensor  # [N_s] log Σ exp(logits) of the student
    student_means: Tensor  # [N_s, D] each token's expectation of the student's prototypes under its probabilities
    teacher_means: Tensor  # [N_t, D] the same for the teacher's probabilities, of the student's prototypes too
    grad_rows: Tensor | None  # [K, D] Pᵀ towards, in z's type
    teacher_entropy: Tensor  # mean over tokens, as the next
    student_entropy: Tensor
    usage_entropy: Tensor  # of the teacher's mean probabilities


class Passes(ABC):
    """The passes over all logits, of which the loss and Sinkhorn's centring consist. None stores tokens × K numbers."""

    @abstractmethod
    def log_sum_exp(self, side: Side) -> Tensor:
        """Return log Σ_k exp(logit_k) of every token, [n]."""

    @abstractmethod
    def column_log_sum_exp(self, side: Side, added: Tensor) -> Tensor:
        """Return log Σ_i exp(logit_ik + added_i) over the tokens i for every prototype k, [K]; `added` is [n]."""

    @abstractmethod
    def expectations(self, student: Side, teacher: Side, towards: Tensor, with_grad_rows: bool) -> Expectations:
        """Return log-sum-exps, expectations, entropies and, if asked for, Pᵀ times `towards` [N_s + N_t, D].

        P [N_s + N_t, K] are the probabilities of the student's and then the teacher's tokens.
        """


def implementation(name: str) -> Passes:
    """Return the implementation of a name in `NAMES`; triton is imported only when it is asked for."""
    if name == "triton":
        from esvit_scale.objective.prototype_triton import TritonPasses

        return TritonPasses()
    from esvit_scale.objective.prototype_tiles import TilePasses

    return TilePasses()


def unavailable(name: str, device: torch.device, dtype: torch.dtype, bottleneck: int) -> str | None:
    """Return why an implementation cannot run on a device, as a clause; None when it may.

    Args:
        dtype: of the tokens.
        bottleneck: D, numbers of a token.
    """
    if name == "tiles":
        return None
    if problem := triton_support.unavailable(device):
        return problem
    if dtype not in (torch.bfloat16, torch.float16) and device.type == "cuda":
        return f"multiplies in bf16, and this run's products are in {str(dtype).removeprefix('torch.')}"
    if bottleneck > LARGEST_BOTTLENECK:
        return f"needs objective.bottleneck ≤ {LARGEST_BOTTLENECK}"
    return None
