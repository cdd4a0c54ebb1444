"""The choice between implementations of window attention: each is checked against fp32, then timed.

A candidate that is not accurate, or raises, is not used; of the others the fastest on the run's own shapes is.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from esvit_scale.models.implementation_choice import (
    Outcome,
    allowed_error,
    fastest,
    median_milliseconds,
    relative_error,
)
from esvit_scale.models.window_attention import attend_math
from esvit_scale.models.window_attention_implementations import AttendWindows
from esvit_scale.models.windows import WindowLayout, WindowPlan


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

    def milliseconds(attend: AttendWindows) -> float:
        return sum(layout.blocks * _milliseconds(attend, layout, dtype, device) for layout in real)

    check = partial(inaccuracy, layouts=small, dtype=dtype, device=device)
    return fastest(candidates, "math", check, milliseconds)


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
            error, allowed = relative_error(a, reference), allowed_error(relative_error(b, reference))
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


def _milliseconds(attend: AttendWindows, layout: WindowLayout, dtype: torch.dtype, device: torch.device) -> float:
    """Return the median time of one forward and backward."""
    inputs = _inputs(layout, dtype, device)
    return median_milliseconds(lambda: _results(attend, layout.plan, inputs), device)
