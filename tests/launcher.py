"""The one place that starts Python programs as processes of their own: alone, under torchrun, or as srun starts ranks."""

import socket
import subprocess
import sys
import time
from typing import Any

from tests.nursery import REPOSITORY, Nursery, Process, environment

__all__ = ["CLI", "REPOSITORY", "environment", "fork", "run", "start", "start_cli", "start_ranks", "wait"]

CLI = ("-m", "esvit_scale")
_nursery = Nursery()


def start(*program: object, ranks: int = 1) -> "subprocess.Popen[str]":
    """Start `python PROGRAM…`, under torchrun when there are several ranks.

    Args:
        program: what follows `python` on a command line, for example a script's path and its arguments, or `*CLI, "demo"`.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *map(str, program)]
    return _start(command)


def run(*program: object, ranks: int = 1, timeout: float = 200) -> "subprocess.CompletedProcess[str]":
    """Run `python PROGRAM…` on some ranks to its end, which must be exit code 0; return what all of them printed.

    Unlike `start`, it does so without torchrun, and in forks of a process that has imported torch and DeepSpeed.
    """
    processes = start_ranks(ranks, *program)
    end = time.monotonic() + timeout
    try:
        while (codes := [process.poll() for process in processes]) != [0] * ranks:
            failed = [rank for rank, code in enumerate(codes) if code]
            assert not failed, "\n".join(processes[rank].communicate()[1][-4000:] for rank in failed)
            assert time.monotonic() < end, f"{program}: not within {timeout} s"
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    printed = [process.communicate() for process in processes]
    return subprocess.CompletedProcess(program, 0, *map("".join, zip(*printed, strict=True)))


def fork(*program: object, **variables: str) -> Process:
    """Start `python PROGRAM…` as a fork of a process that has imported torch and DeepSpeed (tests/nursery.py).

    Its environment is that of the test, with `variables`.

    It is for programs that import them anyway, and whose tests do not depend on a process's own import and end.
    """
    return _nursery.start(*program, **variables)


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


def start_ranks(size: int, *program: object) -> list[Process]:
    """Start `python PROGRAM…` once for every rank without torchrun, which would end the survivors of a lost rank itself.

    As under srun, rank 0's own process keeps the store. The processes are forks (tests/nursery.py).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [_nursery.start(*program, **group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]


def _start(command: list[str]) -> "subprocess.Popen[str]":
    # Tests that watch a run read its output at the end; a full pipe (64 KiB by default, 200 logged steps) would stop it.
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "pipesize": 1 << 20}
    return subprocess.Popen(command, text=True, env=environment(), cwd=REPOSITORY, **pipes)
