"""The allocator's settings, each in a process of its own, because they cannot be taken back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
from esvit_scale.parallel import allocator
print(allocator.keep_freed_memory())
for _ in range(2):  # the second block can be the first one again
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(200 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


def run(**variables: str) -> tuple[bool, int]:
    """Return whether the allocator was set, and the page faults of a block of 200 MB that was freed before."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "ESVIT_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=kept | variables, stdout=subprocess.PIPE, text=True, check=True
    )
    answer, faults = done.stdout.split()
    return answer == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again():
    is_set, faults = run()
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
def test_another_allocator_is_left_alone():
    is_set, _ = run(LD_PRELOAD=str(TCMALLOC))
    assert not is_set
