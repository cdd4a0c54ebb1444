"""The few things that ranks say to each other. A leaf: any module may import it, and without a process group
every function is the single process's answer."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_control_group: Any = None  # gloo: flags and small objects must not make the host wait for the GPU's queue


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if initialized() else 1


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


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' values, known to all; `max_over_ranks(flag)` is "any rank says so"."""
    if world_size() == 1:
        return value
    flag = torch.tensor([value])
    dist.all_reduce(flag, dist.ReduceOp.MAX, group=control_group())
    return int(flag.item())


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
    if _control_group is None:
        _control_group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
    return _control_group
