"""The cross-entropy between teacher and student over K prototypes, exact, without storing a single tokens × K matrix.

The slow algorithm, which the tests use as their oracle (all z unit rows [·, D], W [K, D], c [K]):

    for s in student tokens:
        q = log_softmax(W_s @ z_s[s] / student_temp)                          # [K]
        for m in range(M):                                                    # its teacher tokens
            p = softmax((W_t @ z_t[match[s, m]] - c) / teacher_temp)          # [K]
            loss += weight[s, m] * -(p * q).sum()

The fast one rests on  −Σ_k p_k log_softmax(W z/τ)_k = logsumexp(W z/τ) − (Wᵀp)·z/τ : the first term needs one pass per
student token whatever the number of its teachers, the second only the teacher's expected prototype e = Wᵀp, D numbers
per teacher token. The weights of the mean are known beforehand, so the gradients are too, in the same chunks:

    dz_s = m·(P W)/τ − Σ_m weight·e/τ          with P = softmax(W z/τ), m = Σ_m weight
    dW   = Pᵀ(m z)/τ − Σ_t p_tᵀ G_t/τ          with G_t = Σ over the (s, m) matched to t of weight·z_s
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of one chunk × K matrix in fp32


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
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ over student tokens s and their teacher tokens t = match[s, m] of weight[s, m] · cross-entropy(p_t, q_s).

    Matrix products run in z_s's dtype; log-sum-exp, probabilities, centre and accumulations in fp32 (fp64 for fp64).

    Args:
        z_s: [N_s, D] the student's bottleneck, unit rows.
        rows_s: [K, D] the student's prototypes; gradients flow to z_s and rows_s only.
        z_t: [N_t, D] the teacher's bottleneck.
        rows_t: [K, D] the teacher's prototypes.
        center: fp32 [K], subtracted from the teacher's logits.
        match: int64 [N_s, M] rows of z_t.
        weight: [N_s, M]; 0 leaves a pair out.
        student_temp, teacher_temp: τ.
        chunk: tokens handled at once; None: as many as CHUNK_BYTES allows.

    Returns:
        The loss (scalar) and the mean entropy of the teacher's probabilities in nats (scalar, without gradient).
    """
    chunk = chunk or max(1, CHUNK_BYTES // (4 * rows_s.shape[0]))
    return _PrototypeCrossEntropy.apply(
        z_s, rows_s, z_t, rows_t, center, match, weight, student_temp, teacher_temp, chunk
    )


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
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = z_s.dtype
        wide = torch.promote_types(dtype, torch.float32)
        prototypes, weight = rows_s.to(dtype), weight.to(wide)
        grad_rows = torch.zeros_like(prototypes, dtype=wide) if ctx.needs_input_grad[1] else None

        pull = _matched_sum(z_s.to(wide), match, weight, len(z_t))  # G [N_t, D]
        expected, entropy = _teacher(
            z_t.to(dtype),
            rows_t.to(dtype),
            center.to(wide),
            teacher_temp,
            prototypes,
            pull / -student_temp,
            grad_rows,
            chunk,
        )
        mass = weight.sum(1)  # [N_s]
        log_sums, grad_z = _student(z_s, prototypes, student_temp, mass, ctx.needs_input_grad[0], grad_rows, chunk)
        loss = torch.dot(mass, log_sums) - (expected * pull).sum() / student_temp
        if grad_z is not None:
            for m in range(match.shape[1]):
                grad_z.addcmul_(expected[match[:, m]], weight[:, m, None], value=-1 / student_temp)
            grad_z = grad_z.to(dtype)
        ctx.save_for_backward(grad_z, grad_rows)
        ctx.rows_dtype = rows_s.dtype
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_z, grad_rows = ctx.saved_tensors
        scaled_z = grad_z * grad_loss.to(grad_z.dtype) if grad_z is not None else None
        scaled_rows = (grad_rows * grad_loss).to(ctx.rows_dtype) if grad_rows is not None else None
        return scaled_z, scaled_rows, *[None] * 8


def _teacher(
    z: Tensor,
    rows: Tensor,
    center: Tensor,
    temp: float,
    student_rows: Tensor,
    pull: Tensor,
    grad_rows: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Expected student prototypes e [N_t, D] and the mean entropy; adds p_tᵀ pull to grad_rows [K, D]."""
    expected = torch.empty_like(pull)
    entropy = pull.new_zeros(())
    for part, logits, p in _softmax_chunks(z, rows, temp, center, chunk):
        entropy += (_log_sum_exp(logits, p) - torch.linalg.vecdot(p, logits)).sum()
        p = p.to(z.dtype)
        expected[part] = p @ student_rows
        if grad_rows is not None:
            _add_product_(grad_rows, p, pull[part].to(z.dtype))
    return expected, entropy / len(z)


def _student(
    z: Tensor,
    rows: Tensor,
    temp: float,
    mass: Tensor,
    with_grad_z: bool,
    grad_rows: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor | None]:
    """logsumexp of each token's logits [N_s] and m·(P W)/τ [N_s, D]; adds Pᵀ(m z)/τ to grad_rows [K, D]."""
    log_sums = torch.empty_like(mass)
    grad_z = mass.new_empty(z.shape) if with_grad_z else None
    scale = (mass / temp)[:, None]
    for part, logits, p in _softmax_chunks(z, rows, temp, None, chunk):
        log_sums[part] = _log_sum_exp(logits, p)
        p = p.to(z.dtype)
        if grad_z is not None:
            grad_z[part] = (p @ rows) * scale[part]
        if grad_rows is not None:
            _add_product_(grad_rows, p, (z[part] * scale[part]).to(z.dtype))
    return log_sums, grad_z


def _softmax_chunks(
    z: Tensor, rows: Tensor, temp: float, center: Tensor | None, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tokens of a chunk, their logits (z Wᵀ − c)/τ [n, K] and softmax [n, K], in fp32 or wider.

    The two matrices are the same memory for every chunk (fresh pages cost as much as the arithmetic on a CPU).
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    all_logits = z.new_empty(min(chunk, len(z)), len(rows), dtype=wide)
    all_p = torch.empty_like(all_logits)
    for start in range(0, len(z), chunk):
        part = slice(start, min(start + chunk, len(z)))
        logits, p = all_logits[: part.stop - start], all_p[: part.stop - start]
        product = logits if z.dtype == wide else z.new_empty(logits.shape)
        torch.addmm(product, z[part], rows.t(), beta=0, alpha=1 / temp, out=product)
        if product is not logits:
            logits.copy_(product)
        if center is not None:
            logits.sub_(center / temp)
        torch.softmax(logits, -1, out=p)
        yield part, logits, p


def _log_sum_exp(logits: Tensor, p: Tensor) -> Tensor:
    """From the softmax at hand: log-sum-exp = max logit − log of the largest probability; saves a pass of exp."""
    return logits.amax(-1) - p.amax(-1).log()


def _add_product_(total: Tensor, p: Tensor, vectors: Tensor) -> None:
    """total [K, D] += pᵀ vectors, accumulated in total's precision."""
    if total.dtype == p.dtype:
        total.addmm_(p.t(), vectors)
    else:
        total.add_(p.t() @ vectors)


def _matched_sum(z: Tensor, match: Tensor, weight: Tensor, teachers: int) -> Tensor:
    total = z.new_zeros(teachers, z.shape[1])
    for m in range(match.shape[1]):
        total.index_add_(0, match[:, m], z * weight[:, m, None])
    return total
