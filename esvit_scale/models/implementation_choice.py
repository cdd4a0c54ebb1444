"""The choice of the fastest of several implementations that are accurate, for any part of the step."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from esvit_scale.errors import first_line

# A candidate's error may be this many times that of the plain implementation in the run's precision …
ERROR_RATIO = 2.0
# … or this, whichever is larger: relative error of fp32 sums over 10⁵ terms in another order. tf32 has 3e-4.
ERROR_FLOOR = 2e-5
WARM_UPS, ROUNDS = 2, 5

Implementation = TypeVar("Implementation")


class Outcome(NamedTuple):
    """The result of a choice."""

    chosen: str
    milliseconds: dict[str, float]  # of the candidates that passed: this part of one forward and backward
    refused: dict[str, str]  # of the others: why


def fastest(
    candidates: dict[str, Callable[[], Implementation]],
    plain: str,
    inaccuracy: Callable[[Implementation], str | None],
    milliseconds: Callable[[Implementation], float],
) -> Outcome:
    """Return the fastest of the accurate candidates, or `plain` when none is.

    Args:
        candidates: for each name a function that returns the implementation, and may raise.
        inaccuracy: returns why an implementation is not accurate, or None; it may raise.
        milliseconds: returns its time on the run's own shapes; it may raise.
    """
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, load in candidates.items():
        try:
            implementation = load()
            if problem := inaccuracy(implementation):
                refused[name] = problem
            else:
                times[name] = milliseconds(implementation)
        except Exception as error:  # whatever a library raises on this machine rules its candidate out
            refused[name] = f"{type(error).__name__}: {first_line(error)}"
    return Outcome(min(times, key=times.__getitem__) if times else plain, times, refused)


def relative_error(found: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference, relative to that of the reference."""
    return float((found.float() - reference).norm() / reference.norm())


def allowed_error(usual: float) -> float:
    """Return the relative error that a candidate may have where the plain implementation has `usual`."""
    return max(ERROR_RATIO * usual, ERROR_FLOOR)


def median_milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the median time of one of several runs, after some that do not count."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(WARM_UPS + ROUNDS):
        wait()
        began = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[WARM_UPS:])
