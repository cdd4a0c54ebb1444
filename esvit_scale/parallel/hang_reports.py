"""What the ranks tell each other when one of them hangs: which collective each waits in, and who does not answer.

The process groups cannot carry this, because they are what hangs. Each rank therefore has a connection of its own to
the store of MASTER_ADDR:MASTER_PORT, through which the ranks met. Every call here may block for as long as that store's
host is stopped: call them on threads that nobody waits for without a limit.
"""

import itertools
import json
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

ANSWER = timedelta(seconds=10)
COLLECTORS = 4  # the lowest ranks read all reports, and the first that report: rank 0 may be the one that is gone
_meetings = (
    itertools.count()
)  # a process may train several times; keys of the last training must not answer for this one


class HangReports:
    """A board that all ranks can read and write; all ranks make theirs in the same order."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._prefix = f"esvit-hang-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_meetings)}"
        self._board: Any = None

    @property
    def is_joined(self) -> bool:
        return self._board is not None

    def join(self) -> None:
        """Connect, and say on which node this rank is."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, None, False, timeout=ANSWER, wait_for_workers=False)
        self._board = dist.PrefixStore(self._prefix, store)
        self._connected().set(f"node/{self._rank}", socket.gethostname())

    def _connected(self) -> Any:
        if self._board is None:
            raise RuntimeError("the store was not reached")
        return self._board

    def raise_alarm(self) -> None:
        """Ask every rank for its report."""
        self._connected().set("alarm", "1")

    def alarm_is_raised(self) -> bool:
        return bool(self._connected().check(["alarm"]))

    def give(self, report: dict[str, Any]) -> bool:
        """Publish this rank's report: plain data, small. Return whether this rank is one of the few that `collect`: if all
        did, the one thread that answers them would be asked a million times by a thousand ranks."""
        number = self._connected().add("reports", 1)
        self._connected().set(f"report/{number}", json.dumps([self._rank, report]))
        return self._collects(self._rank, number)

    def _collects(self, rank: int, number: int) -> bool:
        return rank < COLLECTORS or number <= COLLECTORS

    def collect(self, seconds: float) -> tuple[dict[int, dict[str, Any]], dict[int, str], int]:
        """Wait until all ranks have reported, but at most `seconds`.

        Returns:
            rank → report; rank → node of those that did not report (`an unknown node` for a rank that was not there at
            the start); and the lowest rank that collects, which is to write.
        """
        found: dict[int, dict[str, Any]] = {}
        writer, read, store = self._size, 0, self._connected()
        end = time.monotonic() + seconds
        while len(found) < self._size and time.monotonic() < end:
            given = store.add("reports", 0)
            while read < given and store.check([f"report/{read + 1}"]):
                read += 1
                rank, found_report = json.loads(store.get(f"report/{read}"))
                found[rank] = found_report
                if self._collects(rank, read):
                    writer = min(writer, rank)
            if len(found) < self._size:
                time.sleep(0.1)
        return found, {rank: self._node(rank) for rank in range(self._size) if rank not in found}, writer

    def close_after_writing(self, others: int, seconds: float) -> None:
        """Say that the summary is printed, and wait until `others` ranks know it, at most `seconds`. The first process to
        exit makes the launcher kill the rest, and with rank 0 its store is gone."""
        store, end = self._connected(), time.monotonic() + seconds
        store.set("written", "1")
        while store.add("seen", 0) < others and time.monotonic() < end:
            time.sleep(0.1)

    def close(self, seconds: float) -> None:
        """Wait until the writer has printed the summary, at most `seconds`, and tell it that this rank knows."""
        store, end = self._connected(), time.monotonic() + seconds
        while not store.check(["written"]) and time.monotonic() < end:
            time.sleep(0.5)  # a thousand ranks ask
        store.add("seen", 1)

    def _node(self, rank: int) -> str:
        key = f"node/{rank}"
        return self._connected().get(key).decode() if self._connected().check([key]) else "an unknown node"


def pending_collective() -> str | None:
    """The oldest collective that this process has begun and not finished, as torch's flight recorder has it
    (`all_gather no. 17`); None when there is none, or when this torch does not record the backend."""
    dump = getattr(_distributed_c10d, f"_dump_{_recorder()}_trace_json", None)
    with suppress(Exception):  # a report without it is better than none
        for entry in json.loads(dump())["entries"] if dump else []:
            if not entry["retired"] and entry["state"] != "completed":
                return f"{entry['profiling_name'].rpartition(':')[2]} no. {entry['collective_seq_id']}"
    return None


def dump_collectives(path: Path) -> None:
    """Write the flight recorder's last collectives, as `torchfrtrace` reads them; nothing where torch has none."""
    dump = getattr(_distributed_c10d, f"_dump_{_recorder()}_trace", None)
    if dump is not None:
        path.write_bytes(dump())


def _recorder() -> str:
    """NCCL has a recorder of its own; the other backends share one, which older torch lacks."""
    return "nccl" if dist.get_backend() == "nccl" else "fr"
