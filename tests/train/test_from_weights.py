"""benchmarks/from_weights.py: a plain continuation destroys features of the demo's size, and the recipe does not."""

import json
import subprocess
import sys

import pytest

from tests import launcher


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_plain_continuation_destroys_features_and_the_recipe_does_not() -> None:
    command = [sys.executable, "benchmarks/from_weights.py", "--rows", "plain", "recipe", "--steps", "100", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=launcher.REPOSITORY)
    plain, recipe = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert plain["start"] == recipe["start"] > 0.45
    assert plain["lowest"] < 0.9 * plain["start"]
    assert plain["most_below"] >= 3  # the guard would have ended this run
    assert recipe["lowest"] > 0.95 * recipe["start"]
    assert recipe["most_below"] == 0
