"""Compilation of the Triton kernels of window attention for GPUs that are not there, and what they count."""

import importlib.util
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import launcher

triton = pytest.importorskip("triton")
if find_spec("triton.backends.nvidia") is None:
    pytest.skip("this triton has no NVIDIA backend", allow_module_level=True)


@pytest.fixture(scope="module")
def benchmark():
    path = launcher.REPOSITORY / "benchmarks" / "attention_kernels.py"
    spec = importlib.util.spec_from_file_location("attention_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not Path(module.ptxas(90)).is_file():
        pytest.skip(f"{module.ptxas(90)} is not there: Triton ships it")
    return module


def check(benchmark, window, depth, dtype, target):
    for kernel in benchmark.kernels_of(window):
        needs = benchmark.needs(kernel, window, depth, dtype, target)
        assert needs.spilled == 0, (kernel, needs)
        assert needs.registers <= 255
        assert needs.shared <= 163 * 1024  # of an A100's program


@pytest.mark.parametrize("target", [80, 90])
def test_kernels_of_swin_compile_without_spills(benchmark, target):
    check(benchmark, 7, 32, "bf16", target)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [32, 64])
@pytest.mark.parametrize("window", [7, 12, 14])
def test_all_kernels_compile_without_spills(benchmark, window, depth):
    for target in (80, 90):
        check(benchmark, window, depth, "bf16", target)


def test_kernels_move_a_quarter_of_the_bytes_of_the_written_out_version_at_most(benchmark):
    written_out, _ = benchmark.written_out(7, 32)
    moved, flops = benchmark.by_kernels(7, 32)
    assert moved == 2 * 11 * 49 * 32
    assert flops == 7 * 2 * 64 * 64 * 32
    assert written_out > 4 * moved


def test_published_table_is_of_this_code(benchmark):
    """The kernels' rows about bytes and FLOPs in the documentation are what the script prints."""
    page = Path(launcher.REPOSITORY / "docs" / "window_attention.md").read_text()
    for row in benchmark.traffic_rows(benchmark.WINDOWS):
        assert row in page or "Triton" not in row
