"""A small disk of its own, to be filled to the last byte: a tmpfs in a mount namespace."""

import subprocess
from pathlib import Path

import pytest


class Disk:
    """A tmpfs of `megabytes`, empty at first, which is visible outside its namespace through /proc."""

    def __init__(self, point: Path, megabytes: int = 16) -> None:
        point.mkdir()
        script = f'mount -t tmpfs -o size={megabytes}m none "$1" && echo ready && exec cat'
        command = ["unshare", "-m", "sh", "-c", script, "sh", str(point)]
        # Its standard input closes, and it ends, when the test process ends.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._holder = subprocess.Popen(command, text=True, **pipes)
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            pytest.skip("no mount namespaces here (needs root)")
        self.root = Path(f"/proc/{self._holder.pid}/root{point}")
        self._inside = point

    def fill(self) -> None:
        """Write a file until not even a block is left."""
        with (self.root / "filler").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    def free(self) -> None:
        """Remove what `fill` wrote."""
        (self.root / "filler").unlink()

    def mount_read_only(self, path: Path) -> None:
        """Let nobody write or remove anything below `path`."""
        inside = str(self._inside / path.relative_to(self.root))
        enter = ["nsenter", "-t", str(self._holder.pid), "-m", "mount"]
        subprocess.run([*enter, "--bind", inside, inside], check=True)
        subprocess.run([*enter, "-o", "remount,ro,bind", inside], check=True)

    def close(self) -> None:
        """Give up the disk and what is on it."""
        self._holder.kill()
        self._holder.communicate()
