"""Checks of torch.distributed and DeepSpeed for `esvit-scale doctor`: each makes a small real call."""

import contextlib
import io
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from esvit_scale.parallel import zero


def all_reduce_works(backend: str) -> None:
    """Run an all-reduce of one number in a process group of this process alone.

    Even with one process, gloo resolves the host's name and opens a socket, and NCCL loads its library and uses the
    GPU. If the process has a default group, it stays as it is; only the group made here is destroyed.

    Raises:
        Exception: whatever the backend raises, or RuntimeError for a wrong sum.
    """
    group: Any = None
    if dist.is_initialized():
        group = dist.new_group([dist.get_rank()], backend=backend, use_local_synchronization=True)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        value = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(value, group=group)
        if value.item() != 1:
            raise RuntimeError(f"an all-reduce of the number 1 on one rank returned {value.item()}")
    finally:
        dist.destroy_process_group(group)


def all_reduce_rate(groups: Sequence[Sequence[int]], device: torch.device, nbytes: int) -> float | None:
    """Return the bandwidth in GB/s of an all-reduce inside this rank's group, while all groups do the same.

    It is the "bus bandwidth": each rank sends and receives 2(n-1)/n times the tensor, so that groups of different sizes
    n can be compared. All ranks call it.

    Args:
        groups: disjoint lists of ranks. A rank in no group, or in a group of its own, gets None.
        nbytes: size of the fp32 tensor.
    """
    mine: Any = None
    for ranks in groups:
        group = dist.new_group(list(ranks))  # all ranks make every group
        if dist.get_rank() in ranks and len(ranks) > 1:
            mine, size = group, len(ranks)
    if mine is None:
        return None
    value = torch.ones(nbytes // 4, device=device)
    seconds = [_all_reduce_seconds(value, mine) for _ in range(4)][1:]  # the first call opens connections
    return 2 * (size - 1) / size * nbytes / min(seconds) / 1e9


def _all_reduce_seconds(value: torch.Tensor, group: Any) -> float:
    wait = torch.cuda.synchronize if value.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    dist.all_reduce(value, group=group)
    wait()
    return time.perf_counter() - began


def deepspeed_ops() -> dict[str, bool]:
    """Map each of DeepSpeed's compiled operators to whether this machine could build it; nothing is built."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return {name: works for name, works in zero.deepspeed_ops().items() if "not_implemented" not in name}
