"""Integer arithmetic for dividing a batch into micro-batches of ranks, and rows into one share per rank."""

import math


def largest_divisor(n: int, at_most: int) -> int:
    """Return the largest divisor of `n` that is ≤ `at_most`."""
    return max(d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i) if d <= at_most)


def nearest_multiple(n: int, of: int) -> int:
    """Return the multiple of `of` nearest to `n`, at least `of` itself."""
    return max(of, round(n / of) * of)


def share(n: int, part: int, parts: int) -> slice:
    """Return the slice of range(n) that part number `part` (counted from 0) of `parts` parts owns.

    The slices are contiguous, cover every item once and differ in length by at most one.
    """
    return slice(part * n // parts, (part + 1) * n // parts)


def batch_problem(global_batch: int, grad_accum: int, ranks: int = 1, unit: str = "ranks") -> str | None:
    """Return an error message if a global batch does not divide into equal micro-batches, else None.

    The message names the nearest global batch that does.

    Args:
        unit: the word for ranks in the message, "ranks" or "GPUs".
    """
    parts = ranks * grad_accum
    if global_batch % parts == 0:
        return None
    over = f"train.grad_accum={grad_accum}" if ranks == 1 else f"{ranks} {unit} × train.grad_accum={grad_accum}"
    nearest = nearest_multiple(global_batch, parts)
    return f"train.global_batch: {global_batch} does not divide over {over}; nearest: {nearest}"
