"""The Triton kernels of the prototype loss: in Triton's interpreter against float64, and compiled for GPUs that are not there.

Kernels are interpreted in a process of their own, because Triton reads TRITON_INTERPRET when it is imported.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import launcher

pytest.importorskip("triton")

# Errors relative to the largest value: fp32 sums in another order; a gradient in bf16 is rounded (2⁻⁸), or cut as the
# interpreter does it; logits of 3·10³ have errors of 10⁻⁷ of themselves, which is what probabilities are off by.
WIDE, ROUNDED, SHARP = 5e-6, 1e-2, 3e-3


@pytest.mark.slow
def test_interpreted_kernels_match_float64():
    command = [sys.executable, "-m", "tests.objective.interpreted_prototypes"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=launcher.REPOSITORY)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for case, errors in json.loads(ran.stdout).items():
        narrow = case.endswith("float16")  # and bfloat16
        for part, error in enumerate(errors):
            gradient = part in (1, 2)
            allowed = SHARP if case == "sharp" else ROUNDED if narrow and gradient else WIDE
            assert error < allowed, (case, errors)


@pytest.fixture
def benchmark(monkeypatch):
    if find_spec("triton.backends.nvidia") is None:
        pytest.skip("this triton has no NVIDIA backend")
    monkeypatch.syspath_prepend(launcher.REPOSITORY / "benchmarks")
    monkeypatch.setenv("ESVIT_PRODUCTS", "bf16")
    return importlib.import_module("loss_kernels")


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("launch", range(4))
def test_kernels_compile_without_spills(benchmark, launch, target):
    if not Path(importlib.import_module("attention_kernels").ptxas(90)).is_file():
        pytest.skip("the assembler that Triton ships is not there")
    needs = benchmark.needs(list(benchmark.VARIANTS)[launch], target)
    assert needs.spilled == 0, needs
    assert needs.registers <= 255
    assert needs.shared <= {80: 163, 90: 227}[target] * 1024


def test_kernels_move_a_third_of_the_bytes_of_the_tiles_at_most(benchmark):
    for target in (80, 90):
        student, teacher = benchmark.by_kernels(10880, 6272, target)
        assert student.logits == teacher.logits == 0
        assert student.operands < 74 / 3
        assert teacher.operands < 94 / 3


@pytest.mark.parametrize(("n", "k"), [(1, 5), (640, 65536), (10880, 65536), (10**6, 4096), (70, 130)])
@pytest.mark.parametrize("processors", [1, 108, 132])
def test_splits_cover_all_columns_and_none_is_empty(n, k, processors):
    triton_passes = importlib.import_module("esvit_scale.objective.prototype_triton")
    parts, columns = triton_passes.splits(n, k, triton_passes.OF_HOPPER, processors)
    assert (parts - 1) * columns < k <= parts * columns
    assert columns % triton_passes.OF_HOPPER.columns == 0
