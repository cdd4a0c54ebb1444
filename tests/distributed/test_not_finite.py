"""One rank's NaN is every rank's decision."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


@pytest.mark.slow
def test_a_nan_on_one_of_two_ranks_moves_nothing_on_either(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("not_finite_ranks.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, env=tiny.environment(), timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
