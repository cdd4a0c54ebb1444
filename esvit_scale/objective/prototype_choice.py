"""The choice between implementations of the passes over prototypes: each is checked against fp32, then timed."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.models import implementation_choice
from esvit_scale.models.implementation_choice import Outcome, allowed_error, median_milliseconds, relative_error
from esvit_scale.objective.prototype_passes import Passes, Side, implementation
from esvit_scale.objective.prototype_tiles import TilePasses

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
RESULTS = (
    "log-sum-exp",
    "student's mean",
    "teacher's mean",
    "gradient of the prototypes",
    "entropy",
    "log-sum-exp over tokens",
)


class Shape(NamedTuple):
    """The numbers of one call of the loss."""

    students: int  # tokens
    teachers: int
    prototypes: int
    bottleneck: int


class Inputs(NamedTuple):
    """The inputs of the passes."""

    student: Side
    teacher: Side
    towards: Tensor


def choose(names: Sequence[str], shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Outcome:
    """Return the fastest of the accurate implementations on the run's shapes, or `tiles` when none is accurate."""
    inputs = [_inputs(shape, dtype, device) for shape in shapes]

    def milliseconds(passes: Passes) -> float:
        runs = [partial(passes.expectations, given.student, given.teacher, given.towards, True) for given in inputs]
        return sum(median_milliseconds(run, device) for run in runs)

    candidates: dict[str, Callable[[], Passes]] = {name: partial(implementation, name) for name in names}
    check = partial(inaccuracy, bottleneck=shapes[0].bottleneck, dtype=dtype, device=device)
    return implementation_choice.fastest(candidates, "tiles", check, milliseconds)


def inaccuracy(passes: Passes, bottleneck: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return how an implementation differs from fp32 by more than it may; None if it fits."""
    inputs = _inputs(Shape(300, 130, 1000, bottleneck), dtype, device)  # no multiples of a tile
    exact, tiles, found = (
        _results(TilePasses(), _wide(inputs)),
        _results(TilePasses(), inputs),
        _results(passes, inputs),
    )
    for what, a, b, reference in zip(RESULTS, found, tiles, exact, strict=True):
        error, allowed = relative_error(a, reference), allowed_error(relative_error(b, reference))
        if not error <= allowed:  # a NaN fails too
            return f"its {what} is off by {error:.1e} ({allowed:.1e} is allowed)"
    return None


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return random inputs of a shape, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    random = lambda n: torch.randn(n, shape.bottleneck, generator=generator, device=device)  # noqa: E731
    unit = lambda n: F.normalize(random(n), dim=1).to(dtype)  # noqa: E731
    center = 0.1 * torch.randn(shape.prototypes, generator=generator, device=device)
    student = Side(unit(shape.students), unit(shape.prototypes), STUDENT_TEMP, None)
    teacher = Side(unit(shape.teachers), unit(shape.prototypes), TEACHER_TEMP, center)
    return Inputs(student, teacher, random(shape.students + shape.teachers))


def _wide(inputs: Inputs) -> Inputs:
    student, teacher = (side._replace(z=side.z.float(), rows=side.rows.float()) for side in inputs[:2])
    return Inputs(student, teacher, inputs.towards)


def _results(passes: Passes, inputs: Inputs) -> list[Tensor]:
    """Return the tensors that RESULTS names."""
    found = passes.expectations(inputs.student, inputs.teacher, inputs.towards, with_grad_rows=True)
    assert found.grad_rows is not None
    entropies = torch.stack([found.teacher_entropy, found.student_entropy, found.usage_entropy])
    over_tokens = passes.column_log_sum_exp(inputs.student, -found.log_sums)
    return [found.log_sums, found.student_means, found.teacher_means, found.grad_rows, entropies, over_tokens]
