"""Who am I among how many: one process, `torchrun`, or `srun` with one task per rank; and the process group.

Nothing here is asked of the user: the launcher's environment says it all.
"""

import atexit
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

from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.parallel import collectives, zero

# What gloo and TCP write when a peer is lost; NCCL and the store raise subclasses of DistError.
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

MEETING_TIME = timedelta(minutes=30)  # for all ranks to come up: importing torch on many nodes takes minutes
# How long a collective may wait during training, on top of train.hang_minutes. The watchdog ends a run that hangs, and
# it does not count the time in which the job was suspended. A collective's own clock does count it, so it is generous.
BEYOND_WATCHDOG = timedelta(days=7)
LONGEST_WAIT = timedelta(days=20)  # its milliseconds fit in 32 bits

FIRST_PORT, PORTS = 20000, 12000  # below 32768, where Linux begins to give ports to outgoing connections


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int
    device: torch.device


def start(hang_minutes: float | None = None) -> World:
    """Join the process group (nccl with a GPU, gloo without) and pick this rank's device.

    Args:
        hang_minutes: what the watchdog of a training waits; every group's own timeout is set above it, also that of
            groups which DeepSpeed makes later. None keeps torch's timeouts (10 minutes for NCCL, 30 for gloo).

    Raises:
        UserError: a launcher's variables are there in part only.
        RestartCanHelp: MASTER_PORT is in use, or another rank did not come.
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
    if hang_minutes is not None:
        _wait_longer_than(hang_minutes)
    if not dist.is_initialized():
        _record_collectives()
        with translate_comm_errors():
            _join("nccl" if cuda else "gloo", rank, size)
        atexit.register(dist.destroy_process_group)  # without it a rank aborts now and then
    _prepare_deepspeed(dist.get_backend())
    return World(rank, size, local_rank, device)


def _wait_longer_than(hang_minutes: float) -> None:
    """Give every process group from now on a timeout above the watchdog's.

    `new_group` takes torch's default for the backend, never the timeout of the group before it, and DeepSpeed calls it
    without one. So the defaults themselves are set.
    """
    minutes = min(hang_minutes, LONGEST_WAIT / timedelta(minutes=1))
    timeout = min(timedelta(minutes=minutes) + BEYOND_WATCHDOG, LONGEST_WAIT)
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def _record_collectives() -> None:
    """Let NCCL's flight recorder keep the last collectives, and write them beside the rank's log when NCCL itself gives
    up. (The watchdog writes its own dump, see train/watchdog.py.) Variables that are set already stay as they are.
    """
    renamed = hasattr(_distributed_c10d, "_dump_fr_trace")  # torch warns of the names that it had before
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if renamed else "TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if logs := os.environ.get("ESVIT_RANK_LOGS"):
        file = "TORCH_FR_DUMP_TEMP_FILE" if renamed else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
        os.environ.setdefault(file, str(Path(logs) / "nccl-trace-rank-"))


def _join(backend: str, rank: int, size: int) -> None:
    """Make the default group; ranks that do not meet within MEETING_TIME are an error of the store."""
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=MEETING_TIME))
    dist.init_process_group(backend, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=size)


def stop() -> None:
    """Wait at the end of a job that went well: nobody leaves while another still talks to it.

    The group itself lives until the process ends (DeepSpeed keeps it in its own tables), so that a process can train
    and evaluate several times.

    Raises:
        RestartCanHelp: another rank failed after its last collective, and does not come.
    """
    with translate_comm_errors():
        collectives.barrier()


def abandon() -> None:
    """The end of a job that failed here: the others may never come, so do not wait for them, now or at exit."""
    if collectives.world_size() > 1:
        atexit.unregister(dist.destroy_process_group)


@contextmanager
def translate_comm_errors() -> Iterator[None]:
    """Translate errors of the transport, which are the machine's fault and not the run's, into one line.

    A rank that is gone or stopped, a lost network, or a port that another program holds reach the ranks as errors of
    gloo, NCCL or torch's store.

    Raises:
        RestartCanHelp: in their place.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).strip()
        first = text.splitlines()[0] if text else type(error).__name__
        if any(words in text for words in PORT_IN_USE):
            raise RestartCanHelp(
                f"MASTER_PORT={os.environ.get('MASTER_PORT')} on {os.environ.get('MASTER_ADDR')} is in use by another program; "
                "start again (a requeued Slurm job takes another port), or set MASTER_PORT to a free one below 32768"
            ) from error
        if isinstance(error, dist.DistError) or any(words in text for words in LOST_PEER):
            raise RestartCanHelp(
                f"another rank is gone, or cannot be reached ({first[:200]}); see that rank's log"
            ) from error
        raise


def _adopt_slurm_variables() -> None:
    """Set torchrun's variables from srun's. SLURM_STEP_NUM_TASKS exists in job steps only, not in a batch shell."""
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ or "SLURM_PROCID" not in os.environ:
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ.get("SLURM_LOCALID", "0")
    os.environ.setdefault("MASTER_ADDR", _first_host(nodes))
    os.environ.setdefault("MASTER_PORT", str(_port_of_job()))


def _port_of_job() -> int:
    """A port from the job's id: the same on every rank, another one for other jobs, steps and restarts (job.sh alike)."""
    job, step, restart = (
        int(text) if text.isdecimal() else 0
        for text in (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    )
    return FIRST_PORT + (job + 101 * step + 1009 * restart) % PORTS


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
    """Initialise DeepSpeed on the process group that was made, with its INFO logging silenced (100 lines per start)."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A shared-memory collective that DeepSpeed would compile at first use (17 s, needs a compiler) and we never call.
    zero.deepspeed_ops()["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # adopts the group made above
