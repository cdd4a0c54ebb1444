"""What `esvit-scale doctor` asks of torch.distributed and DeepSpeed: small real calls, nothing assumed."""

import contextlib
import io
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from esvit_scale.parallel import zero


def all_reduce_works(backend: str) -> None:
    """Run an all-reduce of one number in a group of this process alone; raises what the backend raises.

    Even alone, gloo resolves the host's name and opens a socket, and NCCL loads its library and talks to the GPU. A
    process that has a default group keeps it: only the group made here is taken down.
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
            raise RuntimeError(f"the sum of one 1 came back as {value.item()}")
    finally:
        dist.destroy_process_group(group)


def all_reduce_rate(groups: Sequence[Sequence[int]], device: torch.device, nbytes: int) -> float | None:
    """GB/s on the wire of an all-reduce inside this rank's group, while every group does the same; all ranks call it.

    A rank's share of the wire is 2(n-1)/n times the tensor ("bus bandwidth"), so groups of different sizes compare.

    Args:
        groups: disjoint lists of ranks; one rank alone, or none, gives None.
        nbytes: of the tensor, fp32.
    """
    mine: Any = None
    for ranks in groups:
        group = dist.new_group(list(ranks))  # by all ranks, members or not
        if dist.get_rank() in ranks and len(ranks) > 1:
            mine, size = group, len(ranks)
    if mine is None:
        return None
    value = torch.ones(nbytes // 4, device=device)
    seconds = [_all_reduce_seconds(value, mine) for _ in range(4)][1:]  # the first makes connections
    return 2 * (size - 1) / size * nbytes / min(seconds) / 1e9


def _all_reduce_seconds(value: torch.Tensor, group: Any) -> float:
    wait = torch.cuda.synchronize if value.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    dist.all_reduce(value, group=group)
    wait()
    return time.perf_counter() - began


def deepspeed_ops() -> dict[str, bool]:
    """DeepSpeed's compiled operators, and whether this machine has what each needs (none is built here)."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return {name: works for name, works in zero.deepspeed_ops().items() if "not_implemented" not in name}
