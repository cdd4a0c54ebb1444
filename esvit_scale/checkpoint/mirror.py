"""Copies of checkpoints in an object store (`train.mirror`), from which a run resumes where its run dir is gone.

Checkpoints are written to the run dir as always. Afterwards a thread of rank 0 sends the newest one: its files, the run's
records, a list of them all with sizes and sha256, and last `latest`, which names the step folder. So whatever `latest`
names is complete. A mirror that fails is a warning; the next checkpoint is sent anew.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from esvit_scale import files, store_urls
from esvit_scale.checkpoint import step_folders
from esvit_scale.config import Config
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.errors import RestartCanHelp, UserError

log = logging.getLogger("esvit_scale")

RECORDS = ("config.yaml", "metrics.jsonl", "environment.json", "log.txt", "lengthened.jsonl")  # beside checkpoints/
LATEST = "latest"
LISTED = "files.json"  # of a step folder in the store: name → [bytes, sha256]
WAIT_S = 60.0  # seconds that the end of a run waits for the newest checkpoint to be sent
WAIT_AFTER_ERROR_S = 5.0


def url_of(config: Config) -> str:
    """Return the address of a run's mirror: train.mirror and the name of the run dir."""
    return store_urls.join(str(config.train.mirror), config.run_path.name)


@contextmanager
def sending(config: Config, active: bool) -> Iterator[Callable[[Path], None]]:
    """Yield a function that sends a step folder to the mirror in the background; it does nothing without train.mirror.

    When the block ends, wait up to WAIT_S for the newest checkpoint.

    Args:
        active: whether this process sends; one of a run does.
    """
    if config.train.mirror is None or not active:
        yield lambda folder: None
        return
    sender = _Sender(config)
    try:
        yield sender.send
    except BaseException:
        sender.close(WAIT_AFTER_ERROR_S)
        raise
    sender.close(WAIT_S)


def restore(config: Config) -> None:
    """Fetch the newest checkpoint of a run from its mirror, if the run dir has none and the mirror has one.

    Raises:
        UserError: the store denies access, or an object is damaged.
        StoreUnreachable: the store does not answer.
    """
    run = config.run_path
    if config.train.mirror is None or step_folders.has_checkpoints(run) or (run / "config.yaml").exists():
        return
    url = url_of(config)
    try:
        with _opened(config) as store:
            name = store.read(LATEST, at_start=True).decode().strip()
            log.warning("%s: fetching %s from %s …", run, name, url)
            _fetch(store, run, Path(name).name)
    except Missing:
        return
    except Denied as error:
        raise UserError(f"{error}; set {store_urls.WHERE.get(store_urls.protocol(url), 'its credentials')}") from None


@contextmanager
def _opened(config: Config) -> Iterator[Store]:
    """Yield the store of a run's mirror; data.storage_options are for it, too, if data.train has its protocol."""
    url = url_of(config)
    same = store_urls.protocol(url) == store_urls.protocol(config.data.train)
    options = (config.data.storage_options or {}) if same else {}
    with TemporaryDirectory() as locks, closing(Store(url, options, Path(locks))) as store:
        yield store


def _fetch(store: Store, run: Path, name: str) -> None:
    """Fetch a step folder and the run's records; the step folder appears when all of its files agree with their list."""
    prefix = f"checkpoints/{name}"
    listed = json.loads(store.read(f"{prefix}/{LISTED}", at_start=True))
    run.mkdir(parents=True, exist_ok=True)
    with files.new_folder(run / prefix) as tmp:
        for relative, (size, sha256) in listed.items():
            target = tmp / relative
            if not target.resolve().is_relative_to(tmp.resolve()):
                raise UserError(f"{store.url}/{prefix}/{LISTED}: {relative!r} is no file of this folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            store.fetch(f"{prefix}/{relative}", target, urgent=True)
            if target.stat().st_size != size or files.sha256(target) != sha256:
                raise UserError(f"{store.url}/{prefix}/{relative}: is not what was sent; remove {store.url}/{LATEST}")
        for record in (*RECORDS[1:], RECORDS[0]):  # config.yaml last: with it the folder is a run dir
            with suppress(Missing):
                store.fetch(f"{prefix}.{record}", tmp.parent / f".{record}.partial", urgent=True)
                (tmp.parent / f".{record}.partial").replace(run / record)
    step_folders.write_latest(run / prefix)


class _Sender:
    """A thread that sends the newest checkpoint; those that are replaced while it is busy are left out."""

    def __init__(self, config: Config) -> None:
        self._config, self._url = config, url_of(config)
        self._changed = threading.Condition()
        self._wanted: Path | None = None
        self._busy = self._closed = False
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def send(self, folder: Path) -> None:
        """Send a step folder after the one that is being sent now."""
        with self._changed:
            self._wanted = folder
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Wait for the newest checkpoint, at most so many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: not self._busy and self._wanted is None, seconds):
                log.warning("train.mirror: the newest checkpoint is not in %s yet; the run dir has it", self._url)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is not None or self._closed)
                if self._wanted is None:
                    return
                folder, self._wanted, self._busy = self._wanted, None, True
            try:
                began = time.monotonic()
                _send(self._config, folder)
                log.info("mirrored %s to %s in %.0f s", folder.name, self._url, time.monotonic() - began)
            except Missing:
                log.info("train.mirror: %s was removed before it was sent; the next checkpoint is sent", folder.name)
            except (Denied, UserError, RestartCanHelp, OSError) as error:
                log.warning("train.mirror: %s; the run goes on, and the next checkpoint is sent anew", error)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()


def _send(config: Config, folder: Path) -> None:
    prefix, run = f"checkpoints/{folder.name}", config.run_path
    with _opened(config) as store:
        listed = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = path.relative_to(folder).as_posix()
            listed[relative] = [path.stat().st_size, files.sha256(path)]
            store.put(path, f"{prefix}/{relative}")
        for record in RECORDS:
            if (run / record).is_file():
                store.put(run / record, f"{prefix}.{record}")
        store.write(f"{prefix}/{LISTED}", json.dumps(listed).encode())
        store.write(LATEST, f"{folder.name}\n".encode())
        kept = {path.name for path in step_folders.list_step_folders(run)} | {folder.name}
        for name in store.names("checkpoints"):
            if name.partition(".")[0] not in kept:
                store.remove(f"checkpoints/{name}")
