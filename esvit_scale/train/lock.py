"""The lock of a run dir, lock.json, which lets one process at a time write there.

The file holds host, pid, Slurm job and a heartbeat. It is made with `link`, which is atomic on NFS, too, so that one of
several starts gets it. Another process takes it over when its holder has ended on this host, when its holder ran on
another host or in another container of the same Slurm job (a requeue), or when the heartbeat is older than 60 s and does
not change for 25 s: the clocks of two hosts may differ, so age alone proves nothing. To do so, it first creates a claim
file named after the hash of the old record, which only one process can, and goes on only if the lock still holds that
record. A holder writes heartbeats only into the file that it made itself, so that a process that was suspended for an
hour cannot take the run back.
"""

import hashlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from esvit_scale import files
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.parallel import collectives
from esvit_scale.train.run_records import STALE_S, LockRecord, parse_lock

log = logging.getLogger("esvit_scale")

HEARTBEAT_S = 10
LEAVE_S = 5  # leaving the lock waits so long for the heartbeat thread, which may hang on storage that does not answer
WATCH_S = 25  # a record that is not recent is watched so long; a living holder writes a heartbeat within this time
RECORD_BYTES = 512  # every record is padded to this length, so that a heartbeat needs no space on a full disk


class Lock:
    """The lock of a run dir, a context manager that all ranks enter together; rank 0 holds the lock.

    Leaving it removes the run dir, too, if nothing was written there.

    Raises:
        UserError: on entering, when another process holds the lock.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "lock.json"
        self._stop = threading.Event()
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
            "pid_namespace": pid_namespace(),
            "started": _start_of(os.getpid()) or "",
            "token": uuid.uuid4().hex,
        }
        self._file: int | None = None  # descriptor of the lock file that this process made
        self._beaten = time.monotonic()
        self._lost = False
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="heartbeat")

    def __enter__(self) -> "Lock":
        collectives.run_on_rank0_and_broadcast(self._acquire)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        self._stop.set()
        self._thread.join(timeout=LEAVE_S)
        with suppress(OSError):
            if self.held():
                self._path.unlink(missing_ok=True)
        if (
            not self._thread.is_alive()
        ):  # else it may still write to the file descriptor, whose number must not be given to another file
            with suppress(OSError):
                os.close(self._file)
        self._file = None
        with suppress(OSError):  # not empty: the run began
            self._path.parent.rmdir()

    def held(self) -> bool:
        """Return whether this process still holds the lock. If not, it must not write to the run dir any more."""
        if self._lost:
            return False
        if self._file is None:
            return False
        try:
            record, mine = parse_lock(self._path.read_bytes()), os.fstat(self._file)
            if record is None:  # damaged, or read while being written: compare the file instead
                self._lost = not os.path.samestat(self._path.stat(), mine)
            else:
                self._lost = record.token != self._me["token"]
        except FileNotFoundError:
            self._lost = True
        except OSError:
            return True  # an error of the storage says nothing about the lock
        return not self._lost

    def check_held(self) -> None:
        """Raise RestartCanHelp when another process took the run over."""
        if not self.held():
            raise self.taken_over()

    def taken_over(self) -> RestartCanHelp:
        """Return the error that ends a process whose run was taken over."""
        run = self._path.parent
        return RestartCanHelp(f"{run}: another process took this run over; this process stops and writes nothing more")

    def lost(self) -> bool:
        """Return whether another process took the run over; False on ranks other than 0.

        It reads the lock only when no heartbeat was written for some time, as after a suspension.
        """
        if self._file is None:
            return False
        return self._lost or (time.monotonic() - self._beaten > 2 * HEARTBEAT_S and not self.held())

    def _acquire(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + STALE_S
        while not self._create():
            if self._path.is_dir():
                raise UserError(f"{self._path}: is a folder, but a run's lock is a file; move it away")
            with suppress(FileNotFoundError):
                found = self._path.read_bytes()
                if self._may_take_over(found):
                    self._replace(found)
                    if self._file is not None:
                        break
            if time.monotonic() > deadline:
                raise RestartCanHelp(
                    f"{self._path}: this run's lock could not be taken within {STALE_S} s, perhaps because several starts try at once; try again"
                )
            time.sleep(0.05)
        self._thread.start()

    def _create(self) -> bool:
        """Create the lock file and return True, or return False when it exists already."""
        tmp, handle = self._temporary()
        try:
            os.link(tmp, self._path)
        except FileExistsError:
            if os.fstat(handle).st_nlink != 2:
                os.close(handle)
                return False
            # The link was made, but NFS lost the answer and repeated the request.
        except OSError as error:
            os.close(handle)
            if error.errno not in files.NO_LINKS_ERRNOS:
                raise
            return self._create_exclusively()
        finally:
            tmp.unlink(missing_ok=True)
        self._file = handle
        return True

    def _create_exclusively(self) -> bool:
        """Do the same as `_create`, on storage without hard links; others may see the file empty for a moment."""
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        os.pwrite(handle, self._record(), 0)
        os.fsync(handle)
        self._file = handle
        return True

    def _replace(self, found: bytes) -> None:
        """Replace the record `found` by this process's, unless another process does so first."""
        digest = hashlib.sha256(found).hexdigest()[:16]
        number = 0
        while True:
            claim = self._path.with_name(f".lock.json.{digest}-{number}.claim")
            try:
                os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
                break
            except FileExistsError:
                with suppress(FileNotFoundError):
                    if abs(time.time() - claim.stat().st_mtime) < STALE_S:
                        return  # another process is taking over; the next look finds its record
                number += 1  # its creator died before it took the lock
        try:
            if self._path.read_bytes() != found:
                return
            tmp, handle = self._temporary()
            try:
                tmp.replace(self._path)
            except FileNotFoundError:  # NFS may have renamed it, lost the answer and repeated the request
                if not os.path.samestat(self._path.stat(), os.fstat(handle)):
                    os.close(handle)
                    return
            self._file = handle
            log.warning("%s: took over the lock; its record was: %s", self._path, _in_words(found))
        except FileNotFoundError:
            return  # the holder removed it; the next look creates a new one
        finally:
            for old in range(number + 1):
                self._path.with_name(f".lock.json.{digest}-{old}.claim").unlink(missing_ok=True)

    def _may_take_over(self, found: bytes) -> bool:
        """Return whether the holder of the record `found` has ended; otherwise raise UserError."""
        holder = parse_lock(found)
        if holder is not None:
            if _is_local(holder, self._me):
                if not _is_alive(holder):
                    return True
            elif self._me["slurm_job"] and holder.slurm_job == self._me["slurm_job"]:
                return True  # a requeue: the job's process on another host has ended
        recent = holder is not None and holder.age_s is not None and holder.age_s <= STALE_S
        if not recent and _is_unchanged(self._path, found):
            return True
        lives = "" if recent else "; it lives, and its clock differs from the one here"
        raise UserError(
            f"{self._path.parent}: in use by {holder.in_words() if holder else 'another process'}{lives}; "
            f"stop that process, or wait until its heartbeat is {STALE_S} s old"
        )

    def _keep_beating(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            if not self.held():
                return
            with suppress(OSError):  # a full disk or missing storage: the next beat tries again
                self._beat()

    def _beat(self) -> None:
        assert self._file is not None
        os.pwrite(self._file, self._record(), 0)
        os.fsync(self._file)  # an NFS client may delay the write for 35 s, longer than WATCH_S
        self._beaten = time.monotonic()

    def _temporary(self) -> tuple[Path, int]:
        """Write this process's record to a file beside the lock; return its path and its descriptor."""
        tmp = self._path.with_name(f".lock.json.{self._me['token']}.partial")
        handle = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        os.pwrite(handle, self._record(), 0)
        os.fsync(handle)
        return tmp, handle

    def _record(self) -> bytes:
        text = json.dumps(self._me)[:-1] + f', "heartbeat": {time.time():.3f}}}'  # of constant length
        return text.ljust(RECORD_BYTES - 1).encode() + b"\n"


def _in_words(content: bytes) -> str:
    record = parse_lock(content)
    return record.in_words() if record else "damaged"


def _is_unchanged(path: Path, content: bytes) -> bool:
    """Watch a lock for WATCH_S; return whether it stayed as it was, so that its holder has ended."""
    log.warning(
        "%s: left behind, or its holder's clock differs from the one here (%s); watching for %d s whether it lives",
        path,
        _in_words(content),
        WATCH_S,
    )
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(min(0.25, WATCH_S))
        try:
            if path.read_bytes() != content:
                return False
        except FileNotFoundError:
            return True
    return True


def _is_local(holder: LockRecord, me: dict[str, Any]) -> bool:
    """Return whether a holder's process id is valid here: same host and same pid namespace, because containers may
    share a host name. Old records do not name the namespace."""
    return holder.host == me["host"] and holder.pid_namespace in ("", me["pid_namespace"])


def _is_alive(holder: LockRecord) -> bool:
    """Return whether a holder on this host still runs: a process with its pid exists, and started when the record says
    (old records do not say it)."""
    began = _start_of(holder.pid)
    return began is not None and holder.started in ("", began)


def _start_of(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None when it has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def pid_namespace() -> str:
    """Return an identifier of this process's PID namespace; containers of one host have different ones."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
