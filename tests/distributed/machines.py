"""Machines for the ranks of one job, all on this computer, and what can go wrong with them.

Each machine has a network namespace with its own address and host name on a bridge, and a wall clock that can be set
(for its ranks, through a preloaded library). All of them share one small disk. A rank ends with the test process,
however that ends.
"""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.full_disk import Disk
from tests.nursery import Nursery, Process

NETWORK = "10.79.0"
TOOLS = ("unshare", "nsenter", "ip", "setpriv", "gcc")
SWITCH = "ip link set lo up && ip link add bridge type bridge && ip link set bridge up && echo ready && exec cat"
MACHINE = """\
hostname machine$1 && ip link set lo up && echo ready && read line
ip addr add {network}.$1/24 dev eth0 && ip link set eth0 up && echo ready && exec cat
"""


def why_not() -> str | None:
    """Return why there can be no such machines here, in words; None when there can."""
    if os.getuid() != 0:
        return "a network for each machine needs root"
    missing = [name for name in TOOLS if not shutil.which(name)]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Machines:
    """`with machines(folder, count) as hosts`: machines 1 to `count`, connected, with right clocks and an empty disk."""

    def __init__(self, folder: Path, count: int, switch: "subprocess.Popen[str]", disk: Disk) -> None:
        self.disk, self._switch, self._folder, self._port = disk, switch, folder, 20000
        self._clock = folder / "jumping_clock.so"
        source = Path(__file__).with_name("jumping_clock.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(self._clock), str(source), "-ldl"], check=True)
        self._holders = [self._add(number) for number in range(1, count + 1)]
        self._nurseries = [self._nursery(number) for number in range(1, count + 1)]

    def _add(self, number: int) -> "subprocess.Popen[str]":
        script = MACHINE.format(network=NETWORK)
        holder = _hold(["unshare", "--net", "--uts", "sh", "-c", script, "sh", str(number)])
        peer = ["peer", "name", "eth0", "netns", str(holder.pid)]
        self._on_switch("ip", "link", "add", f"to{number}", "master", "bridge", "type", "veth", *peer)
        self.plug(number)
        assert holder.stdin is not None
        print(file=holder.stdin, flush=True)
        _wait_ready(holder)
        self._offset(number).write_bytes(struct.pack("d", 0.0))
        return holder

    def _nursery(self, number: int) -> Nursery:
        inside = ("nsenter", f"--target={self._holders[number - 1].pid}", "--net", "--uts")
        clock = {"LD_PRELOAD": str(self._clock), "CLOCK_OFFSET": str(self._offset(number))}
        return Nursery(inside, **clock, GLOO_SOCKET_IFNAME="eth0")

    def start(self, size: int, *program: object) -> list[Process]:
        """Start `python PROGRAM…` on `size` ranks, equally many a machine, as srun does: nobody ends the others when
        one ends."""
        self._port += 1
        group = {"MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": str(self._port), "WORLD_SIZE": str(size)}
        each = size // len(self._nurseries)
        places = [divmod(rank, each) for rank in range(size)]
        return [
            self._nurseries[machine].start(*program, **group, RANK=str(rank), LOCAL_RANK=str(local))
            for rank, (machine, local) in enumerate(places)
        ]

    def unplug(self, number: int) -> None:
        """Take a machine's network away: nobody is told, and what is sent to it or from it is lost."""
        self._on_switch("ip", "link", "set", f"to{number}", "down")

    def plug(self, number: int) -> None:
        """Give a machine its network back."""
        self._on_switch("ip", "link", "set", f"to{number}", "up")

    def set_clock(self, number: int, offset_s: float) -> None:
        """Set a machine's wall clock to `offset_s` seconds from the real time, for ranks that run already, too."""
        with self._offset(number).open("r+b", buffering=0) as file:
            file.write(struct.pack("d", offset_s))

    def _offset(self, number: int) -> Path:
        return self._folder / f"clock-{number}"

    def _on_switch(self, *command: str) -> None:
        subprocess.run(["nsenter", f"--target={self._switch.pid}", "--net", *command], check=True)

    def close(self) -> None:
        """End the machines and all that still runs on them."""
        for nursery in self._nurseries:
            nursery.close()
        for holder in (*self._holders, self._switch):
            holder.kill()
            holder.wait()


@contextmanager
def machines(folder: Path, count: int, disk_mb: int) -> Iterator[Machines]:
    """Give `count` machines, whose files are in `folder`, with an empty disk of `disk_mb` MB."""
    folder.mkdir()
    disk = Disk(folder / "disk", disk_mb)
    switch = _hold(["unshare", "--net", "sh", "-c", SWITCH])
    made = Machines(folder, count, switch, disk)
    try:
        yield made
    finally:
        made.close()
        disk.close()


def _hold(command: list[str]) -> "subprocess.Popen[str]":
    """Start a process that holds a namespace until its standard input closes, and wait until it is set up."""
    alive = ["setpriv", "--pdeathsig", "KILL"]
    holder = subprocess.Popen([*alive, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _wait_ready(holder)
    return holder


def _wait_ready(holder: "subprocess.Popen[str]") -> None:
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
