"""Selective activation checkpointing: what a block keeps from its forward, and what its backward recomputes.

A block is checkpointed as a whole, but products that are expensive to compute are taken from the forward when the rest
is recomputed. Keeping a value costs two or four bytes, whatever it is; recomputing it costs as many multiply-adds as
the product's inner dimension: C for queries, keys, values and the first layer of an MLP, 4C for its second layer, but
only d or L (32 or 49 in Swin) for the two products of window attention. So products are kept from an inner dimension of
`MIN_INNER_DIMENSION` on. In Swin-T these are those of the third and fourth stage, which have two thirds of the work and
a third of the bytes. Norms, softmax, GELU, window partition and window attention are always recomputed
(with model.attention=sdpa, window attention is kept for windows of L ≥ 128 tokens, at 2L multiply-adds per value).

Results of random operations are never kept: those that are recomputed then draw the numbers of the forward
(findings/selective_checkpointing_random_ops.sh). Stochastic depth is a hash of keys and draws nothing.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from esvit_scale.models import products  # noqa: F401  # defines wide_linear

MIN_INNER_DIMENSION = 256  # multiply-adds per value from which on a product is kept

_state = threading.local()
_aten = torch.ops.aten


@contextmanager
def recomputing() -> Iterator[None]:
    """Mark this context as one in which a forward is recomputed for its backward."""
    before = is_recomputing()
    _state.recomputing = True
    try:
        yield
    finally:
        _state.recomputing = before


def is_recomputing() -> bool:
    """Return whether this thread recomputes a forward for its backward (with torch's checkpointing)."""
    return getattr(_state, "recomputing", False)


def last_of_block(product: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return the product that ends a block, where its result is only added to the residual stream.

    No gradient needs the result. So it is not kept, and when the block is recomputed, zeros (of the `shape`, and of the
    type of `like`) take its place, which need no memory.
    """
    if is_recomputing():
        return like.new_zeros(()).expand(shape)
    before, _state.unread = getattr(_state, "unread", False), True
    try:
        return product()
    finally:
        _state.unread = before


def is_kept(operation: Any, args: tuple[Any, ...]) -> bool:
    """Return whether the result of an aten operation with these arguments is kept from the forward."""
    if operation in _INNER:
        return bool(_INNER[operation](args) >= MIN_INNER_DIMENSION)
    if operation is _aten.convolution.default:
        weight, transposed = args[1], args[6]
        return bool(not transposed and weight[0].numel() >= MIN_INNER_DIMENSION)
    return operation in _ATTENTION and bool(2 * args[1].shape[-2] >= MIN_INNER_DIMENSION)  # keys [n, heads, L, d]


_INNER: dict[Any, Callable[[tuple[Any, ...]], int]] = {  # a product's multiply-adds per value
    _aten.mm.default: lambda args: args[1].shape[0],
    _aten.addmm.default: lambda args: args[2].shape[0],
    torch.ops.esvit_scale.wide_linear.default: lambda args: args[1].shape[1],
}
_ATTENTION = {  # fused kernels: 2L multiply-adds per value
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(_aten, name)
}


class KeepResults(TorchDispatchMode):
    """A mode that keeps the results of a forward for which `is_kept` holds, in order.

    Under `reused` the same forward, when it is recomputed, takes them instead of computing them. Each is given away once,
    so that its memory is free as soon as the backward is done with it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.results: deque[tuple[Any, Any, list[int]]] = deque()  # operation, its result, versions of its tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation and keep its result if it is to be kept."""
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args) and not getattr(_state, "unread", False):
            kept = tree_map_only(Tensor, torch.detach, result)
            self.results.append((func, kept, _versions(kept)))
        return result

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Within the context, recompute the forward and take what was kept."""
        with recomputing(), _Reused(self.results):
            yield

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are kept."""
        return [x for _, kept, _ in self.results for x in tree_leaves(kept) if isinstance(x, Tensor)]


class _Reused(TorchDispatchMode):
    def __init__(self, results: deque[tuple[Any, Any, list[int]]]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        compute: Callable[[], Any] = lambda: func(*args, **(kwargs or {}))  # noqa: E731
        if not is_kept(func, args):
            return compute()
        if not self.results or self.results[0][0] is not func:
            raise RuntimeError(
                f"{func} is not what the forward computed here: with train.activation_checkpointing=selective a block "
                "must compute the same products again, and its backward can run only once"
            )
        _, kept, versions = self.results.popleft()
        return kept if _versions(kept) == versions else compute()  # changed in place since: not the result any more


def _versions(kept: Any) -> list[int]:
    return [x._version for x in tree_leaves(kept) if isinstance(x, Tensor)]
