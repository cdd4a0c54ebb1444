"""The study of studies/fashion: its sweep files still plan without a refused cell, and its results follow from its CSVs."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.scaling import cells, sweep_file

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "studies" / "fashion"


def script(name, monkeypatch):
    """Import a script of the study, without leaving its folder on the path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(f"study_{name}", STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Return a function that plans a sweep file of the study, on sets that have its numbers of images and no tars."""
    for name, images in (("train", 60_000), ("bank", 5_000), ("test", 10_000)):
        folder = tmp_path / "runs" / "fashion" / "shards" / name
        folder.mkdir(parents=True)
        shards = [manifests.Shard(f"{i:06d}.tar", 500, 1, "0" * 64) for i in range(images // 500)]
        (folder / manifests.MANIFEST).write_bytes(manifests.dump(shards, ["a"], name, "test"))
    (tmp_path / "studies").symlink_to(STUDY.parent)
    monkeypatch.chdir(tmp_path)

    def plan(name):
        path = Path("studies/fashion") / f"{name}.yaml"
        return cells.cells(sweep_file.read(path), str(path), None)

    return plan


def test_sweep_files_plan_without_a_refused_cell(planned, monkeypatch):
    analyse = script("analyse", monkeypatch)
    grid = planned("sweep")
    everything = {name: planned(name) for name in ("held_out", "seeds", "reuse", "view")} | {"sweep": grid}
    assert not [cell.problems for found in everything.values() for cell in found if cell.problems]
    (held_out,) = everything["held_out"]
    assert (held_out.plan.numbers["trunk_params"], held_out.images_seen) == analyse.HELD_OUT
    assert held_out.plan.numbers["trunk_params"] == max(cell.plan.numbers["trunk_params"] for cell in grid)
    assert held_out.budget == max(cell.budget for cell in grid)
    assert all((cell.shape, cell.budget) != (held_out.shape, held_out.budget) for cell in grid)
    assert max(cell.budget for cell in grid) >= 30 * min(cell.budget for cell in grid)
    points = {(cell.shape, cell.budget) for cell in grid}  # the other sweeps vary one thing in a cell of the grid
    assert all((cell.shape, cell.budget) in points for name in ("seeds", "reuse", "view") for cell in everything[name])


@pytest.mark.parametrize("short", ["linear", "knn"])
def test_committed_rows_reproduce_the_committed_fit(tmp_path, monkeypatch, short):
    analyse = script("analyse", monkeypatch)
    committed = json.loads((STUDY / "results" / short / "fit.json").read_text())
    again = analyse.law(analyse.MEASURES[short], tmp_path)
    assert again["form"] == committed["form"]
    for name, value in committed["params"].items():
        assert again["params"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    (before,), (now,) = committed["predicted_runs"], again["predicted_runs"]
    assert now["y"] == pytest.approx(before["y"], rel=1e-3)
    np.testing.assert_allclose(now["measured_ci95"], before["measured_ci95"], rtol=0.02)  # resamples: another BLAS


def test_page_has_the_tables_of_the_rows(monkeypatch):
    analyse = script("analyse", monkeypatch)
    page = (STUDY / "README.md").read_text()
    assert page.split(analyse.BEGIN)[1].split(analyse.END)[0] == analyse.tables(analyse.rows_of("runs"))


def test_recipe_refuses_other_files(tmp_path, monkeypatch):
    shards = script("study_shards", monkeypatch)
    with pytest.raises(SystemExit, match=r"holds no train-images-idx3-ubyte\.gz"):
        shards.check(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz: sha256 .* expected c59f468a"):
        shards.check(tmp_path)
