"""The power analysis of a sweep against simulated sweeps."""

import numpy as np
import pytest
import yaml

from esvit_scale import cli
from esvit_scale.errors import UserError
from esvit_scale.scaling import power


@pytest.mark.parametrize(("budgets", "seeds"), [(3, 1), (6, 2)])
def test_interval_is_that_of_simulated_sweeps(budgets: int, seeds: int) -> None:
    """4,000 sweeps with binomial errors and seeds that differ; 5 %: four times the relative error of a deviation of so many."""
    rng = np.random.default_rng(budgets)
    flops, errors, images, spread = np.geomspace(1e15, 3e16, budgets), (25.0, 18.0), 10_000, 0.4
    found = power.power(flops.tolist(), errors, images, seeds, spread)
    expected = 25.0 * (flops / 1e15) ** -found.exponent
    assert expected[-1] == pytest.approx(18.0)
    measured = 100 * rng.binomial(images, expected / 100, (4000, budgets)) / images
    measured += rng.normal(0, spread, (4000, seeds, budgets)).mean(1)
    slopes = -np.polyfit(np.log(flops), np.log(measured).T, 1)[0]
    assert 1.96 * slopes.std() == pytest.approx(found.half_width, rel=0.05)
    assert measured.std(0)[[0, -1]] == pytest.approx(found.standard_errors, rel=0.05)


def test_command_says_what_a_sweep_can_tell(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "swin_t", "sizes": [{"params": 1e7}], "budgets": [1e15, 3e15, 3e16]}))
    assert cli.main(["sweep", "power", str(path), "--error", "32", "18", "--test-images", "10000"]) == 0
    out = capsys.readouterr().out
    assert "standard errors apart" in out
    assert "from 3 budgets" in out
    assert "warning" not in out
    assert cli.main(["sweep", "power", str(path), "--error", "25", "24", "--test-images", "1000"]) == 0
    assert "too little slope for a law" in capsys.readouterr().out
    assert cli.main(["sweep", "power", str(path), "--error", "18", "25", "--test-images", "1000"]) == 2
    assert "the larger one (cheapest budget) first" in capsys.readouterr().err
    assert cli.main(["sweep", "power", str(path), "--error", "25", "18"]) == 2
    assert "--test-images N" in capsys.readouterr().err
    with pytest.raises(UserError, match="at least two different budgets"):
        power.power([1e15, 1e15], (25, 18), 1000, 1, 0.3)
