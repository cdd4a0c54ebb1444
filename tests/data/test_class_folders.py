"""Folders as people really have them: links, stray images, empty and numbered classes."""

from pathlib import Path

import pytest

from esvit_scale.data import left_out
from esvit_scale.data import manifest as manifests
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.evaluate.feature_cache import source_digest
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import Capture, classes, counts, run_create, write


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """cats: links to blobs without an ending; dogs: a link to a folder; birds: files, a loop, a dangling link."""
    real, source = tmp_path / "real", tmp_path / "src"
    classes(real, ["blobs", "dogs"])
    (source / "cats").mkdir(parents=True)
    for i in range(3):
        (real / "blobs" / f"{i}.png").rename(real / "blobs" / f"{i:040x}")
        (source / "cats" / f"c{i}.jpg").symlink_to(f"../../real/blobs/{i:040x}")
    (source / "dogs").symlink_to("../real/dogs")
    classes(source, ["birds"])
    (source / "birds" / "up").symlink_to("..")
    (source / "birds" / "gone.jpg").symlink_to("/nonexistent/x.jpg")
    return source


def test_links_are_followed_without_loops(linked: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run_create(linked, tmp_path / "set") == 0
    manifest = manifests.load(tmp_path / "set")
    assert (manifest.samples, manifest.classes) == (9, ("birds", "cats", "dogs"))
    assert counts(manifest) == {("images", left_out.DANGLING): 1, ("folders", left_out.LINK_LOOP): 1}
    said = capsys.readouterr()
    assert "1 images   dangling link" in said.out
    assert "warning: 1 of 10 images (10.0 %) are not in the set" in said.err
    assert run_create(linked, tmp_path / "strict", "--strict") == 2
    assert "--strict" in capsys.readouterr().err
    assert not (tmp_path / "strict" / manifests.MANIFEST).exists()


def test_strict_reports_bad_images_at_the_end(image_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (image_folder / "a" / "bad.png").write_bytes(b"no picture")
    assert run_create(image_folder, tmp_path / "set", "--strict") == 2
    assert "1 images: damaged, or not an image (a/bad.png)" in capsys.readouterr().err
    assert run_create(image_folder, tmp_path / "set") == 0  # goes on with the shards that were written
    assert run_create(image_folder, tmp_path / "set", "--strict") == 2  # a finished set is told of too
    (image_folder / "a" / "bad.png").unlink()
    assert run_create(image_folder, tmp_path / "other", "--strict", "--min-side", 17) == 2  # nothing is left
    assert run_create(image_folder, tmp_path / "good", "--strict") == 0


def test_dangling_links_in_evaluation_are_left_out(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sum(len(batch.keys) for batch in evaluation_batches(linked, 8, 4)) == 9
    assert "left out 1 bad images of 10 (first: birds/gone.jpg" in caplog.text
    assert source_digest(linked) == source_digest(linked)


def test_stray_image_is_left_out_and_labels_are_unchanged(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    root = classes(tmp_path / "src", ["x", "y"])
    (root / "cover.jpg").write_bytes(encoded(picture(9)))
    (root / "empty").mkdir()
    assert run_create(root, tmp_path / "set") == 0
    manifest = manifests.load(tmp_path / "set")
    assert (manifest.samples, manifest.classes) == (6, ("x", "y"))
    assert counts(manifest) == {("images", left_out.BESIDE_CLASSES): 1, ("folders", left_out.EMPTY_CLASS): 1}
    assert "first: cover.jpg" in capsys.readouterr().err
    assert run_create(root, tmp_path / "asked", "--label", "parent") == 2
    assert "cover.jpg lies in no subfolder" in capsys.readouterr().err
    assert run_create(root, tmp_path / "none", "--label", "none") == 0
    assert manifests.load(tmp_path / "none").samples == 7
    labels = [label for batch in evaluation_batches(root, 8, 4) for label in batch.labels.tolist()]
    assert sorted(labels) == [-1, 0, 0, 0, 1, 1, 1]
    assert "first: cover.jpg" in caplog.text


def test_label_parent_uses_the_innermost_folder(tmp_path: Path, capsys: Capture) -> None:
    classes(tmp_path / "src" / "images" / "a", ["x", "y"])
    classes(tmp_path / "src" / "images" / "b", ["y", "z"])
    assert write(tmp_path / "src", tmp_path / "set", label="parent").classes == ("x", "y", "z")
    assert write(tmp_path / "src", tmp_path / "one").classes == ("images",)
    assert "--label parent makes the innermost folders the classes" in capsys.readouterr().err


def test_class_folders_named_like_splits_are_noted(tmp_path: Path) -> None:
    def notes(root: Path) -> list[str]:
        return open_source(str(root), SourceOptions())[""].notes

    for split in ("Training", "test"):
        classes(tmp_path / "src" / split, ["cat", "dog"], 1)
    assert (
        "(Training, test) are named like splits and became the classes; give one split's folder, or --label parent"
        in (notes(tmp_path / "src")[0])
    )
    assert notes(classes(tmp_path / "trains", ["trains", "test"], 1)) == []


@pytest.mark.parametrize("name", ["all.zip", "labels.tar", "meta.parquet", "dataset_stats.json"])
def test_one_stray_file_does_not_change_the_kind_of_source(name: str, image_folder: Path) -> None:
    (image_folder / name).write_bytes(b"x")
    (image_folder / "a").rename(image_folder / "cats.zip")  # a class
    [source] = open_source(str(image_folder), SourceOptions()).values()
    assert (len(source), source.classes) == (12, ("b", "cats.zip"))
    assert source.left_out.total("files") == 1
    assert name.endswith("json") or f"12 images; 1 {Path(name).suffix} files in it are left out" in source.notes[-1]
