"""A cache for constant tensors (index tables, masks), which are made on the host once per layout and device."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that its results are cached by its arguments, which must be hashable.

    Nothing is cached while a graph is traced (torch.export, torch.compile), because tensors made then have no values.
    Cached tensors are never inference tensors, which autograd could not save for a later backward.
    """
    stored = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return stored(*args, **kwargs)  # type: ignore[arg-type]

    return call
