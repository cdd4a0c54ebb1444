"""Wrappers around the functions of torch.distributed that note what a rank communicates; plan.py and a test use them.

They must be in place before DeepSpeed is imported, so that its calls are noted too.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

# Each function with the argument whose bytes count: the whole that is gathered or scattered, not a rank's part.
_WHOLE = {
    "all_reduce": 0,
    "all_gather_into_tensor": 0,
    "all_gather_single": 0,
    "all_gather": 0,
    "reduce_scatter_tensor": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
    "reduce": 0,
}
_KINDS = {"all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather", "all_to_all_single": "all_to_all"}
_KINDS |= {"reduce_scatter_tensor": "reduce_scatter", "reduce_scatter_single": "reduce_scatter"}

noted: list[tuple[str, int]] = []  # kind and bytes of every collective since the list was cleared
_inside = False


def wrap() -> None:
    """Replace the functions by wrappers that add to `noted`."""
    for name in _WHOLE:
        if hasattr(dist, name):
            setattr(dist, name, _wrapped(name, getattr(dist, name)))


def _wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        global _inside
        if _inside:  # torch's own functions call each other
            return function(*args, **kwargs)
        given = [*args, *kwargs.values()][_WHOLE[name]]
        tensors = given if isinstance(given, list) else [given]
        noted.append((_KINDS.get(name, name), sum(t.numel() * t.element_size() for t in tensors)))
        _inside = True
        try:
            return function(*args, **kwargs)
        finally:
            _inside = False

    return call
