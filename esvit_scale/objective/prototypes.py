"""The cross-entropy between teacher and student over K prototypes, exact, without storing a single tokens × K matrix.

The slow algorithm, which the tests use as their oracle (all z unit rows [·, D], W [K, D], c [K]):

    for s in student tokens:
        q = log_softmax(W_s @ z_s[s] / student_temp)                          # [K]
        for m in range(M):                                                    # its teacher tokens
            p = softmax((W_t @ z_t[match[s, m]] - c) / teacher_temp)          # [K]
            loss += weight[s, m] * -(p * q).sum()

The fast algorithm uses  −Σ_k p_k log_softmax(W z/τ)_k = logsumexp(W z/τ) − (Wᵀp)·z/τ : the first term needs one pass
per student token, however many teacher tokens it has, the second only the teacher's expected prototype e = Wᵀp, D
numbers per teacher token. The weights of the mean are known beforehand, so the forward can compute the gradients too:

    dz_s = m·(P W)/τ − Σ_m weight·e/τ          with P = softmax(W z/τ), m = Σ_m weight
    dW   = Pᵀ(m z)/τ − Σ_t p_tᵀ G_t/τ          with G_t = Σ over the (s, m) matched to t of weight·z_s

The passes over all logits have two implementations (prototype_passes.py). Both compute the logits twice, for
log-sum-exps first and for probabilities then (4 matrix products where 3 would do): in return, the dW of a tile of
prototypes is complete at the end of the tile's turn and is written once, in its final precision, and nothing larger than
a tile is stored.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit_scale.objective.objective import fixed_precision
from esvit_scale.objective.prototype_passes import Passes, Side
from esvit_scale.objective.prototype_tiles import TilePasses


class Entropies(NamedTuple):
    """Entropies of the probabilities, in nats, and the loss in parts; without gradient."""

    teacher: Tensor  # mean over tokens of H(p_t): 0 for one prototype per token, ln K for uniform
    student: Tensor  # mean over tokens of H(softmax(z_s))
    usage: Tensor  # H(mean over tokens of p_t): its exponential is the number of prototypes in use
    columns: Tensor  # [M], the loss of each column of `match`; their sum is the loss


def prototype_cross_entropy(
    z_s: Tensor,
    rows_s: Tensor,
    z_t: Tensor,
    rows_t: Tensor,
    center: Tensor,
    match: Tensor,
    weight: Tensor,
    student_temp: float,
    teacher_temp: float,
    passes: Passes | None = None,
) -> tuple[Tensor, Entropies]:
    """Return Σ over student tokens s and teacher tokens t = match[s, m] of weight[s, m] · cross-entropy(p_t, q_s).

    Matrix products run in z_s's dtype (bf16 for fp16; for bf16 in fp32 on some CPUs, models/products.py); log-sum-exp,
    probabilities, centre and accumulations in fp32 (fp64 for fp64).

    Args:
        z_s: [N_s, D] the student's bottleneck, unit rows.
        rows_s: [K, D] the student's prototypes; gradients flow to z_s and rows_s only.
        z_t: [N_t, D] the teacher's bottleneck.
        rows_t: [K, D] the teacher's prototypes.
        center: fp32 [K], subtracted from the teacher's logits.
        match: int64 [N_s, M] rows of z_t.
        weight: [N_s, M]; 0 leaves a pair out.
        student_temp, teacher_temp: τ.
        passes: the implementation of the passes over all logits; None: `TilePasses`.

    Returns:
        The loss (scalar), and the entropies of teacher and student with the loss of each column.
    """
    if z_s.dtype == torch.float16:  # P ~ 1/K and its products are below what fp16 resolves
        z_s = z_s.bfloat16()
    passes = passes or TilePasses()
    with fixed_precision(z_s.device):
        loss, *entropies = _PrototypeCrossEntropy.apply(
            z_s, rows_s, z_t, rows_t, center, match, weight, student_temp, teacher_temp, passes
        )
    return loss, Entropies(*entropies)


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z_s: Tensor,
        rows_s: Tensor,
        z_t: Tensor,
        rows_t: Tensor,
        center: Tensor,
        match: Tensor,
        weight: Tensor,
        student_temp: float,
        teacher_temp: float,
        passes: Passes,
    ) -> tuple[Tensor, ...]:
        dtype = z_s.dtype
        wide = torch.promote_types(dtype, torch.float32)
        weight = weight.to(wide)
        mass = weight.sum(1)  # [N_s]
        pull = _matched_sum(z_s.to(wide), match, weight, len(z_t))  # G [N_t, D]
        student = Side(z_s, rows_s.to(dtype), student_temp, None)
        teacher = Side(z_t.to(dtype), rows_t.to(dtype), teacher_temp, center.to(wide))
        towards = torch.cat([z_s * mass[:, None], -pull]).div_(student_temp)  # [N_s + N_t, D]
        found = passes.expectations(student, teacher, towards, ctx.needs_input_grad[1])
        loss = torch.dot(mass, found.log_sums) - (found.teacher_means * pull).sum() / student_temp

        grad_z = found.student_means * mass[:, None] if ctx.needs_input_grad[0] else None
        columns = []
        for m in range(match.shape[1]):
            mean = found.teacher_means[match[:, m]]  # e of each pair, [N_s, D]
            if grad_z is not None:
                grad_z.addcmul_(mean, weight[:, m, None], value=-1)
            columns.append(torch.dot(weight[:, m], found.log_sums - (mean * z_s).sum(1) / student_temp))
        if grad_z is not None:
            grad_z = grad_z.div_(student_temp).to(dtype)
        entropies = found.teacher_entropy, found.student_entropy, found.usage_entropy, torch.stack(columns)
        grad_rows = None if found.grad_rows is None else found.grad_rows.to(rows_s.dtype)
        # Attributes instead of save_for_backward, because the backward scales the gradients in place and returns them.
        ctx.gradients = grad_z, grad_rows
        ctx.mark_non_differentiable(*entropies)
        return loss, *entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("prototype_cross_entropy: its backward can run once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(g.mul_(grad_loss) if g is not None else None for g in gradients), *[None] * 8


def _matched_sum(z: Tensor, match: Tensor, weight: Tensor, teachers: int) -> Tensor:
    total = z.new_zeros(teachers, z.shape[1])
    for m in range(match.shape[1]):
        total.index_add_(0, match[:, m], z * weight[:, m, None])
    return total
