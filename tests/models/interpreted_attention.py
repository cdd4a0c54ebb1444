"""A script: run the Triton kernels of window attention on the CPU, with TRITON_INTERPRET=1, and print errors as JSON.

Its argument is `one`, for windows of one tile, or `several`.
"""

import json
import sys

import torch
from torch.utils.checkpoint import checkpoint

from esvit_scale.models import window_attention_triton
from esvit_scale.models.window_attention import attend_math
from esvit_scale.models.windows import window_plan
from tests.models.test_window_attention import CASES, CPU, GRIDS, results


def main() -> None:
    several = sys.argv[1] == "several"
    errors = {name: relative_errors(*case) for name, case in CASES.items() if (case.window > 8) == several}
    if not several:
        errors |= compositions()
    print(json.dumps(errors))


def compositions() -> dict[str, list[float]]:
    """Differences of compiled and checkpointed attention from plain one, and what is saved; raises if opcheck does."""
    errors = {}
    few = {"heads": 1, "depth": 16, "grids": ((1, 3, 6),)}
    plain = results(window_attention_triton.attend, 3, 1, torch.float32, **few)
    compiled = torch.compile(window_attention_triton.attend, backend="aot_eager", fullgraph=True, dynamic=False)
    checkpointed = lambda *inputs: checkpoint(window_attention_triton.attend, *inputs, use_reentrant=False)  # noqa: E731
    for name, attend in (("compiled", compiled), ("checkpointed", checkpointed)):
        found = results(attend, 3, 1, torch.float32, **few)
        errors[name] = [float((a - b).abs().max()) for a, b in zip(found, plain, strict=True)]
    errors["saved per slot"] = [saved_per_slot(), 0, 0]
    table = torch.randn(25, 1, requires_grad=True)
    arguments = (torch.randn(18, 48, requires_grad=True), table, 3, 1, [1, 1, 2])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.esvit_scale.window_attention, arguments, test_utils=tests)
    return errors


def relative_errors(window, shift, dtype, heads, depth, grids):
    narrow = getattr(torch, dtype)
    found = results(window_attention_triton.attend, window, shift, narrow, heads, depth, grids)
    exact = results(attend_math, window, shift, torch.float64, heads, depth, grids, inputs=narrow)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def saved_per_slot() -> float:
    """Numbers that autograd saves per slot, the table left out."""
    plan, saved = window_plan(GRIDS, 3, 1, CPU), []
    slots = len(plan.slots.tokens)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        window_attention_triton.attend(torch.randn(slots, 48, requires_grad=True), torch.randn(25, 1), plan)
    return (sum(saved) - 25) / slots


if __name__ == "__main__":
    main()
