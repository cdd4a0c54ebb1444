"""One rank's NaN is every rank's decision."""

from pathlib import Path

import pytest

from tests import launcher


@pytest.mark.slow
def test_nan_on_one_rank_skips_the_step_on_all_ranks(tmp_path: Path) -> None:
    launcher.run(Path(__file__).with_name("not_finite_ranks.py"), tmp_path, ranks=2, timeout=250)
