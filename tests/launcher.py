"""The one place that starts Python programs as processes of their own: alone, under torchrun, or as srun starts ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
CLI = ("-m", "esvit_scale")


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a started program: this checkout's package, one thread, and `variables`."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}


def start(*program: object, ranks: int = 1) -> "subprocess.Popen[str]":
    """Start `python PROGRAM…`, under torchrun when there are several ranks.

    Args:
        program: what follows `python` on a command line, for example a script's path and its arguments, or `*CLI, "demo"`.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *map(str, program)]
    return _start(command, environment())


def run(*program: object, ranks: int = 1, timeout: float = 200) -> "subprocess.CompletedProcess[str]":
    """Run what `start` starts to its end, which must be exit code 0."""
    done = wait(start(*program, ranks=ranks), timeout)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def wait(process: "subprocess.Popen[str]", timeout: float) -> "subprocess.CompletedProcess[str]":
    """Return the exit code and output of a started program; end it when it takes longer than `timeout` seconds."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, which a SIGKILL would leave alone
        print(process.communicate(timeout=60)[1][-6000:])
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start_cli(*arguments: str, ranks: int = 1) -> "subprocess.Popen[str]":
    """Start `python -m esvit_scale ARGUMENTS…`, under torchrun when there are several ranks."""
    return start(*CLI, *arguments, ranks=ranks)


def start_ranks(size: int, *program: object) -> "list[subprocess.Popen[str]]":
    """Start `python PROGRAM…` once for every rank without torchrun, which would end the survivors of a lost rank itself.

    As under srun, rank 0's own process keeps the store.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    command = [sys.executable, *map(str, program)]
    return [_start(command, environment(**group, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(size)]


def _start(command: list[str], variables: dict[str, str]) -> "subprocess.Popen[str]":
    # Tests that watch a run read its output at the end; a full pipe (64 KiB by default, 200 logged steps) would stop it.
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pipesize": 1 << 20}
    return subprocess.Popen(command, text=True, env=variables, cwd=REPOSITORY, **pipes)
