"""Execution of one function over many jobs in forked processes, with progress counted inside the jobs.

Processes are forked so that they share large data of the parent (a list of ten million names) without copying it.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

from esvit_scale.errors import RestartCanHelp
from esvit_scale.progress import Progress

T = TypeVar("T")
R = TypeVar("R")

WATCH = 0.5  # seconds between updates of the progress display

_work: Callable[..., Any] | None = None  # the function of `each`, set in worker processes
_done: Any = None  # counter of ticks, shared by the processes


def each(
    work: Callable[[T, Callable[[], None]], R], jobs: Sequence[T], workers: int, total: int, unit: str
) -> Iterator[tuple[T, R]]:
    """Yield (job, work(job, tick)) as jobs finish; with one worker, in the order of the jobs.

    `work` calls tick() once per `unit` (such as "images"), of which all jobs together have `total`. An error in a job ends the
    other jobs and is raised here, after the results of finished jobs have been yielded.

    Raises:
        RestartCanHelp: a worker process was killed.
    """
    with Progress(total, unit) as progress:
        if workers <= 1 or len(jobs) <= 1:
            yield from _here(work, jobs, progress)
        else:
            yield from _forked(work, jobs, min(workers, len(jobs)), progress)


def _here(work: Callable[[T, Callable[[], None]], R], jobs: Sequence[T], progress: Progress) -> Iterator[tuple[T, R]]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress.to(done)

    for job in jobs:
        yield job, work(job, tick)


def _forked(
    work: Callable[[T, Callable[[], None]], R], jobs: Sequence[T], workers: int, progress: Progress
) -> Iterator[tuple[T, R]]:
    fork = multiprocessing.get_context("fork")
    counter = fork.Value("q", 0)
    pool = ProcessPoolExecutor(workers, fork, _start, (work, counter, os.getpid()))
    waiting = iter(jobs)
    running: dict[Future[R], T] = {}
    processes: list[Any] = []
    try:
        while True:
            for job in waiting:  # submit a few jobs ahead, so that a million shards are not a million futures
                running[pool.submit(_run, job)] = job
                if len(running) >= 2 * workers:
                    break
            if not running:
                return
            processes = list((pool._processes or {}).values())
            finished, _ = wait(running, WATCH, FIRST_COMPLETED)
            progress.to(counter.value)
            for future in finished:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise RestartCanHelp(
            "a worker process was killed (out of memory?); run the same command again to continue; --workers 1 needs the "
            "least memory"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if running:  # interrupted: the work in progress is discarded
            for process in processes:
                with suppress(OSError, ValueError):
                    process.kill()


def _start(work: Callable[..., Any], counter: Any, parent: int) -> None:
    """Prepare a new worker process: it ignores ctrl-C, which the parent handles, and dies with the parent."""
    global _work, _done
    gc.freeze()  # never collect the parent's objects here: that would close its connections to a store
    _work, _done = work, counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _run(job: Any) -> Any:
    assert _work is not None
    return _work(job, _tick)


def _tick() -> None:
    with _done.get_lock():
        _done.value += 1
