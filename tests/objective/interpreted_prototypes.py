"""A script: run the Triton kernels of the prototype loss on the CPU, with TRITON_INTERPRET=1, and print errors as JSON.

For every case these are the errors against float64 of loss, gradient of tokens, gradient of prototypes, entropies and
columns, relative to the largest value of each.
"""

import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.objective.prototype_passes import Passes, Side
from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.objective.prototype_triton import TritonPasses
from esvit_scale.objective.prototypes import prototype_cross_entropy
from esvit_scale.objective.sinkhorn import sinkhorn_center

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
# student tokens, teacher tokens, matches, prototypes, numbers of a token
SIZES = {
    "odd": (37, 21, 2, 75, 24),
    "few": (1, 1, 1, 5, 3),
    "masked": (50, 70, 3, 130, 40),
    "even": (64, 32, 2, 128, 32),
}
DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    errors = {f"{size} {dtype}": of_loss(size, getattr(torch, dtype)) for size in SIZES for dtype in DTYPES}
    errors["sharp"] = of_loss("odd", torch.float32, gain=30, teacher_temp=0.01)
    errors["sinkhorn"] = of_sinkhorn()
    errors["sums"] = of_log_sums()
    errors["without gradient"] = [float(without_gradient())]
    print(json.dumps(errors))


def problem(students: int, teachers: int, matches: int, k: int, d: int, gain: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(students + k)
    unit = lambda n: F.normalize(torch.randn(n, d, generator=generator), dim=1)  # noqa: E731
    match = torch.randint(teachers, (students, matches), generator=generator)
    weight = torch.rand(students, matches, generator=generator) / students
    weight[students // 2 :, -1] = 0  # as of tokens that are not masked
    center = 0.1 * torch.randn(k, generator=generator)
    return [unit(students), gain * unit(k), unit(teachers), gain * unit(k), center, match, weight]


def of_loss(size: str, dtype: torch.dtype, gain: float = 1.0, teacher_temp: float = TEACHER_TEMP) -> list[float]:
    given = [x.to(dtype) if i < 4 else x for i, x in enumerate(problem(*SIZES[size], gain=gain))]
    rows_dtype = torch.bfloat16 if dtype == torch.float16 else dtype  # as models/heads.py does
    given[1], given[3] = given[1].to(rows_dtype), given[3].to(rows_dtype)
    wide = [x.double() if x.is_floating_point() else x for x in given]
    if dtype == torch.float16:  # the loss multiplies in bf16
        wide[0], wide[2] = given[0].bfloat16().double(), given[2].bfloat16().double()
    found, exact = (results(x, p, teacher_temp) for x, p in ((given, TritonPasses()), (wide, TilePasses(7))))
    return [relative_error(a, b) for a, b in zip(found, exact, strict=True)]


def results(given: list[Tensor], passes: Passes, teacher_temp: float) -> list[Tensor]:
    z_s, rows_s = (x.clone().requires_grad_() for x in given[:2])
    loss, entropies = prototype_cross_entropy(z_s, rows_s, *given[2:], STUDENT_TEMP, teacher_temp, passes)  # type: ignore[call-arg]
    (3 * loss).backward()
    return [loss.detach(), z_s.grad, rows_s.grad, torch.stack(entropies[:3]), entropies.columns]  # type: ignore[list-item]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp_min(1e-6))


def of_sinkhorn() -> list[float]:
    z, rows = problem(*SIZES["odd"])[:2]
    found, exact = sinkhorn_center(z, rows, 0.05, TritonPasses()), sinkhorn_center(z.double(), rows.double(), 0.05)
    return [relative_error(found, exact)]


def of_log_sums() -> list[float]:
    """Errors of both log-sum-exps with a centre, which no caller has for the columns."""
    z, rows, _, _, center, *_ = problem(*SIZES["odd"])
    added = torch.linspace(-1, 1, len(z))
    narrow, wide = Side(z, rows, 0.1, center), Side(z.double(), rows.double(), 0.1, center.double())
    triton, tiles = TritonPasses(), TilePasses(7)
    return [
        relative_error(triton.log_sum_exp(narrow), tiles.log_sum_exp(wide)),
        relative_error(triton.column_log_sum_exp(narrow, added), tiles.column_log_sum_exp(wide, added.double())),
    ]


def without_gradient() -> float:
    """The largest difference of loss and entropies when no gradient is computed."""
    given: list[Any] = problem(*SIZES["odd"])
    full = results(given, TritonPasses(), TEACHER_TEMP)
    loss, entropies = prototype_cross_entropy(*given, STUDENT_TEMP, TEACHER_TEMP, TritonPasses())  # type: ignore[call-arg]
    return max(float((loss - full[0]).abs()), float((torch.stack(entropies[:3]) - full[3]).abs().max()))


if __name__ == "__main__":
    main()
