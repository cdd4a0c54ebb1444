"""The allocator's settings, each in a process of its own, because they cannot be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esvit_scale.parallel import allocator

SCRIPT = """
import resource, sys
from esvit_scale.parallel import allocator
print(allocator.keep_freed_memory())
size = int(sys.argv[2]) << 20
bytearray(size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(int(sys.argv[1])):  # each block can be the first one again
    bytearray(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


def run(blocks: int = 1, megabytes: int = 200, **variables: str) -> tuple[bool, int]:
    """Return whether the allocator was set, and the page faults of blocks of this size, after one that was freed."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "TCMALLOC_", "ESVIT_", "LD_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(blocks), str(megabytes)],
        env=kept | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answer, faults = done.stdout.split()
    return answer == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("megabytes", [200, 1200])  # 1,200: all gradients of 300 M parameters, which DeepSpeed joins
def test_freed_memory_is_used_again(megabytes: int) -> None:
    is_set, faults = run(megabytes=megabytes)
    assert is_set
    assert faults < 100


@pytest.mark.parametrize(
    "variables",
    [{"ESVIT_MALLOC": "system"}, {"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}],
    ids=["ESVIT_MALLOC", "MALLOC_", "GLIBC_TUNABLES"],
)
def test_allocator_is_left_alone_when_the_environment_says_so(variables):
    is_set, _ = run(**variables)
    assert not is_set


@pytest.mark.skipif(not TCMALLOC.exists(), reason="needs libtcmalloc-minimal4")
@pytest.mark.parametrize("variables", [{}, {"ESVIT_MALLOC": "system"}, {"TCMALLOC_RELEASE_RATE": "1"}], ids=str)
def test_tcmalloc_keeps_freed_memory_unless_the_environment_says_otherwise(variables):
    is_set, faults = run(20, LD_PRELOAD=str(TCMALLOC), **variables)  # it returns a block after 2 GB were freed
    assert is_set is not bool(variables)
    assert (faults < 100) is is_set


@pytest.mark.parametrize(
    ("largest", "mapped_from", "is_set"),
    [(2**64, -1, True), (2**25, 2**25, True), (2**20, 2**17, False)],
    ids=["glibc 2.35", "older", "none is accepted"],
)
def test_threshold_is_the_highest_that_glibc_accepts(largest: int, mapped_from: int, is_set: bool) -> None:
    """glibc before 2.35 refuses thresholds above 32 MiB; with only the trim threshold set, 128 KiB would stay for good."""
    thresholds = {-3: 2**17, -1: 2**17}  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD as they are in a new process

    def mallopt(parameter: int, value: int) -> int:
        if parameter == -3 and value % 2**64 > largest:  # glibc takes it for a size_t
            return 0
        thresholds[parameter] = value
        return 1

    assert allocator.set_thresholds(mallopt) is is_set
    assert thresholds == {-3: mapped_from, -1: -1, -8: 1} if is_set else {-3: mapped_from, -1: 2**17}
