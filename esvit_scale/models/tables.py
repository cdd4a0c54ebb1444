"""Constant tables (indices, masks), made on the host once for a layout and a device, and kept."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function with its results cached, for arguments that can be hashed.

    They are not cached while a graph is being traced (torch.export, torch.compile): what is made then has no values. And
    they are never inference tensors, which could not be saved for a later backward.
    """
    stored = lru_cache(maxsize=256)(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return stored(*args, **kwargs)  # type: ignore[arg-type]

    return call
