"""5 billion samples in 500,000 shards, read by 4,096 ranks with 8 loader processes each: the start, and the coverage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "order.py"


@pytest.mark.slow
def test_five_billion_samples() -> None:
    """A hundredth of the windows and slots of one epoch; the benchmark without --every looks at all."""
    options = ["--epochs", "3", "--every", "100", "--json"]
    done = subprocess.run([sys.executable, BENCHMARK, *options], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    assert result["start_s"] < 5
    assert result["start_mb"] < 100
    assert "32768 of 4096 ranks x 8 workers" in result["processes"]
    assert "each comes once" in result["epoch 3"]
