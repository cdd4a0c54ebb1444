"""What the report says about k-NN during training: beside the untrained trunk and raw pixels, and that nothing was gained."""

import json
from pathlib import Path

from esvit_scale.report import run_files
from esvit_scale.report.baselines import learning, marks
from esvit_scale.report.html import write_report
from tests.report import runs


def run_with_knn(folder: Path, *accuracies: float, pixels: float | None) -> Path:
    """Write a run that measured these accuracies, of which the first is that of the untrained trunk."""
    folder.mkdir()
    rows = [
        {"step": 10 * i, "images_seen": 640 * i, "knn_top1": accuracy} | ({"loss": 5.0} if i else {})
        for i, accuracy in enumerate(accuracies)
    ]
    if pixels is not None:
        rows[0]["knn_top1_pixels"] = pixels
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(
        json.dumps({"verdict": ["k-NN …", "nothing was gained", "reasons:", "- too few steps", "- lr"]})
    )
    return folder


def test_table_has_baselines_best_and_last(tmp_path: Path) -> None:
    run = run_files.read(run_with_knn(tmp_path / "run", 0.4, 0.6, 0.5, pixels=0.3))
    table = learning([("", run)])
    assert table is not None
    assert [(row.name, row.cells[0].text, row.cells[0].best) for row in table.rows] == [
        ("raw pixels", "30.0 %", False),
        ("untrained", "40.0 %", False),
        ("trained, step 10", "60.0 %", True),
        ("trained, step 20", "50.0 %", False),
    ]
    assert table.note.endswith("Nothing was gained. Reasons: (1) too few steps; (2) lr.")
    assert marks([run]) == (("untrained", 0.4), ("raw pixels", 0.3))
    assert marks([run, run]) == ()


def test_runs_without_measurements_have_no_table(tmp_path: Path) -> None:
    photographs = runs.photographs(tmp_path / "photographs")
    assert learning([("", run_files.read(runs.whole_run(tmp_path / "run", photographs)))]) is None


def test_page_shows_the_table_and_the_curve(tmp_path: Path) -> None:
    page = write_report(run_with_knn(tmp_path / "run", 0.4, 0.6, pixels=0.3)).read_text()
    assert "Is it learning?" in page
    assert "Nothing was gained" in page
    assert "k-NN on held-out images" in page
    assert "knn_top1_pixels" not in page.split("<details")[0]
