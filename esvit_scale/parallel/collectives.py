"""Collective communication between ranks. All ranks make the same calls, in the same order.

Without a process group, every function returns what a single rank would get, so that callers need no special case. Any
module of the package may import this one, and it imports only `errors`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from esvit_scale.errors import RestartCanHelp, UserError, translate_file_errors

T = TypeVar("T")
Note = Callable[[str, int], None]  # takes the kind of a collective and its bytes

# A gloo group for flags and small objects: with NCCL, the host would have to wait for the GPU's queue.
_control_group: Any = None
# In a thread, `group` replaces the control group, `alone` hides the other ranks, and `pretended` invents some.
_thread_state = threading.local()


def initialized() -> bool:
    """Return whether there is a process group and this thread is not inside the context `alone`."""
    return dist.is_available() and dist.is_initialized() and not getattr(_thread_state, "alone", False)


def rank() -> int:
    """Return this process's rank, from 0; 0 without a process group."""
    return dist.get_rank() if initialized() and _pretended() is None else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    if (pretended := _pretended()) is not None:
        return pretended[0]
    return dist.get_world_size() if initialized() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Make this thread behave as if there were no other ranks, for work that one rank does by itself."""
    _thread_state.alone = True
    try:
        yield
    finally:
        _thread_state.alone = False


@contextmanager
def pretend(ranks: int, note: Note) -> Iterator[None]:
    """Make this thread behave as rank 0 of so many ranks, to count what a step communicates; nothing is sent.

    Reductions and gathers of tensors leave results as they are. Flags, objects and barriers are not pretended.

    Args:
        note: is called at each collective with its kind (`all_reduce`, `all_gather`, `all_to_all`) and its bytes: what is
            reduced, the whole that is gathered, or what this rank sends.
    """
    before = _pretended()
    _thread_state.pretended = (ranks, note)
    try:
        yield
    finally:
        _thread_state.pretended = before


def _pretended() -> tuple[int, Note] | None:
    found: tuple[int, Note] | None = getattr(_thread_state, "pretended", None)
    return found


def _all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce a tensor over ranks, in place; where ranks are pretended, only note it."""
    if (pretended := _pretended()) is not None:
        pretended[1]("all_reduce", tensor.nbytes)
    else:
        dist.all_reduce(tensor, op)


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place."""
    if world_size() > 1:
        _all_reduce(tensor)
    return tensor


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Average a floating-point tensor over ranks, in place."""
    if world_size() > 1:
        _all_reduce(tensor)
        tensor.div_(world_size())
    return tensor


def log_add_exp_(tensor: Tensor) -> Tensor:
    """Replace every element x of a tensor, in place, by log Σ exp(x), where the sum runs over ranks."""
    if world_size() > 1:
        top = tensor.clone()
        _all_reduce(top, dist.ReduceOp.MAX)
        tensor.copy_(all_reduce_sum_((tensor - top).exp_()).log_().add_(top))
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks, differentiably: the backward sums the gradients of all ranks."""
    return _Sum.apply(tensor) if world_size() > 1 else tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate all ranks' tensors [n, …] in rank order to one tensor [world · n, …], differentiably; n must be the
    same on all ranks."""
    return _Gather.apply(tensor) if world_size() > 1 else tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum_(tensor.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum_(grad.contiguous().clone())


def all_gather_flat(gathered: Tensor, part: Tensor) -> None:
    """Write the parts [n, …] of all ranks into `gathered` [world · n, …], in rank order."""
    if (pretended := _pretended()) is not None:
        pretended[1]("all_gather", gathered.nbytes)
        return
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.14
    gather(gathered, part)


def exchange(parts: list[Tensor], lengths: list[int]) -> list[Tensor]:
    """Send a 1-D tensor to every rank, and return the tensors that came from every rank, in rank order.

    Args:
        parts: one tensor for each rank, in rank order; they may be empty, and have one dtype and device.
        lengths: number of elements that come from each rank.
    """
    if world_size() == 1:
        return parts
    sent = torch.cat(parts)
    received = sent.new_empty(sum(lengths))
    if (pretended := _pretended()) is not None:
        pretended[1]("all_to_all", sent.nbytes)
        return list(received.split(lengths))
    dist.all_to_all_single(received, sent, lengths, [len(part) for part in parts])
    return list(received.split(lengths))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        gathered = tensor.new_empty(world_size() * len(tensor), *tensor.shape[1:])
        all_gather_flat(gathered, tensor)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum_(grad.contiguous().clone()).chunk(world_size())[rank()]


def all_reduce_flags(bits: int) -> int:
    """Return the bitwise OR of all ranks' flags, of up to 8 bits."""
    if world_size() == 1:
        return bits
    flags = torch.tensor([bits >> i & 1 for i in range(8)], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=control_group())
    return sum(int(flag) << i for i, flag in enumerate(flags.tolist()))


def gather_objects(obj: Any) -> list[Any]:
    """Return the objects of all ranks, in rank order, on every rank; they must be small plain data."""
    if world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj, group=control_group())
    return gathered


def barrier() -> None:
    """Wait until all ranks have called this."""
    if world_size() > 1:
        dist.barrier(group=control_group())


def control_group() -> Any:
    """Return the gloo group for flags and small objects. All ranks must take part in the first call, which creates
    it."""
    global _control_group
    if (own := getattr(_thread_state, "group", None)) is not None:
        return own
    if _control_group is None:
        _control_group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return _control_group


def second_group() -> Any:
    """Return a new gloo group for communication of a second thread; None for a single process. All ranks call it."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


@contextmanager
def through(group: Any) -> Iterator[None]:
    """Make this thread use `group` instead of the control group within this context."""
    _thread_state.group = group
    try:
        yield
    finally:
        _thread_state.group = None


def run_on_rank0_and_broadcast(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 only, and return its result, or raise its error, on all ranks.

    Use it for decisions that depend on files: if each rank looked for itself, they might see different states.

    Raises:
        UserError, RestartCanHelp: the function raised it on rank 0 (also in place of an OSError, see
            `translate_file_errors`). Any other error is raised on rank 0 alone.
    """
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            with translate_file_errors():
                answer[0] = function()
        except (UserError, RestartCanHelp) as error:
            answer[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(answer, src=0, group=control_group())
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
