"""Nodes that refuse loader processes something say so in one line, with the remedy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esvit_scale.data import limits
from esvit_scale.errors import RestartCanHelp
from tests import launcher, tiny


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)"), "open files"),
        (RuntimeError("received 0 items of ancdata"), "open files"),
        (OSError(24, "Too many open files"), "open files"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"), "/dev/shm"),
        (RuntimeError("unable to mmap 589 bytes from file </torch_1>: Cannot allocate memory (12)"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that …"), "/dev/shm"),
    ],
)  # fmt: skip
def test_a_limit_is_named_with_its_remedy(error: Exception, said: str) -> None:
    with pytest.raises(RestartCanHelp, match=said) as caught, limits.translate_limits():
        raise error
    assert "data.workers" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_translated() -> None:
    with pytest.raises(OSError, match="No space left"), limits.translate_limits():
        raise OSError(28, "No space left on device")


def in_a_shell(script: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run with mounts of its own."""
    if os.getuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a small /dev/shm needs a mount namespace, and that needs root")
    command = ["unshare", "--mount", "bash", "-c", script, "bash", sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=launcher.environment(), timeout=100, cwd=launcher.REPOSITORY
    )


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("ulimit -n 50", "open files: this process may open 50, and data.workers=2 needs about 56"),
        ("mount -t tmpfs -o size=64k none /dev/shm", "/dev/shm is full (0 of 0 MiB are free)"),
    ],
)
def test_limits_of_node_are_checked_before_workers_start(limit: str, said: str) -> None:
    """With too few open files loader processes may hang instead of failing."""
    check = "from esvit_scale.data import limits; limits.check_node(0); limits.check_node(2)"
    done = in_a_shell(f'{limit}; "$1" -c "{check}"')
    assert f"RestartCanHelp: {said}" in done.stderr


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_whose_shared_memory_is_full_ends_with_one_line(tmp_path: Path) -> None:
    shards = tiny.shards(tmp_path / "shards")
    config = tiny.config(tmp_path / "run", shards, data__workers=2, data__global_crops__size=128)
    path = tiny.write_config(tmp_path / "c.yaml", config)
    script = 'mount -t tmpfs -o size=1100k none /dev/shm; "$1" -m esvit_scale pretrain "$2"'
    done = in_a_shell(script, str(path))
    assert done.returncode == 75, done.stderr[-2000:]
    assert re.search(
        r"error: rank 0: /dev/shm is full \(\d of 1 MiB are free\): .* data.workers lower, or to 0$", done.stderr, re.M
    )
    assert "Traceback" not in done.stderr
