"""Names for parts of a training step, as ranges in a profiler's trace. They cost nothing while nothing is traced."""

from collections.abc import Iterator
from contextlib import contextmanager

_tracing = False


def trace(on: bool) -> None:
    """Turn the recording of ranges on or off; train/profiling.py does it for the steps that it traces."""
    global _tracing
    _tracing = on


@contextmanager
def named(name: str) -> Iterator[None]:
    """Give what runs in this context, or in a function with this decorator, a name in the trace."""
    if not _tracing:
        yield
        return
    from torch.profiler import record_function

    with record_function(name):
        yield
