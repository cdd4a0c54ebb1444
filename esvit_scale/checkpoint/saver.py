"""Saving checkpoints in the background: training waits only for the copy to host memory, not for the disk."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from esvit_scale import ranges
from esvit_scale.checkpoint import state, storage
from esvit_scale.checkpoint.state import NotSaved, Snapshot
from esvit_scale.config import Config
from esvit_scale.parallel import collectives
from esvit_scale.parallel.engine import Engines

log = logging.getLogger("esvit_scale")


class Saver:
    """A writer of checkpoints in a background thread, one at a time. All ranks must make the same calls.

    If the storage makes a save fail, the error is logged, training continues, and the next save tries again; only
    `wait` raises the error.

    Attributes:
        stopped_s: seconds that training stood still in `start`, so far.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        data: dict[str, str] | None = None,
        check_ownership: Callable[[], None] = lambda: None,
        on_saved: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """
        Args:
            data: what identifies the run's training data; it is recorded in state.json.
            check_ownership: function that rank 0 calls before it renames a finished checkpoint into place; it raises
                RestartCanHelp if another process has taken over the run.
            on_saved: function that gets the folder of every checkpoint that is complete, in the saving thread.
        """
        self._run, self._config = run, config
        self._data, self._check_ownership, self._on_saved = data, check_ownership, on_saved
        self._group = collectives.second_group()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.stopped_s = 0.0

    @ranges.named("copy for the checkpoint")
    def start(
        self, engines: Engines, centers: dict[str, Tensor], cursor: dict[str, int], is_best: bool = False
    ) -> None:
        """Wait for the previous save, copy the state at step `cursor["step"]` to host memory and start to write it.

        Args:
            is_best: also make checkpoints/best name it.
        """
        began = time.monotonic()
        self._join()
        if self._failure is not None and not isinstance(self._failure, NotSaved):
            raise self._failure
        snapshot = state.take_snapshot(self._config, engines, centers, cursor)
        extra = {} if self._data is None else {"data": self._data}
        snapshot = Snapshot(storage.copy_to_cpu(snapshot.intervals), snapshot.state | extra)
        self._failure = None
        self._thread = threading.Thread(target=self._write, args=(snapshot, is_best), name="saver")
        self._thread.start()
        self.stopped_s += time.monotonic() - began

    def wait(self) -> None:
        """Wait until the save in progress is on disk.

        Raises:
            NotSaved: the latest checkpoint could not be written.
        """
        self._join()
        if self._failure is not None:
            raise self._failure

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot, is_best: bool) -> None:
        try:
            with collectives.through(self._group):
                folder = state.write(self._run, self._config, snapshot, self._check_ownership, is_best)
            self._on_saved(folder)
        except NotSaved as error:
            self._failure = error
            if collectives.rank() == 0:
                log.error("%s; training goes on, and the next save tries again", error)
        except BaseException as error:
            self._failure = error
