"""What `esvit-scale doctor` asks of torch.distributed and DeepSpeed: small real calls, nothing assumed."""

import contextlib
import io

import torch
import torch.distributed as dist


def all_reduce_works(backend: str) -> None:
    """One all-reduce of one number in a group of one process; raises what the backend raises.

    Even alone, gloo resolves the host's name and opens a socket, and NCCL loads its library and talks to the GPU.
    """
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        value = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(value)
        if value.item() != 1:
            raise RuntimeError(f"the sum of one 1 came back as {value.item()}")
    finally:
        dist.destroy_process_group()


def deepspeed_ops() -> dict[str, bool]:
    """DeepSpeed's compiled operators, and whether this machine has what each needs (none is built here)."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepspeed.ops

        return {
            name: works for name, works in deepspeed.ops.__compatible_ops__.items() if "not_implemented" not in name
        }
