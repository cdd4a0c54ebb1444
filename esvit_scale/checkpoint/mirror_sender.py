"""Sending of checkpoints to a run's mirror (mirror.py), in a thread of rank 0.

Checkpoints are written to the run dir as always. Afterwards the thread sends the newest one: its files, the run's
records, the list of files, and last `latest`, which names the step folder. So whatever `latest` names is complete. If
the mirror fails, a warning is logged, training goes on, and the next checkpoint is sent.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from esvit_scale import files
from esvit_scale.checkpoint import mirror, step_folders
from esvit_scale.config import Config
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.errors import RestartCanHelp, UserError, first_line

log = logging.getLogger("esvit_scale")

WAIT_S = 60.0  # seconds that the end of a run waits for the newest checkpoint to be sent
WAIT_AFTER_ERROR_S = 5.0  # the same where the run ends with an error
BEHIND = 4  # a warning is logged when so many checkpoints in a row did not arrive, and each time the number doubles


@contextmanager
def sending(config: Config, active: bool, mirrored_step: int = 0) -> Iterator["Sender | None"]:
    """Yield the sender of a run's checkpoints; None without train.mirror.

    When the block ends, wait up to WAIT_S for the newest checkpoint.

    Args:
        active: whether this process sends the checkpoints; only rank 0 does.
        mirrored_step: the step of the newest checkpoint in the mirror, from `mirror.claim`.
    """
    if config.train.mirror is None or not active:
        yield None
        return
    sender, wait_s = Sender(config, mirrored_step), WAIT_AFTER_ERROR_S
    try:
        yield sender
        wait_s = WAIT_S
    finally:
        if not sender.close(wait_s):
            log.warning(
                "train.mirror: the newest checkpoint is not in %s yet; the run dir has it", mirror.url_of(config)
            )


class Sender:
    """A thread that sends the newest checkpoint; while it is busy, a newer checkpoint replaces one that waits.

    The step folder that is being sent is not pruned. So a mirror that is slower than the saves still gets complete
    checkpoints, and is behind by the time of two transfers at most.
    """

    def __init__(self, config: Config, mirrored_step: int = 0) -> None:
        """
        Args:
            mirrored_step: the step of the newest checkpoint in the mirror.
        """
        self._config, self._run, self._url = config, config.run_path, mirror.url_of(config)
        self._changed = threading.Condition()
        self._wanted: Path | None = None
        self._closed, self._unsent = False, 0
        self._mirrored_step, self._newest = mirrored_step, ""
        self._seen = {folder.name for folder in step_folders.list_step_folders(self._run)}
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._thread.start()

    def mirrored_step(self) -> int:
        """Return the step of the newest checkpoint that is complete in the mirror; 0 if there is none."""
        return self._mirrored_step

    def send(self, folder: Path) -> None:
        """Let the thread send a step folder after the one that it is sending now; return at once."""
        with self._changed:
            self._wanted, self._unsent = folder, self._unsent + 1
            self._changed.notify_all()
        if self._unsent >= BEHIND and self._unsent & (self._unsent - 1) == 0:
            log.warning(
                "train.mirror: %d checkpoints were written since step %d, the last one in %s: it fails, or is slower than "
                "the saves; only the newest is sent",
                *(self._unsent, self._mirrored_step, self._url),
            )

    def close(self, seconds: float) -> bool:
        """Take no more checkpoints, and wait for the newest and the last records, at most so many seconds.

        Returns:
            Whether nothing is left to do; otherwise it may be called again.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(min(seconds, 1.0))
        if self._thread.is_alive() and seconds > 1:
            log.info("waiting for the newest checkpoint to arrive in %s, at most %.0f s …", self._url, seconds)
            self._thread.join(seconds - 1)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (folder := self._next()) is not None:
            with step_folders.held(folder):
                self._attempt(folder, lambda folder=folder: self._send(folder))  # type: ignore[misc]
        if self._newest:  # the end of the run wrote summary.json and the last rows after its last checkpoint
            self._attempt(self._run / "checkpoints" / self._newest, self._send_last_records)

    def _next(self) -> Path | None:
        """Wait for the next step folder to send, and return it; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted is not None or self._closed)
            folder, self._wanted = self._wanted, None
            return folder

    def _attempt(self, folder: Path, send: Callable[[], None]) -> None:
        """Call `send` for a step folder, and log any error that it raises as a warning."""
        try:
            send()
        except Exception as error:
            if isinstance(error, Missing | FileNotFoundError) and not folder.exists():
                log.info("train.mirror: %s was removed before it was sent; the next checkpoint is sent", folder.name)
                return
            is_ours = isinstance(error, UserError | RestartCanHelp | Denied | Missing)
            text = (
                str(error).removeprefix("train.mirror: ") if is_ours else f"{type(error).__name__}: {first_line(error)}"
            )
            log.warning("train.mirror: %s; the run goes on, and the next checkpoint is sent anew", text)

    def _send(self, folder: Path) -> None:
        began, unsent = time.monotonic(), self._unsent
        with mirror.opened(self._config) as store:
            mirror.own(store, self._run)
            best = step_folders.best(self._run)
            self._send_folder(store, folder)
            store.write(step_folders.LATEST, f"{folder.name}\n".encode())
            self._mirrored_step, self._newest = step_folders.step_of(folder) or 0, folder.name
            with self._changed:
                self._unsent -= unsent
            log.info("mirrored %s to %s in %.0f s", folder.name, self._url, time.monotonic() - began)
            if best is not None:
                with step_folders.held(best):
                    if best != folder and not mirror.is_complete(store, best.name):
                        self._send_folder(store, best)
                store.write(step_folders.BEST, f"{best.name}\n".encode())
            self._remove_pruned(store, folder)

    def _send_folder(self, store: Store, folder: Path) -> None:
        prefix, listed = f"checkpoints/{folder.name}", {}
        with suppress(Missing):  # a step that is saved again is incomplete while it is sent
            store.remove(f"{prefix}/{mirror.LISTED}")
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = path.relative_to(folder).as_posix()
            listed[relative] = [path.stat().st_size, files.sha256(path)]
            store.put(path, f"{prefix}/{relative}")
        if not listed:
            raise FileNotFoundError(f"{folder}: has no files")
        self._send_records(store, prefix)
        store.write(f"{prefix}/{mirror.LISTED}", json.dumps(listed).encode())

    def _send_records(self, store: Store, prefix: str) -> None:
        for record in mirror.RECORDS:
            if (self._run / record).is_file():
                store.put(self._run / record, f"{prefix}.{record}")

    def _send_last_records(self) -> None:
        with mirror.opened(self._config) as store:
            mirror.own(store, self._run)
            self._send_records(store, f"checkpoints/{self._newest}")

    def _remove_pruned(self, store: Store, sent: Path) -> None:
        """Remove the step folders that this process has seen in the run dir, and that are no longer there.

        Others stay: a restored run dir has one of its mirror's checkpoints, and the rest may exist nowhere else.
        """
        there = {folder.name for folder in step_folders.list_step_folders(self._run)} | {sent.name}
        if gone := self._seen - there:
            for name in store.names("checkpoints"):
                if name.partition(".")[0] in gone:
                    store.remove(f"checkpoints/{name}")
        self._seen = there
