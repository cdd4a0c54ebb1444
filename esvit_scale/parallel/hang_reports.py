"""Reports that ranks exchange when one of them hangs: in which collective each waits, and which ranks do not answer.

The process groups hang as well, so reports go through torch's store at MASTER_ADDR:MASTER_PORT, to which each rank
opens a separate connection. If the store's host is stopped, every call here blocks: call them in a thread, and `join`
it with a time limit.
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

STORE_TIMEOUT = timedelta(seconds=10)
COLLECTORS = 4  # this many of the lowest ranks, and of the first that report, read all reports: rank 0 may be gone
_boards = itertools.count()  # for keys in the store that differ between the trainings of one process


class HangReports:
    """One rank's access to the reports in the store (the "board"), which all ranks read and write.

    All ranks must create their objects in the same order, because the store's keys are numbered.
    """

    def __init__(self, rank: int, size: int) -> None:
        """Prepare the access of one of `size` ranks; `join` connects it to the store."""
        self._rank, self._size = rank, size
        self._prefix = f"esvit-hang-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_boards)}"
        self._board: Any = None

    @property
    def is_joined(self) -> bool:
        """Whether `join` has connected this rank to the store."""
        return self._board is not None

    def join(self) -> None:
        """Connect to the store, and write on which node this rank runs."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, None, False, timeout=STORE_TIMEOUT, wait_for_workers=False)
        self._board = dist.PrefixStore(self._prefix, store)
        self._connected().set(f"node/{self._rank}", socket.gethostname())

    def _connected(self) -> Any:
        if self._board is None:
            raise RuntimeError("not connected to the store of MASTER_ADDR:MASTER_PORT: `join` has not succeeded")
        return self._board

    def raise_alarm(self) -> None:
        """Ask all ranks for their reports."""
        self._connected().set("alarm", "1")

    def alarm_is_raised(self) -> bool:
        """Return whether some rank has called `raise_alarm`."""
        return bool(self._connected().check(["alarm"]))

    def give(self, report: dict[str, Any]) -> bool:
        """Write this rank's report (small plain data) into the store.

        Returns:
            Whether this rank is to call `collect`. Only a few ranks do, because a thousand ranks that read a thousand
            reports each would overload the store.
        """
        number = self._connected().add("reports", 1)
        self._connected().set(f"report/{number}", json.dumps([self._rank, report]))
        return self._collects(self._rank, number)

    def _collects(self, rank: int, number: int) -> bool:
        return rank < COLLECTORS or number <= COLLECTORS

    def collect(self, seconds: float) -> tuple[dict[int, dict[str, Any]], dict[int, str], int]:
        """Wait until all ranks have reported, but at most `seconds`.

        Returns:
            The reports by rank; the nodes of the ranks that did not report, by rank (`an unknown node` if the rank
            never joined); and the lowest rank that collects, which is to print the summary.
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
        """Announce that this rank has printed the summary, and wait, at most `seconds`, until `others` ranks have seen
        this. When one process exits, the launcher kills the rest, and the store ends with rank 0."""
        store, end = self._connected(), time.monotonic() + seconds
        store.set("written", "1")
        while store.add("seen", 0) < others and time.monotonic() < end:
            time.sleep(0.1)

    def close(self, seconds: float) -> None:
        """Wait, at most `seconds`, until another rank has printed the summary, and confirm that this rank knows it."""
        store, end = self._connected(), time.monotonic() + seconds
        while not store.check(["written"]) and time.monotonic() < end:
            time.sleep(0.5)  # a thousand ranks may ask
        store.add("seen", 1)

    def _node(self, rank: int) -> str:
        key = f"node/{rank}"
        return self._connected().get(key).decode() if self._connected().check([key]) else "an unknown node"


def pending_collective() -> str | None:
    """Return the oldest collective that this process has begun and not finished, such as `all_gather no. 17`.

    It comes from torch's flight recorder; None if there is none, or if this torch does not record the backend.
    """
    dump = getattr(_distributed_c10d, f"_dump_{_recorder()}_trace_json", None)
    with suppress(Exception):  # a report without it is better than no report
        for entry in json.loads(dump())["entries"] if dump else []:
            if not entry["retired"] and entry["state"] != "completed":
                return f"{entry['profiling_name'].rpartition(':')[2]} no. {entry['collective_seq_id']}"
    return None


def dump_collectives(path: Path) -> None:
    """Write the flight recorder's last collectives to a file for `torchfrtrace`, if this torch has a recorder."""
    dump = getattr(_distributed_c10d, f"_dump_{_recorder()}_trace", None)
    if dump is not None:
        path.write_bytes(dump())


def _recorder() -> str:
    """Return the name of the backend's flight recorder in torch: NCCL has its own; others share one, in new torch."""
    return "nccl" if dist.get_backend() == "nccl" else "fr"
