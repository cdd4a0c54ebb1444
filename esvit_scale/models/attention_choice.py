"""The choice between implementations of window attention: each is checked against fp32, then timed.

A candidate that is not accurate, or raises, is not used; of the others the fastest on the run's own shapes is.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esvit_scale.errors import first_line
from esvit_scale.models.window_attention import attend_math
from esvit_scale.models.window_attention_implementations import AttendWindows
from esvit_scale.models.windows import WindowLayout, WindowPlan

# A candidate's error may be this many times that of the written-out attention in the run's precision …
ERROR_RATIO = 2.0
# … or this, whichever is larger: relative error of fp32 sums over 10⁵ terms in another order. tf32 has 3e-4.
ERROR_FLOOR = 2e-5
WARM_UPS, ROUNDS = 2, 5


class Outcome(NamedTuple):
    """The result of a choice."""

    chosen: str
    milliseconds: dict[str, float]  # of the candidates that passed: window attention of one forward and backward
    refused: dict[str, str]  # of the others: why


def choose(
    candidates: dict[str, Callable[[], AttendWindows]],
    small: Sequence[WindowLayout],
    real: Sequence[WindowLayout],
    dtype: torch.dtype,
    device: torch.device,
) -> Outcome:
    """Return the fastest of the accurate candidates, or `math` when none is.

    Args:
        candidates: for each name a function that returns the implementation, and may raise.
        small: layouts for the accuracy check.
        real: the run's own layouts, for the timing.
    """
    milliseconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, load in candidates.items():
        try:
            attend = load()
            if problem := inaccuracy(attend, small, dtype, device):
                refused[name] = problem
            else:
                milliseconds[name] = sum(
                    layout.blocks * _milliseconds(attend, layout, dtype, device) for layout in real
                )
        except Exception as error:  # whatever a library raises on this machine rules its candidate out
            refused[name] = f"{type(error).__name__}: {first_line(error)}"
    chosen = min(milliseconds, key=milliseconds.__getitem__) if milliseconds else "math"
    return Outcome(chosen, milliseconds, refused)


def inaccuracy(
    attend: AttendWindows, layouts: Sequence[WindowLayout], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return how an implementation differs from fp32 by more than it may, in its output or gradients; None if it fits."""
    for layout in layouts:
        inputs = _inputs(layout, dtype, device)
        exact = _results(attend_math, layout.plan, [x.float() for x in inputs])
        written_out = _results(attend_math, layout.plan, inputs)
        found = _results(attend, layout.plan, inputs)
        for what, a, b, reference in zip(RESULTS, found, written_out, exact, strict=True):
            error, usual = _relative_error(a, reference), _relative_error(b, reference)
            allowed = max(ERROR_RATIO * usual, ERROR_FLOOR)
            if not error <= allowed:  # a NaN fails too
                side = layout.plan.window
                return f"its {what} is off by {error:.1e} at windows of {side}×{side} ({allowed:.1e} is allowed)"
    return None


RESULTS = ("output", "gradient of qkv", "gradient of the bias table")


def _inputs(layout: WindowLayout, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return random qkv, bias table and output gradient for a layout, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    slots, width = len(layout.plan.slots.tokens), layout.heads * layout.depth
    # One draw of bounded size, repeated: drawing hundreds of MB on the host would take longer than the timing.
    values = torch.randn(2**16 + 1, generator=generator).to(device)
    qkv, grad = (values.repeat(-(-slots * n // len(values)))[: slots * n].view(slots, n) for n in (3 * width, width))
    table = torch.randn((2 * layout.plan.window - 1) ** 2, layout.heads, generator=generator).to(device)
    return [qkv.to(dtype), table, grad.to(dtype)]


def _results(attend: AttendWindows, plan: WindowPlan, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output, and the gradients of qkv and table."""
    qkv, table, grad = inputs
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = attend(qkv, table, plan)
    return [out.detach(), *torch.autograd.grad(out, (qkv, table), grad)]


def _relative_error(found: Tensor, reference: Tensor) -> float:
    return float((found.float() - reference).norm() / reference.norm())


def _milliseconds(attend: AttendWindows, layout: WindowLayout, dtype: torch.dtype, device: torch.device) -> float:
    """Return the median time of one forward and backward."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    inputs, seconds = _inputs(layout, dtype, device), []
    for _ in range(WARM_UPS + ROUNDS):
        wait()
        began = time.perf_counter()
        _results(attend, layout.plan, inputs)
        wait()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds[WARM_UPS:])
