from pathlib import Path

import pytest

from tests.report import runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return runs.whole_run(tmp_path / "run", runs.photographs(tmp_path / "photographs"))
