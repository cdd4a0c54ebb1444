"""benchmarks/learning.py: its sets have no image on both sides, its figures are what they say, and a curve is kept."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def learning() -> Any:
    """The script as a module; the folder of benchmarks is on the path only while it is imported."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("learning")
    finally:
        sys.path[:] = before


def curve(side: str, knn: float, loss: float, seconds: float, seed: int = 0) -> dict[str, Any]:
    row = {"linear": 80.0, "rank": 5.0, "knn_interval": [1.0, 2.0], "linear_interval": [1.0, 2.0], "flops": 1e12}
    start = row | {"step": 0, "images": 0, "knn": 50.0, "seconds": 0.0, "cpu_seconds": 0.0}
    end = row | {"step": 9, "images": 576, "knn": knn, "loss": loss, "seconds": seconds, "cpu_seconds": seconds / 2}
    return {"side": side, "recipe": "tutorial", "seed": seed, "points": [start, end]}


def test_variants_of_a_stamp_are_on_one_side(learning: Any, tmp_path: Path) -> None:
    sets, stamps = learning.learning_sets, tmp_path / "usr" / "stamps"
    for topic, names in {"a/birds": 24, "a/fish": 21, "a/few": 3}.items():
        for i in range(names):
            for variant in ("", "-1"):
                path = stamps / topic / f"{'abcdefghijklmnopqrstuvwxyz'[i]}{variant}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 20, 4), i, np.uint8)).save(path)
    halves = {half: sets.read("stamps", half, tmp_path) for half in ("validation", "test")}
    parts = [halves["test"].train, *(found.held_out for found in halves.values())]
    subjects = [{sets.subject(sample.key) for sample in part} for part in parts]
    assert halves["test"].classes == ["a/birds", "a/fish"]
    assert all(subjects)
    assert not any(subjects[i] & subjects[j] for i, j in ((0, 1), (0, 2), (1, 2)))
    assert [s.key for s in halves["validation"].train] == [s.key for s in parts[0]]


def test_transparent_parts_of_a_stamp_are_white(learning: Any, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((10, 40, 4), np.uint8)).save(tmp_path / "clear.png")
    found = learning.learning_sets.square(tmp_path / "clear.png")
    assert found.shape == (64, 64, 3)
    assert (found == 255).all()


def test_effective_rank_counts_directions(learning: Any) -> None:
    axes = torch.eye(6)[:4]
    assert learning.effective_rank(torch.cat([axes[:1], -axes[:1]])) == pytest.approx(1, abs=1e-4)
    assert learning.effective_rank(torch.cat([axes, -axes])) == pytest.approx(4, abs=1e-4)


def test_table_compares_the_two_sides(learning: Any) -> None:
    curves = [curve("ours", 61.0, 2.0, 10.0), curve("official", 60.5, 2.002, 30.0)]
    found = learning.table(curves)
    assert "| ours tutorial | 576 | 1.0 | 10 | 5 | 61.0 | 1.0 to 2.0 |" in found
    assert "| untrained tutorial | 0 |" in found
    assert "differ by 1.0e-03 at most, k-NN by 0.50 points" in found
    assert "took 3.00 times our time, 3.00 times our processor time" in found


def test_recipe_of_two_views_takes_the_sets_values(learning: Any, tmp_path: Path) -> None:
    config = learning.recipe("simclr_resnet50", "stamps", 3, 7, tmp_path, [])
    assert (config.seed, config.train.steps, config.data.local_crops) == (3, 7, [])
    assert config.data.global_crops.augment.hue == 0.02


@pytest.mark.slow
def test_finished_curve_is_read_again(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "learning.py"), "--set", "digits", "--steps", "2", "--points", "1"]
    command += ["--seeds", "0", "--most", "100", "--out", str(tmp_path), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first, second = (
        json.loads(text[text.index("{") :])
        for text in (
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
            for _ in range(2)
        )
    )
    pixels, ours = first["curves"]
    assert [point["images"] for point in ours["points"]] == [0, 128]
    assert ours == second["curves"][1]  # with its times: it was not run again
    assert all(math.isfinite(point["knn"]) for point in ours["points"] + pixels["points"])
    assert (tmp_path / "digits.png").is_file()
