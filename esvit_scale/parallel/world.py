"""This process's rank and device, and the process group of all ranks.

A job is a single process, or is started by `torchrun` or by `srun` with one task per rank. Everything is read from the
environment that the launcher sets; the user configures nothing.
"""

import atexit
import gc
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

from esvit_scale.errors import RestartCanHelp, UserError, first_line
from esvit_scale.parallel import allocator, collectives, zero

# Texts in errors of gloo and TCP when a peer is lost. NCCL and torch's store raise subclasses of DistError instead.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Connection timed out",
    "No route to host",
    "Timed out waiting",
    "timed out connecting",
    "Application timeout caused pair closure",
    "Socket Timeout",
    "[c10d]",
)
PORT_IN_USE = ("EADDRINUSE", "Address already in use", "address already in use", "errno: 98")

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # until all ranks have started: importing torch on many nodes takes minutes
# How long a collective may wait during training, on top of train.hang_minutes. The watchdog ends a run that hangs, and
# does not count the time in which the job was suspended. The timeout of a collective counts it, and so is much longer.
BEYOND_WATCHDOG = timedelta(days=7)
LONGEST_TIMEOUT = timedelta(days=20)  # in milliseconds, it fits into 32 bits

FIRST_PORT, PORTS = 20000, 12000  # below 32768, from where on Linux gives ports to outgoing connections


class World(NamedTuple):
    """This process's place among all ranks, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def start(hang_minutes: float | None = None) -> World:
    """Join the process group (NCCL with a GPU, gloo without) and choose this rank's device.

    Args:
        hang_minutes: how long a training's watchdog waits. All process groups get longer timeouts, also those that
            DeepSpeed makes later. None keeps torch's timeouts (10 minutes for NCCL, 30 for gloo).

    Raises:
        UserError: the environment has only some of the launcher's variables.
        RestartCanHelp: MASTER_PORT is in use, or another rank did not join in time.
    """
    adopt_slurm_variables()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(
            f"WORLD_SIZE={size} is set without MASTER_ADDR and MASTER_PORT; start with `torchrun --nproc-per-node N -m esvit_scale …` or `srun`"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        allocator.keep_freed_memory()
    # DeepSpeed reads these when it is imported or asks for its backend.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ["LOCAL_RANK"] = str(local_rank)
    if hang_minutes is not None:
        _set_default_timeouts(hang_minutes)
    if not dist.is_initialized():
        _enable_flight_recorder()
        with translate_comm_errors():
            _init_process_group("nccl" if cuda else "gloo", rank, size)
        atexit.register(dist.destroy_process_group)  # without it, a process now and then aborts at its exit
    _prepare_deepspeed(dist.get_backend())
    return World(rank, size, local_rank, device)


def _set_default_timeouts(hang_minutes: float) -> None:
    """Set torch's default timeouts, so that every process group made from now on waits longer than the watchdog.

    Defaults are needed because DeepSpeed calls `new_group` without a timeout, and a group inherits none from another.
    """
    minutes = min(hang_minutes, LONGEST_TIMEOUT / timedelta(minutes=1))
    timeout = min(timedelta(minutes=minutes) + BEYOND_WATCHDOG, LONGEST_TIMEOUT)
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def _enable_flight_recorder() -> None:
    """Let NCCL's flight recorder keep the last 2,000 collectives; at an NCCL timeout, it writes them beside the log.

    Environment variables that are set already stay as they are. The watchdog writes a dump of its own
    (train/watchdog.py).
    """
    renamed = hasattr(_distributed_c10d, "_dump_fr_trace")  # torch warns about the older names
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if renamed else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if logs := os.environ.get("ESVIT_RANK_LOGS"):
        file = "TORCH_FR_DUMP_TEMP_FILE" if renamed else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
        os.environ.setdefault(file, str(Path(logs) / "nccl-trace-rank-"))


def _init_process_group(backend: str, rank: int, size: int) -> None:
    """Make the default process group; torch's store raises when not all ranks join within RENDEZVOUS_TIMEOUT."""
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=RENDEZVOUS_TIMEOUT))
    dist.init_process_group(backend, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=size)


def stop() -> None:
    """Wait for all ranks at the end of a job that succeeded, so that none exits while another still needs it.

    The process group stays until the process ends (DeepSpeed keeps references to it), so that a process can train and
    evaluate several times.

    Raises:
        RestartCanHelp: another rank failed after its last collective.
    """
    with translate_comm_errors():
        collectives.barrier()


def abandon() -> None:
    """Keep this process, whose job failed, from waiting for the other ranks at exit: they may never come."""
    if collectives.world_size() > 1:
        atexit.unregister(dist.destroy_process_group)


@contextmanager
def translate_comm_errors() -> Iterator[None]:
    """Translate errors of communication, which a restart can cure, into errors of one line.

    Raises:
        RestartCanHelp: in place of an error of gloo, NCCL or torch's store, when a rank is gone, the network is lost,
            or another program uses the port.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if any(words in text for words in PORT_IN_USE):
            raise RestartCanHelp(
                f"MASTER_PORT={os.environ.get('MASTER_PORT')} on {os.environ.get('MASTER_ADDR')} is in use by another program; "
                "start again (a requeued Slurm job takes another port), or set MASTER_PORT to a free one below 32768"
            ) from error
        if isinstance(error, dist.DistError) or any(words in text for words in LOST_PEER):
            raise RestartCanHelp(
                f"another rank is gone, or cannot be reached ({first_line(error)}); see that rank's log"
            ) from error
        raise


def adopt_slurm_variables() -> None:
    """Set torchrun's environment variables from srun's, if srun started this process. In the shell of a batch script,
    which has no SLURM_STEP_NUM_TASKS, nothing is set."""
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ or "SLURM_PROCID" not in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", first_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(port_of_job()))


def port_of_job() -> int:
    """Return a port computed from the numbers of the Slurm job, its step and its restart.

    All ranks of a job step get the same port; other jobs, steps and restarts usually get another one. slurm/job.sh
    computes the same port.
    """
    job, step, restart = (
        int(text) if text.isdecimal() else 0
        for text in (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    )
    return FIRST_PORT + (job + 101 * step + 1009 * restart) % PORTS


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as `node[1-4]`. Raise UserError if `scontrol` fails."""
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"scontrol could not expand srun's node list {nodes!r} ({error}); set MASTER_ADDR to the first node's name"
        ) from None
    return listed.stdout.split()[0]


def _prepare_deepspeed(backend: str) -> None:
    """Initialise DeepSpeed on the process group that was made, with its INFO logging silenced (100 lines per start)."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A shared-memory collective that DeepSpeed would compile at first use (17 s, needs a compiler) and we never call.
    zero.deepspeed_ops()["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # adopts the group made above


def free_networks() -> None:
    """Give back the memory of networks and optimizers that nothing refers to any more, before others are built."""
    gc.collect()  # DeepSpeed's engines are in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
