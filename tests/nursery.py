"""A process that has imported torch, DeepSpeed and this package, and forks programs that would import them again.

That takes eight seconds of a processor for every process, and a test of two ranks, killed and started again, starts
four. A fork starts in some milliseconds. Nothing of torch runs before the fork: the process group, DeepSpeed's start
and the signal handlers are the program's own.

A keeper beside each program waits for its end and notes its exit code, because only a parent can. Programs end with
their keepers, and those with the nursery, which ends with the test process, however that ends.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Process:
    """A program that a nursery started, used as `subprocess.Popen` is: texts, and the exit code of a signal is negative."""

    def __init__(self, folder: Path, args: list[str]) -> None:
        self.args, self._folder = args, folder
        self.returncode: int | None = None
        self.pid = int(_read_when_there(folder / "pid"))

    def poll(self) -> int | None:
        """Return the exit code of a program that has ended, or None."""
        if self.returncode is None:
            with contextlib.suppress(FileNotFoundError):
                self.returncode = os.waitstatus_to_exitcode(int((self._folder / "ended").read_text()))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when the program has ended; raise TimeoutExpired when it takes longer than `timeout`."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Return all that the program printed to its output and to its errors, when it has ended."""
        self.wait(timeout)
        output, errors = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        return output, errors

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)


class Nursery:
    """Starts Python programs as forks of one process, which begins with the first of them."""

    def __init__(self, inside: tuple[str, ...] = (), **variables: str) -> None:
        """Prepare a nursery.

        Args:
            inside: a command line that the command line of the nursery is appended to.
            variables: of the environment of the nursery, as of when it imports torch.
        """
        self._inside, self._variables = inside, variables
        self._process: subprocess.Popen[str] | None = None
        self._count = 0

    def start(self, *program: object, **variables: str) -> Process:
        """Start what `python PROGRAM…` starts, with an environment of the test's, the nursery's and these `variables`."""
        if self._process is None:
            command = [*self._inside, sys.executable, "-m", "tests.nursery"]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                text=True,
                env=environment(**self._variables),
                cwd=REPOSITORY,
                preexec_fn=_end_with_parent,
            )
            self._folder = tempfile.TemporaryDirectory(prefix="nursery-")
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        arguments = [*map(str, program)]
        given = environment(**{**self._variables, **variables})
        assert self._process.stdin is not None
        print(json.dumps([str(folder), arguments, given]), file=self._process.stdin, flush=True)
        return Process(folder, arguments)

    def close(self) -> None:
        """End the nursery, and every program of it that still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._folder.cleanup()
            self._process = None


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a started program: this checkout's package, one thread, and `variables`."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables}


def _read_when_there(path: Path) -> str:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, "the nursery does not answer"
        time.sleep(0.005)
    return path.read_text()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(WITH_PARENT, signal.SIGKILL)


def _write_whole(path: Path, text: str) -> None:
    tmp = path.with_suffix(".tmp")
    tmp.write_text(text)
    tmp.rename(path)


def _serve() -> list[str] | None:
    """Fork for each request; return the program's arguments in a fork, and None in the nursery when all is over."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    for request in sys.stdin:
        if os.fork():
            continue
        _end_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        folder, arguments, variables = json.loads(request)
        program = os.fork()
        if program:
            _write_whole(Path(folder) / "pid", str(program))
            _, status = os.waitpid(program, 0)
            _write_whole(Path(folder) / "ended", str(status))
            os._exit(0)
        _end_with_parent()
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the nursery may be a job that ignores it
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(variables)
        random.seed()
        return arguments
    return None


def _run(arguments: list[str]) -> None:
    """Run what follows `python` on a command line, in this process, and end the process.

    It ends as Python does, except that the modules stay: in a fork, taking them apart copies all their memory.
    """
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.argv = ["", *arguments[2:]]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    import esvit_scale.parallel.engine
    import esvit_scale.train.pretraining  # noqa: F401

    gc.freeze()
    asked = _serve()
    if asked is not None:
        _run(asked)
