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

It goes over the prototypes twice, in tiles that stay in the cache, for teacher and student tokens together: the first
pass computes log-sum-exps, the second uses them to compute probabilities. The logits are thus computed twice (4 matrix
products where 3 would do). In return, the dW of a tile is complete at the end of the tile's turn and is written once,
in its final precision, and no intermediate is larger than a tile.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit_scale.models.products import is_wide
from esvit_scale.objective.objective import fixed_precision

CPU_TILE_BYTES = 16 * 2**20  # size of a tokens × tile matrix in fp32 that caches hold, by measurement
GPU_TILE_SHARE = 128  # a tile has 1/128 of all memory; not of free memory, as the tile decides the order of sums
NARROWEST_TILE = 128  # prototypes; below it matrix products starve


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
    tile: int | None = None,
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
        tile: prototypes handled at once; None: as many as the device's caches (CPU) or memory (GPU) suggest.

    Returns:
        The loss (scalar), and the entropies of teacher and student with the loss of each column.
    """
    if z_s.dtype == torch.float16:  # P ~ 1/K and its products are below what fp16 resolves
        z_s = z_s.bfloat16()
    tile = tile or tile_size(len(z_s) + len(z_t), z_s.device)
    with fixed_precision(z_s.device):
        loss, *entropies = _PrototypeCrossEntropy.apply(
            z_s, rows_s, z_t, rows_t, center, match, weight, student_temp, teacher_temp, tile
        )
    return loss, Entropies(*entropies)


def tile_size(tokens: int, device: torch.device) -> int:
    """Return the number of prototypes per tile for so many teacher and student tokens together."""
    budget = CPU_TILE_BYTES
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // GPU_TILE_SHARE
    return max(budget // (4 * tokens) // NARROWEST_TILE, 1) * NARROWEST_TILE


class Side(NamedTuple):
    """The tokens z of one network, and the prototypes W, temperature τ and centre c of their logits (z Wᵀ − c)/τ."""

    z: Tensor  # [n, D]
    rows: Tensor  # [K, D]
    temp: float
    center: Tensor | None  # [K]


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
        tile: int,
    ) -> tuple[Tensor, ...]:
        dtype = z_s.dtype
        wide = torch.promote_types(dtype, torch.float32)
        weight = weight.to(wide)
        mass = weight.sum(1)  # [N_s]
        pull = _matched_sum(z_s.to(wide), match, weight, len(z_t))  # G [N_t, D]
        student = Side(z_s, rows_s.to(dtype), student_temp, None)
        teacher = Side(z_t.to(dtype), rows_t.to(dtype), teacher_temp, center.to(wide))
        log_sums = torch.cat([log_sum_exp(student, tile), log_sum_exp(teacher, tile)])

        towards = (
            torch.cat([z_s * mass[:, None], -pull]).div_(student_temp).to(_dtype_of_products(z_s))
        )  # [N_s + N_t, D]
        grad_rows = torch.empty_like(student.rows) if ctx.needs_input_grad[1] else None
        mixed, *entropies = _expectations(student, teacher, log_sums, towards, grad_rows, tile)
        expected = mixed[len(z_s) :]  # e [N_t, D]
        loss = torch.dot(mass, log_sums[: len(z_s)]) - (expected * pull).sum() / student_temp

        grad_z = mixed[: len(z_s)] * mass[:, None] if ctx.needs_input_grad[0] else None
        columns = []
        for m in range(match.shape[1]):
            own = expected[match[:, m]]  # [N_s, D]
            if grad_z is not None:
                grad_z.addcmul_(own, weight[:, m, None], value=-1)
            columns.append(torch.dot(weight[:, m], log_sums[: len(z_s)] - (own * z_s).sum(1) / student_temp))
        if grad_z is not None:
            grad_z = grad_z.div_(student_temp).to(dtype)
        entropies.append(torch.stack(columns))
        # Attributes instead of save_for_backward, because the backward scales the gradients in place and returns them.
        ctx.gradients = grad_z, grad_rows.to(rows_s.dtype) if grad_rows is not None else None
        ctx.mark_non_differentiable(*entropies)
        return loss, *entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("prototype_cross_entropy: its backward can run once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return *(g.mul_(grad_loss) if g is not None else None for g in gradients), *[None] * 8


def log_sum_exp(side: Side, tile: int) -> Tensor:
    """Return log Σ_k exp(logit_k) of every token, [n], computed tile by tile with a running maximum."""
    wide = torch.promote_types(side.z.dtype, torch.float32)
    top = side.z.new_full((len(side.z),), -torch.inf, dtype=wide)
    total = torch.zeros_like(top)
    for _, logits in tiles(side, tile):
        new = torch.maximum(top, logits.amax(1))
        total = total * (top - new).exp_() + logits.sub_(new[:, None]).exp_().sum(1)
        top = new
    return top + total.log()


def _expectations(
    student: Side, teacher: Side, log_sums: Tensor, towards: Tensor, grad_rows: Tensor | None, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return P W and the entropies of teacher, student and usage.

    P [N_s + N_t, K] are the probabilities of student and teacher tokens, and P W [N_s + N_t, D] is each token's
    expectation of the student's prototypes W. If `grad_rows` [K, D] is given, Pᵀ times `towards` [N_s + N_t, D] is
    written into it.
    """
    n_s, n_t = len(student.z), len(teacher.z)
    mixed = torch.zeros_like(towards, dtype=log_sums.dtype)
    negative_t, negative_s, negative_mean = log_sums.new_zeros(3)  # Σ p log p
    dtype = towards.dtype
    p = student.z.new_empty((n_s + n_t) * tile, dtype=dtype)
    spare = log_sums.new_empty(max(n_s, n_t) * tile if dtype != log_sums.dtype else 0)
    for (part, s), (_, t) in zip(tiles(student, tile), tiles(teacher, tile), strict=True):
        both = p[: (n_s + n_t) * s.shape[1]].view(n_s + n_t, -1)
        probabilities = _exp_into(s.sub_(log_sums[:n_s, None]), both[:n_s], spare)
        negative_s += torch.dot(probabilities.view(-1), s.view(-1))
        probabilities = _exp_into(t.sub_(log_sums[n_s:, None]), both[n_s:], spare)
        negative_t += torch.dot(probabilities.view(-1), t.view(-1))
        mean = probabilities.mean(0)
        negative_mean += torch.special.xlogy(mean, mean).sum()
        if mixed.dtype == dtype:
            mixed.addmm_(both, student.rows[part].to(dtype))
        else:
            mixed.add_(both @ student.rows[part])
        if grad_rows is not None:
            if grad_rows.dtype == dtype:
                torch.mm(both.t(), towards, out=grad_rows[part])
            else:
                grad_rows[part] = both.t() @ towards
    return mixed, -negative_t / n_t, -negative_s / n_s, -negative_mean


