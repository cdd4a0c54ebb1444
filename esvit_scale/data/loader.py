"""Loader processes: which part of every batch each of them makes, and how its results and failures reach training.

The images of a global batch (order.py) are dealt out to ranks, and a rank's images to its loader processes (workers), in
contiguous runs, so that the parts, joined in order, are the rank's batch in the order of positions. Where a rank has fewer
images of a batch than workers, a part is one image, and the workers take turns:

    6 images, 3 workers: worker 0 makes images 0 1 of every batch, worker 1 makes 2 3, worker 2 makes 4 5
    2 images, 3 workers: worker 0 makes image 0 of batch 0, worker 1 image 1 of batch 0, worker 2 image 0 of batch 1,
                         worker 0 image 1 of batch 1, …
"""

import ctypes
import gc
import math
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import get_worker_info

from esvit_scale.config import Config
from esvit_scale.data.limits import check_node, translate_limits
from esvit_scale.division import batch_problem, share
from esvit_scale.errors import RestartCanHelp, UserError

T = TypeVar("T")

# More processes than cores are the user's choice. Torch says so twice, the second time when the processes start.
warnings.filterwarnings("ignore", "This DataLoader will create")

PREFETCH = 2  # results that every worker prepares ahead
_DIED = "a loader process died{}: killed, or out of memory (fewer data.workers need less of it)"


@dataclass(frozen=True)
class LoaderAssignment:
    """What the loader processes of one rank make: a range of batches, and of each batch the images of every process.

    An image is named by its place in the global batch, 0..B-1: image `i` of a slot is at slot · images_per_slot + i.
    """

    config: Config
    rank: int
    world_size: int
    start: int  # index of the first batch
    stop: int  # index after the last batch
    steps_per_epoch: int
    whole_slots: bool = False  # keep the images of a slot in one process, as the order of plain tars needs it

    @property
    def images_per_slot(self) -> int:
        """Return how many images of every batch one slot holds."""
        return self.config.train.global_batch // self.config.slots

    @property
    def images_of_rank(self) -> range:
        """Return the places in the global batch of this rank's images."""
        batch = self.config.train.global_batch
        return range(batch)[share(batch, self.rank, self.world_size)]

    @property
    def most_parts(self) -> int:
        """Return the largest number of parts into which a batch of this rank can be divided."""
        return len(self.images_of_rank) // self._unit

    @property
    def _unit(self) -> int:
        """Return the number of neighbouring images that are never divided."""
        return self.images_per_slot if self.whole_slots and self.config.slots % self.world_size == 0 else 1

    def worker(self) -> tuple[int, int]:
        """Return the number of the calling process among its rank's workers, and how many workers there are."""
        info = get_worker_info()
        return (info.id, info.num_workers) if info else (0, 1)

    def images_of_worker(self, batch_index: int) -> range:
        """Return the places in a global batch of the images that the calling process makes; empty if it is not its turn.

        Parts are counted over all batches from the first; worker w of n makes the parts w, w + n, w + 2n, …
        """
        (worker, workers), of_rank = self.worker(), self.images_of_rank
        parts = min(workers, self.most_parts)
        part = (worker - (batch_index - self.start) * parts) % workers
        if part >= parts:
            return of_rank[:0]
        units = share(self.most_parts, part, parts)
        return of_rank[units.start * self._unit : units.stop * self._unit]

    def parts_of_worker(self) -> Iterator[tuple[int, range]]:
        """Yield the parts that the calling process makes, in order: batch index, and places in the global batch."""
        for batch_index in range(self.start, self.stop):
            if images := self.images_of_worker(batch_index):
                yield batch_index, images

    def slots_of_worker(self) -> range:
        """Return the data slots of which the calling process makes images, in whatever batch."""
        _, workers = self.worker()
        takes_turns = workers > self.most_parts
        return self.slots_of(self.images_of_rank if takes_turns else self.images_of_worker(self.start))

    def slots_of(self, images: range) -> range:
        """Return the data slots to which neighbouring images of a global batch belong."""
        return range(images.start // self.images_per_slot, -(-images.stop // self.images_per_slot))


def check_division(config: Config, world_size: int) -> None:
    """Raise UserError when the global batch does not divide over the ranks."""
    if problem := batch_problem(config.train.global_batch, config.train.grad_accum, world_size):
        raise UserError(problem)


class NoValidSamples(Exception):
    """Error for data in which no valid sample can be found, although the storage answers."""


class _Failure(NamedTuple):
    """An error that a worker sends in place of a result: an exception would arrive wrapped in the worker's traceback."""

    message: str
    restart: bool


def run_stages(stages: list[Callable[..., Any]], workers: int) -> Iterator[Any]:
    """Run a pipeline in `workers` loader processes (0: in this one) and yield the results of each in turn.

    The first stage is called without arguments, each other stage with the iterable that the stage before it returned.

    Raises:
        UserError: a stage raised it, or NoValidSamples.
        RestartCanHelp: a stage raised it, a process died, or the node allows too few open files or has too little
            shared memory for so many processes.
    """
    check_node(workers)
    pipeline = wds.DataPipeline(*stages, _tell_failure)
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=partial(_start_worker, os.getpid()),
        generator=torch.Generator(),  # the loader draws a seed that nothing uses; keep the global generator untouched
    )
    return _parts(loader)


@contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Raise RestartCanHelp in place of torch's RuntimeError about a loader process that died.

    Torch raises that error from a signal handler, wherever the main thread is; so wrap everything that the main thread
    does while there are loader processes.
    """
    try:
        yield
    except RuntimeError as error:
        died = re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)", str(error))
        if died is None or "Bus error" in str(error):  # that one is about /dev/shm, see limits.py
            raise
        raise RestartCanHelp(_DIED.format(f" (pid {died[1]})")) from None


def pixel_dtype(bits: int) -> torch.dtype:
    """Return the type of a stored pixel value of 8 or 16 bits."""
    return torch.uint8 if bits == 8 else torch.uint16


def pixel_memory(dtype: torch.dtype, *shape: int, shared: bool) -> Tensor:
    """Return memory for pixels; a loader process sends them to its parent without a copy if it is `shared`.

    It is made as shared memory at once, as torch's default collate function does: `share_memory_` would copy it there.
    """
    if not shared:
        return torch.empty(shape, dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def reason(error: Exception) -> str:
    """Return an error's message as one line of at most 200 characters."""
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())[:200]


def _tell_failure(parts: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from parts
    except (NoValidSamples, UserError, RestartCanHelp) as error:
        yield _Failure(str(error), isinstance(error, RestartCanHelp))


def _as_it_is(part: T) -> T:
    """Return the argument unchanged, as the collate function: the default one would turn arrays into tensors."""
    return part


def _parts(parts: Any) -> Iterator[Any]:
    with (
        translate_limits(),
        closing(iter(parts)) as iterator,
    ):  # closed here, since otherwise the garbage collector decides when the processes end
        while True:
            with translate_worker_errors():
                try:
                    part = next(iterator, None)
                except (ConnectionError, EOFError):  # a result of the dead process was being fetched
                    raise RestartCanHelp(_DIED.format("")) from None
            if part is None:
                return
            if isinstance(part, _Failure):
                raise RestartCanHelp(part.message) if part.restart else UserError(part.message)
            yield part


def _start_worker(parent: int, worker: int) -> None:
    """Make a new worker ignore the signals that only the training process handles.

    Ctrl-C and the scheduler signal the whole process group; a worker ends when its parent asks it to, or dies with it.
    """
    gc.freeze()  # never collect the parent's objects here: that would close its connections to a store
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_sigterm_of, args=(parent,), daemon=True).start()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    torch.set_num_threads(1)


def _end_at_sigterm_of(parent: int) -> None:
    """Exit when the parent sends SIGTERM, as it does to a worker that does not end by itself; ignore other senders."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
