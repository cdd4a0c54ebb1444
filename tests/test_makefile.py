"""`make test-slow`, with a command in place of Python that answers as pytest does."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import launcher


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(
    ("together", "alone", "fails"),
    [(0, 0, False), (5, 0, False), (0, 5, False), (5, 5, True), (1, 0, True), (0, 1, True)],
)
def test_slow_tests_fail_when_one_fails_or_none_ran(together: int, alone: int, fails: bool, tmp_path: Path) -> None:
    """pytest's exit status is 5 if none of the chosen tests is of the kind that was asked for."""
    answer = tmp_path / "answer.sh"
    answer.write_text(f'case "$*" in *"slow and alone"*) exit {alone} ;; esac\nexit {together}\n')
    command = ["make", "--old-file=venv", f"RUN=sh {answer}", "test-slow"]
    ran = subprocess.run(command, cwd=launcher.REPOSITORY, capture_output=True)
    assert (ran.returncode != 0) is fails
