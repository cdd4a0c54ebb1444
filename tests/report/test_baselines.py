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
    assert table.remarks == [("", ["Nothing was gained.", "Reasons:"], ["too few steps", "lr"])]
    assert not table.warning
    assert marks([run]) == (("untrained", 0.4), ("raw pixels", 0.3))
    assert marks([run, run]) == ()


def test_every_run_has_its_own_list_of_reasons(tmp_path: Path) -> None:
    folders = [run_with_knn(tmp_path / name, 0.4, 0.4, pixels=0.3) for name in ("first", "second")]
    page = write_report(folders).read_text().split('id="learning"')[1].split("</section>")[0]
    for name in ("first", "second"):
        part = page.split(f"<h3>{name}</h3>")[1].split("</div>")[0]
        assert part.count("<li>") == 2
    assert "too few steps" not in page.split("<table")[0]


def measured_on(run: Path, held_out: str, images: int) -> Path:
    """Note in the rows of a run on which held-out images it measured."""
    first, *rest = (run / "metrics.jsonl").read_text().splitlines()
    row = json.loads(first) | {"knn_held_out": held_out, "knn_images": images}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(row), *rest]) + "\n")
    return run


def test_accuracies_on_different_held_out_images_are_not_comparable(tmp_path: Path) -> None:
    a, b, copy, normalized = (
        measured_on(run_with_knn(tmp_path / name, 0.4, 0.6, pixels=pixels), held_out, images)
        for name, pixels, held_out, images in (
            ("a", 0.57, "photos", 713),
            ("b", 0.39, "val", 178),
            ("copy", 0.39, "elsewhere", 178),
            ("normalized", 0.35, "val", 178),
        )
    )
    said = "k-NN is on different images: not comparable (a on 713 of photos from step 0; b on 178 of val from step 0)."
    assert (
        write_report([a, b, copy], tmp_path / "x.html").read_text().count(said) == 2
    )  # at the table and at the curves
    assert "not comparable" not in write_report([b, copy], tmp_path / "y.html").read_text()
    assert "not comparable" not in write_report([b, normalized], tmp_path / "z.html").read_text()
    with (a / "metrics.jsonl").open("a") as file:  # the run goes on with other images
        file.write(json.dumps({"step": 30, "knn_top1": 0.3, "knn_held_out": "val", "knn_images": 178}) + "\n")
    assert "(on 713 of photos from step 0; on 178 of val from step 30)" in write_report(a).read_text()


def test_results_on_different_test_images_are_not_comparable(tmp_path: Path) -> None:
    folders = [run_with_knn(tmp_path / name, 0.4, 0.6, pixels=0.3) for name in ("a", "b")]
    result = {"step": 20, "n_train": 9, "feature_dim": 8, "train": "t/train"}
    for folder, test, images in zip(folders, ("t/val", "/x/t/val"), (4, 4), strict=True):
        knn = result | {"results": {"9": {"top1": 50.0}}, "n_test": images, "test": test}
        (folder / "knn.json").write_text(json.dumps(knn))
    page = write_report(folders).read_text()
    assert "not comparable" not in page  # the same set, in another folder
    assert "<td>50.0 % (k = 9)</td>" in page
    (folders[1] / "knn.json").write_text(json.dumps(knn | {"n_test": 5}))
    said = "(a · teacher at step 20 on 4 images of t/val, by 9 of t/train; b · teacher at step 20 on 5 images of /x/t/val, by"
    assert said in write_report(folders).read_text()


def test_page_quotes_one_k_that_was_not_chosen_on_the_test_images(tmp_path: Path) -> None:
    run = run_with_knn(tmp_path / "run", 0.4, 0.6, pixels=0.3)
    for name, step, ten, twenty in (("raw pixels", None, 51.125, 53.375), ("", 20, 47.75, 50.125)):
        ks = {"10": {"top1": ten}, "20": {"top1": twenty}}
        result = {"name": name, "step": step, "results": ks, "best": {"k": 20, "top1": twenty}}
        sets = {"n_test": 178, "n_train": 535, "feature_dim": 8, "train": "t/train", "test": "t/val"}
        (run / f"knn{name[:3]}.json").write_text(json.dumps(result | sets))
    page = write_report(run).read_text()
    assert "<b>51.1 %</b><span>k-NN (k = 10), raw pixels</span>" in page
    assert "<b>47.8 %</b><span>k-NN (k = 10), teacher at step 20</span>" in page
    assert "3.4 points below raw pixels, which may be chance (178 images" in page
    assert '<td class="best">47.8</td><td>50.1</td>' in page
    assert 'style="width: 47.8%"' in page


def test_runs_without_measurements_have_no_table(tmp_path: Path) -> None:
    photographs = runs.photographs(tmp_path / "photographs")
    assert learning([("", run_files.read(runs.whole_run(tmp_path / "run", photographs)))]) is None


def test_page_shows_the_table_and_the_curve(tmp_path: Path) -> None:
    page = write_report(run_with_knn(tmp_path / "run", 0.4, 0.6, pixels=0.3)).read_text()
    assert "Is it learning?" in page
    assert "<p>Nothing was gained.</p><p>Reasons:</p>" in page
    assert "<ul><li>too few steps</li><li>lr</li></ul>" in page
    assert "k-NN on held-out images" in page
    assert "knn_top1_pixels" not in page.split("<details")[0]
