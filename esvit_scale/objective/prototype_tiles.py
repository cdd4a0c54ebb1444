"""The passes of the prototype loss in torch's operations, on tiles of logits: tokens × some prototypes.

The first pass computes log-sum-exps, the second uses them to compute probabilities. Tiles stay in the caches of a CPU;
on a GPU they pass through memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from esvit_scale.models.products import is_wide
from esvit_scale.objective.prototype_passes import Expectations, Passes, Side

CPU_TILE_BYTES = 16 * 2**20  # size of a tokens × tile matrix in fp32 that caches hold, by measurement
GPU_TILE_SHARE = 128  # a tile has 1/128 of all memory; not of free memory, as the tile decides the order of sums
NARROWEST_TILE = 128  # prototypes; below it matrix products starve


class TilePasses(Passes):
    """The passes over tiles of logits."""

    def __init__(self, tile: int | None = None) -> None:
        """Args:
        tile: prototypes handled at once; None: as many as the device's caches (CPU) or memory (GPU) suggest.
        """
        self._tile = tile

    def log_sum_exp(self, side: Side) -> Tensor:
        """Compute `Passes.log_sum_exp` with a running maximum."""
        return _log_sum_exp(side, self._tile_for(side))

    def column_log_sum_exp(self, side: Side, added: Tensor) -> Tensor:
        """Compute `Passes.column_log_sum_exp`, a tile of columns at a time."""
        sums = added.new_empty(len(side.rows))
        for part, logits in _tiles(side, self._tile_for(side)):
            torch.logsumexp(logits.add_(added[:, None]), 0, out=sums[part])
        return sums

    def expectations(self, student: Side, teacher: Side, towards: Tensor, with_grad_rows: bool) -> Expectations:
        """Compute `Passes.expectations` in two passes, for teacher and student tokens together."""
        n_s = len(student.z)
        tile = self._tile_for(student, teacher)
        log_sums = torch.cat([_log_sum_exp(student, tile), _log_sum_exp(teacher, tile)])
        grad_rows = torch.empty_like(student.rows) if with_grad_rows else None
        towards = towards.to(_dtype_of_products(student.z))
        means, *entropies = _means(student, teacher, log_sums, towards, grad_rows, tile)
        return Expectations(log_sums[:n_s], means[:n_s], means[n_s:], grad_rows, *entropies)

    def _tile_for(self, *sides: Side) -> int:
        return self._tile or tile_size(sum(len(side.z) for side in sides), sides[0].z.device)


def tile_size(tokens: int, device: torch.device) -> int:
    """Return the number of prototypes per tile for so many teacher and student tokens together."""
    budget = CPU_TILE_BYTES
    if device.type == "cuda":
        budget = torch.cuda.get_device_properties(device).total_memory // GPU_TILE_SHARE
    return max(budget // (4 * tokens) // NARROWEST_TILE, 1) * NARROWEST_TILE


def _log_sum_exp(side: Side, tile: int) -> Tensor:
    """Return log Σ_k exp(logit_k) of every token, [n], computed tile by tile with a running maximum."""
    wide = torch.promote_types(side.z.dtype, torch.float32)
    top = side.z.new_full((len(side.z),), -torch.inf, dtype=wide)
    total = torch.zeros_like(top)
    for _, logits in _tiles(side, tile):
        new = torch.maximum(top, logits.amax(1))
        total = total * (top - new).exp_() + logits.sub_(new[:, None]).exp_().sum(1)
        top = new
    return top + total.log()


def _means(
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
    for (part, s), (_, t) in zip(_tiles(student, tile), _tiles(teacher, tile), strict=True):
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


def _tiles(side: Side, tile: int) -> Iterator[tuple[slice, Tensor]]:
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
