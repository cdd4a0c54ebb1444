"""The few things that ranks say to each other. A leaf: any module may import it, and without a process group
every function is the single process's answer."""

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

_control_group: Any = None  # gloo: flags and small objects must not make the host wait for the GPU's queue
_of_thread = threading.local()  # a thread that talks beside the main one needs a group of its own


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized() and not getattr(_of_thread, "alone", False)


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


@contextmanager
def alone() -> Iterator[None]:
    """In this thread, as if there were no other ranks: for what one rank works out by itself."""
    _of_thread.alone = True
    try:
        yield
    finally:
        _of_thread.alone = False


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean_(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place (floating point)."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor.div_(world_size())
    return tensor


def log_add_exp_(tensor: Tensor) -> Tensor:
    """log of the sum over ranks of exp(tensor), in place."""
    if world_size() > 1:
        top = tensor.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX)
        tensor.copy_(all_reduce_sum_((tensor - top).exp_()).log_().add_(top))
    return tensor


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, with gradient: every rank's loss reaches every rank's input."""
    return _Sum.apply(tensor) if world_size() > 1 else tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """[n, …] of every rank → [world · n, …] in rank order, with gradient; n is the same on all ranks."""
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
    """Gather every rank's part [n, …], one after the other, into `gathered` [world · n, …]."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.14
    gather(gathered, part)


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
    """The union of the ranks' flags, known to all: a bit is set when any rank set it. For up to 8 bits."""
    if world_size() == 1:
        return bits
    flags = torch.tensor([bits >> i & 1 for i in range(8)], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=control_group())
    return sum(int(flag) << i for i, flag in enumerate(flags.tolist()))


def gather_objects(obj: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank. For small plain data of our own processes."""
    if world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, obj, group=control_group())
    return gathered


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=control_group())


def control_group() -> Any:
    """The gloo group; made on first use, which must happen on all ranks together."""
    global _control_group
    if (own := getattr(_of_thread, "group", None)) is not None:
        return own
    if _control_group is None:
        _control_group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return _control_group


def second_group() -> Any:
    """Another gloo group, for a thread beside the main one; made on all ranks together. None for a single process."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


@contextmanager
def through(group: Any) -> Iterator[None]:
    """In this thread, what would go through the control group goes through `group`."""
    _of_thread.group = group
    try:
        yield
    finally:
        _of_thread.group = None


def run_on_rank0_and_broadcast(function: Callable[[], T]) -> T:
    """Runs on rank 0 only; its answer, or its error that concerns the user, is every rank's.

    A decision about files must be taken once: ranks that look for themselves may see different answers.
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
