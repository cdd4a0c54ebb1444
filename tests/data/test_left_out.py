"""Whatever lies beside the images of a source is counted, never lost silently."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from esvit_scale.data import left_out
from esvit_scale.data.left_out import LeftOut
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import UserError
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import Capture, classes, counts, left, run_create, tar_of, write


def test_unfinished_img2dataset_tar_is_counted(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "laion"
    out.mkdir()
    for name in ("00000", "00001"):
        tar_of(out / f"{name}.tar", {"0.jpg": encoded(picture(0), "JPEG")})
    (out / "00000_stats.json").write_text("{}")
    assert counts(write(out, tmp_path / "set")) == {("archives", left_out.UNFINISHED): 1}
    (image_folder / "c").symlink_to(".")
    assert counts(write(image_folder, tmp_path / "loop")) == {("folders", left_out.LINK_LOOP): 1}


def test_files_beside_archives_are_counted(image_folder: Path, tmp_path: Path) -> None:
    tar_of(image_folder / "x.tar", {"a/p.png": encoded(picture(50)), "big.bin": bytes(100_000)})
    (image_folder / "README.md").write_text("x")
    [source] = open_source(str(image_folder), SourceOptions()).values()
    assert len(source) == 1
    assert LeftOut(source.left_out.rows()).total("images") == 12
    assert source.left_out.total("files") == 1
    assert "taken for tars because of x.tar; --from folder reads its 12 image files" in source.notes[-1]


def test_files_beside_train_and_val_are_counted(tmp_path: Path, capsys: Capture) -> None:
    root = tmp_path / "src"
    for split, n in (("train", 2), ("val", 1), ("test", 3)):
        classes(root / split, ["n01", "n02"], n)
    (root / "readme.txt").write_text("x")
    beside = {
        ("images", left_out.BESIDE_SPLITS): (6, "test/n01/0.png"),
        ("files", left_out.BESIDE_SPLITS): (1, "readme.txt"),
    }
    found = left(root)
    assert {key: n for key, (n, _) in found.items()} == {key: n for key, (n, _) in beside.items()}
    assert {key: n for key, (n, _) in left(root, label="none").items()} == {key: n for key, (n, _) in beside.items()}
    assert run_create(root, tmp_path / "set", "--strict") == 2
    assert "6 images: beside train/ and val/" in capsys.readouterr().err
    for path in [*(root / "val").iterdir()]:
        (path / "0.png").rename(root / "val" / f"{path.name}.png")
        path.rmdir()
    (root / "LOC_val_solution.csv").write_text("\ufeffImageId,PredictionString\nn01,n01 1 2 3 4\nn07\n")
    found = left(root)
    assert found["images", "not named in LOC_val_solution.csv"] == (1, "n02.png")
    assert found["rows", left_out.NO_PATH] == (1, "LOC_val_solution.csv: line 3")
    assert found["files", left_out.BESIDE_SPLITS][0] == 1
    [source] = [s for name, s in open_source(str(root), SourceOptions()).items() if name == "val"]
    assert [(source.name(i), source.read(i).label) for i in range(len(source))] == [("n01.png", 0)]


def test_files_beside_img2dataset_parts_are_counted(tmp_path: Path) -> None:
    classes(tmp_path / "files", ["00000", "00001", "other"], 2)
    (tmp_path / "files" / "_tmp").mkdir()
    for name in ("00000_stats.json", "00000.parquet", "_tmp/0.feather", "00007_stats.json"):
        (tmp_path / "files" / name).write_text("{}")
    expected = {
        ("images", left_out.UNFINISHED): 2,
        ("images", left_out.BESIDE_ARCHIVES): 2,
        ("files", left_out.BESIDE_ARCHIVES): 2,
    }
    assert {key: n for key, (n, _) in left(tmp_path / "files").items()} == expected
    tar_of(tmp_path / "files" / "00000.tar", {"0.jpg": encoded(picture(0), "JPEG")})
    expected["images", left_out.UNFINISHED] = 4  # folders are no part of an output in tars
    assert {key: n for key, (n, _) in left(tmp_path / "files").items()} == expected


def test_other_files_in_a_shard_set_are_counted(image_folder: Path, tmp_path: Path) -> None:
    write(image_folder, tmp_path / "set")
    assert left(tmp_path / "set") == {}
    for name in ("x.jpg", "notes.txt"):
        (tmp_path / "set" / name).write_bytes(bytes(100_000))
    tar_of(tmp_path / "set" / "extra.tar", {"0.png": encoded(picture(0))})
    assert left(tmp_path / "set") == {
        ("images", left_out.BESIDE_ARCHIVES): (1, "x.jpg"),
        ("archives", left_out.BESIDE_ARCHIVES): (1, "extra.tar"),
        ("files", left_out.BESIDE_ARCHIVES): (1, "notes.txt"),
    }


def test_arrays_beside_images_are_counted_or_refused(image_folder: Path, tmp_path: Path) -> None:
    arrays = tmp_path / "arrays" / "a"
    arrays.mkdir(parents=True)
    for i in range(3):
        np.save(arrays / f"{i}.npy", np.zeros((8, 8, 3), np.uint8))
    assert left(arrays) == {}
    (arrays / "preview.png").write_bytes(encoded(picture(0)))
    with pytest.raises(
        UserError, match=r"3 \.npy arrays \(first: 0\.npy\) beside 1 image files \(first: preview\.png\)"
    ):
        left(arrays)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for path in arrays.iterdir():
            file.write(path, path.name)
    with pytest.raises(UserError, match=r"x\.zip: 3 \.npy arrays"):
        left(tmp_path / "x.zip")
    (arrays / "0.npy").rename(image_folder / "a" / "embeddings.npy")
    assert left(image_folder) == {("images", left_out.BESIDE_IMAGES): (1, "a/embeddings.npy")}
