"""benchmarks/gpu.py runs through on a CPU with tiny networks, and keeps what it has when a part fails or takes too long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def run(out: Path, *options: str) -> dict[str, list[dict[str, object]]]:
    """The rows that the script writes, by part."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--name", "test", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "gpu-test.json").read_text())
    assert found["machine"]["device"] == "cpu"
    assert "| batch | images/s | MFU | peak GB |" in done.stdout
    rows: dict[str, list[dict[str, object]]] = {}
    for row in found["rows"]:
        rows.setdefault(str(row["part"]), []).append(row)
    return rows


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    rows = run(tmp_path, "--parts", "checks", "swin_t", "attention")
    assert not [row for of_part in rows.values() for row in of_part if row.get("what") in ("failed", "stopped")]
    errors = [float(str(row["error"])) for row in rows["checks"] if "error" in row]
    # fp32's rounding; bf16's, of probabilities and gradients (2⁻⁸ each); the same pixels on the same device.
    assert [error < bound for error, bound in zip(errors, (1e-4, 3e-2, 1e-6), strict=True)] == [True] * 3, errors
    assert [row["batch"] for row in rows["swin_t"]] == [2, 4]
    assert all(float(str(row["images_per_s"])) > 0 for row in rows["swin_t"])
    timed = {str(row["what"]).removeprefix("model.attention=") for row in rows["attention"] if "images_per_s" in row}
    assert timed == {"math", "sdpa"}  # flex and triton need a GPU
    notes = {row["what"]: row.get("note") for row in rows["checks"]}
    for name in timed:
        assert notes[f"window attention by {name}, bfloat16"] == "as accurate as it must be"
    assert notes["prototype loss by tiles, bfloat16"] == "as accurate as it must be"
    assert notes["a step in autocast with model.attention=math"] == "runs"


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_and_named(tmp_path: Path) -> None:
    rows = run(tmp_path, "--parts", "swin_t", "--minutes", "0.02")
    assert [row["what"] for row in rows["swin_t"]] == ["stopped"]