def _exp_into(x: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """Write exp(x) to `out`, and return it in x's precision: `out` itself, or a part of `spare` if `out` is narrower."""
    if out.dtype == x.dtype:
        return torch.exp(x, out=out)
    values = torch.exp(x, out=spare[: x.numel()].view_as(x))
    out.copy_(values)
    return values


def _dtype_of_products(z: Tensor) -> torch.dtype:
    """Return the type in which products of tokens z are computed: z's, or fp32 for bf16 on a CPU where that is faster."""
    return torch.float32 if is_wide(z, z) else z.dtype


def tiles(side: Side, tile: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield, tile by tile, the slice of its prototypes and all tokens' logits for them [n, tile], in fp32 or wider.

    Use the logits before asking for the next tile: all tiles share one buffer.
    """
    n, k = len(side.z), len(side.rows)
    wide = torch.promote_types(side.z.dtype, torch.float32)
    z = side.z.to(_dtype_of_products(side.z))
    memory = z.new_empty(n * min(tile, k), dtype=wide)
    narrow = memory if z.dtype == wide else z.new_empty(n * min(tile, k))
    for start in range(0, k, tile):
        part = slice(start, min(start + tile, k))
        logits, product = (m[: n * (part.stop - start)].view(n, -1) for m in (memory, narrow))
        torch.addmm(product, z, side.rows[part].to(z.dtype).t(), beta=0, alpha=1 / side.temp, out=product)
        if narrow is not memory:
            logits.copy_(product)
        if side.center is not None:
            logits.sub_(side.center[part] / side.temp)
        yield part, logits


def _matched_sum(z: Tensor, match: Tensor, weight: Tensor, teachers: int) -> Tensor:
    total = z.new_zeros(teachers, z.shape[1])
    for m in range(match.shape[1]):
        total.index_add_(0, match[:, m], z * weight[:, m, None])
    return total
