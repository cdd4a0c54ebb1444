"""The passes of the prototype loss as fused Triton kernels; importing this module imports triton.

Memory holds tokens, prototypes, their gradients, a few numbers per token or prototype, and where the tokens alone are
too few programs for the GPU, each token's mean over some of the prototypes, several times. These are combined in a fixed
order, so equal runs on equal GPUs have equal numbers. prototype_kernels.py has the kernels, and this module their
launches.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from esvit_scale.models.triton_support import interpreted
from esvit_scale.objective import prototype_kernels as kernels
from esvit_scale.objective.prototype_passes import Expectations, Passes, Side

PROGRAMS_PER_MULTIPROCESSOR = 4  # at least; a multiprocessor runs them one after the other, so few would end unevenly
MULTIPROCESSORS_INTERPRETED = 2


class Tiles(NamedTuple):
    """Sides of the tiles of logits, and how a program works on them."""

    rows: int  # of `over_columns`: tokens whose means a program keeps in registers
    gradient_rows: int  # of `gradient_of_rows`: prototypes whose gradients it keeps
    columns: int
    warps: int
    stages: int


OF_HOPPER = Tiles(rows=128, gradient_rows=128, columns=64, warps=8, stages=2)
OF_AMPERE = OF_HOPPER._replace(rows=64)  # 128 rows would spill registers: operands of mma, unlike wgmma's, are in them
INTERPRETED = Tiles(rows=16, gradient_rows=32, columns=16, warps=1, stages=1)  # small, so that tests have several tiles


def tiles_of(capability: tuple[int, int]) -> Tiles:
    """Return the tiles for a GPU of a compute capability."""
    return OF_HOPPER if capability >= (9, 0) else OF_AMPERE


class TritonPasses(Passes):
    """The passes in two kernels: one program per block of tokens, then one per block of prototypes."""

    def log_sum_exp(self, side: Side) -> Tensor:
        """Compute `Passes.log_sum_exp` in one kernel."""
        return _over_columns(side.z, side.rows, _bias(side), side.temp)

    def column_log_sum_exp(self, side: Side, added: Tensor) -> Tensor:
        """Compute `Passes.column_log_sum_exp` in the same kernel, with tokens and prototypes exchanged."""
        return _over_columns(side.rows, side.z, added, side.temp).add_(_bias(side))

    def expectations(self, student: Side, teacher: Side, towards: Tensor, with_grad_rows: bool) -> Expectations:
        """Compute `Passes.expectations`: each side's log-sum-exps and means, then the gradient of the prototypes."""
        log_sums_s, entropies_s, means_s = _means(student, None)
        log_sums_t, entropies_t, means_t = _means(teacher, student.rows)
        towards = towards.to(student.z.dtype)
        k, n_s = len(student.rows), len(student.z)
        grad_rows = torch.empty_like(student.rows)
        mass = log_sums_t.new_empty(k)
        launch = _Launch(student.z)
        launch(
            kernels.gradient_of_rows,
            (triton.cdiv(k, launch.tiles.gradient_rows),),
            *(student.z, student.rows.contiguous(), log_sums_s, towards[:n_s]),
            *(teacher.z.contiguous(), teacher.rows.contiguous(), log_sums_t, towards[n_s:]),
            *(_bias(teacher), grad_rows, mass, n_s, len(teacher.z), k, 1 / student.temp, 1 / teacher.temp),
            ROWS=launch.tiles.gradient_rows,
            GRADIENT=with_grad_rows,
        )
        usage = mass / len(teacher.z)
        return Expectations(
            *(log_sums_s, means_s, means_t, grad_rows if with_grad_rows else None),
            teacher_entropy=entropies_t.mean(),
            student_entropy=entropies_s.mean(),
            usage_entropy=-torch.special.xlogy(usage, usage).sum(),
        )


# --- launches --------------------------------------------------------------------------------------------------------


class _Launch:
    """The device of some tokens z [n, D], and the arguments that all kernels have there."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self.tiles, self.processors = INTERPRETED, MULTIPROCESSORS_INTERPRETED
        if z.is_cuda:
            self.tiles = tiles_of(torch.cuda.get_device_capability(z.device))
            self.processors = torch.cuda.get_device_properties(z.device).multi_processor_count
        d = z.shape[1]
        self.meta = {"D": d, "D_TILE": max(16, triton.next_power_of_2(d)), "COLUMNS": self.tiles.columns}
        self.meta |= {"WIDE": interpreted() and z.dtype == torch.bfloat16}
        self.meta |= {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
        """Launch a kernel."""
        with torch.cuda.device_of(self._z):
            kernel[grid](*arguments, **self.meta, **meta)


def splits(n: int, k: int, tiles: Tiles, processors: int) -> tuple[int, int]:
    """Return into how many parts `over_columns` divides k columns for n rows, and the columns of one part."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * processors, triton.cdiv(n, tiles.rows))
    columns = triton.cdiv(triton.cdiv(k, tiles.columns), wanted) * tiles.columns
    return triton.cdiv(k, columns), columns


def _over_columns(rows_of: Tensor, columns_of: Tensor, bias: Tensor, temp: float) -> Tensor:
    """Return log Σ exp(rows columnsᵀ / temp + bias) over the columns for each row, [n]."""
    return _launch_over_columns(rows_of, columns_of, None, bias, temp, means=False)[0].logsumexp(0)


def _means(side: Side, values: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-sum-exp [n], entropy [n] and mean prototype [n, D] of each token.

    The mean is over `values` [K, D]; None: over the side's own prototypes.
    """
    log_sums, entropies, means = _launch_over_columns(side.z, side.rows, values, _bias(side), side.temp, means=True)
    if len(log_sums) == 1:
        return log_sums[0], entropies[0], means[0]
    total = log_sums.logsumexp(0)
    below = log_sums - total  # log of a split's share of the probabilities
    shares = below.exp()
    return total, (shares * (entropies - below)).sum(0), means.mul_(shares[:, :, None]).sum(0)


def _launch_over_columns(
    rows_of: Tensor, columns_of: Tensor, values: Tensor | None, bias: Tensor, temp: float, means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `kernels.over_columns` writes; entropies and means are empty without `means`."""
    (n, d), k, launch = rows_of.shape, len(columns_of), _Launch(rows_of)
    parts, per_part = splits(n, k, launch.tiles, launch.processors)
    log_sums = bias.new_empty(parts, n)
    entropies, averages = (bias.new_empty(parts if means else 0, *shape) for shape in ((n,), (n, d)))
    columns_of = columns_of.contiguous()
    launch(
        kernels.over_columns,
        (triton.cdiv(n, launch.tiles.rows), parts),
        *(rows_of.contiguous(), columns_of, columns_of if values is None else values.contiguous(), bias),
        *(log_sums, entropies, averages, n, k, per_part, 1 / temp),
        ROWS=launch.tiles.rows,
        MEANS=means,
        OTHER_VALUES=values is not None,
    )
    return log_sums, entropies, averages


def _bias(side: Side) -> Tensor:
    """Return what is added to the logits of each prototype, fp32 [K]."""
    if side.center is None:
        return torch.zeros(len(side.rows), device=side.z.device)
    return -side.center.float() / side.temp
