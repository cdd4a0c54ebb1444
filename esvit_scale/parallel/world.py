"""Who am I among how many: one process, `torchrun`, or `srun` with one task per rank; and the process group.

Nothing here is asked of the user: the launcher's environment says it all.
"""

import atexit
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.parallel import collectives

# How gloo and TCP say it; NCCL raises an error class of its own.
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "[c10d]")


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int
    device: torch.device


def start() -> World:
    """Joins the process group (nccl with a GPU, gloo without) and picks this rank's device.

    Raises:
        UserError: a launcher's variables are there in part only.
    """
    _adopt_slurm_variables()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE={size} without MASTER_ADDR and MASTER_PORT: start with `torchrun --nproc-per-node N -m esvit_scale …` or `srun`"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # DeepSpeed reads these when it is imported or asks for its backend.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(local_rank)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, rank=rank, world_size=size)
        atexit.register(dist.destroy_process_group)  # without it a rank aborts now and then
    _prepare_deepspeed(dist.get_backend())
    return World(rank, size, local_rank, device)


def stop() -> None:
    """The end of a job that went well: nobody leaves while another still talks to it.

    The group itself lives until the process ends (DeepSpeed keeps it in its own tables), so that a process can train
    and evaluate several times.
    """
    collectives.barrier()


def abandon() -> None:
    """The end of a job that failed here: the others may never come, so do not wait for them, now or at exit."""
    if collectives.world_size() > 1:
        atexit.unregister(dist.destroy_process_group)


@contextmanager
def explained_losses() -> Iterator[None]:
    """A rank that is gone reaches the others as an error of the transport: the machine's fault, not the run's.

    Raises:
        RestartCanHelp: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, dist.DistBackendError) or any(words in first for words in LOST_PEER):
            raise RestartCanHelp(
                f"another rank is gone, or cannot be reached ({first[:200]}); see that rank's log"
            ) from error
        raise


def _adopt_slurm_variables() -> None:
    """`srun`'s variables in torchrun's words. SLURM_STEP_NUM_TASKS exists in job steps only, not in a batch shell."""
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ or "SLURM_PROCID" not in os.environ:
        return
    job = int(os.environ["SLURM_JOB_ID"])
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", _first_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 20000))


def _first_host(nodes: str) -> str:
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"srun's node list {nodes!r} could not be expanded by scontrol ({error}); set MASTER_ADDR"
        ) from None
    return listed.stdout.split()[0]


def _prepare_deepspeed(backend: str) -> None:
    """Its warnings stay; its hundred lines of information per start do not help anybody."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A shared-memory collective that DeepSpeed would compile at first use (17 s, needs a compiler) and we never call.
    if hasattr(deepspeed.ops, "__compatible_ops__"):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # adopts the group made above
