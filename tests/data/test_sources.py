"""Every kind of source gives the writer the same images, labels and captions."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import write_source
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import UserError
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import (
    Contents,
    as_class_tars,
    as_img2dataset,
    as_img2dataset_files,
    as_list,
    as_list_with_classes,
    as_parquet_of_bytes,
    as_parquet_of_paths,
    as_table,
    as_tars,
    as_tsv,
    as_zip,
    contents,
    tar_of,
    write,
)


def expected(images: dict[str, bytes], label: bool, caption: bool) -> Contents:
    return {data: (name[0] if label else None, f"it's {name}" if caption else None) for name, data in images.items()}


SOURCES: dict[str, tuple[Callable[..., tuple[Path, dict[str, object]]], bool, bool]] = {  # labels? captions?
    "list": (as_list, True, False),
    "list with classes": (as_list_with_classes, True, False),
    "csv": (as_table, True, True),
    "tsv": (as_tsv, True, True),
    "parquet of paths": (as_parquet_of_paths, True, True),
    "parquet of bytes": (as_parquet_of_bytes, True, True),
    "tars": (as_tars, True, True),
    "tars by class": (as_class_tars, True, False),
    "zip": (as_zip, True, False),
    "img2dataset": (as_img2dataset, False, True),
    "img2dataset files": (as_img2dataset_files, False, True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_images(name: str, images: dict[str, bytes], tmp_path: Path) -> None:
    make, label, caption = SOURCES[name]
    where, options = make(images, tmp_path)
    manifest = write(where, tmp_path / "set", **options)
    assert contents(manifest) == expected(images, label, caption)
    assert manifest.classes == (("a", "b") if label else ())
    assert all(shard.samples <= 5 for shard in manifest.shards)
    again = write(where, tmp_path / "again", **options)
    assert [s.sha256 for s in again.shards] == [s.sha256 for s in manifest.shards]


def test_list_is_read_from_stdin(images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"images/{name}\n" for name in images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert set(contents(write("-", tmp_path / "set"))) == set(images.values())


@pytest.mark.parametrize("kaggle", [False, True])
def test_imagenet_layout_becomes_two_sets_with_the_same_classes(kaggle: bool, tmp_path: Path) -> None:
    base = tmp_path / ("ILSVRC/Data/CLS-LOC" if kaggle else "ILSVRC")
    for i, wnid in enumerate(["n03", "n01", "n02"]):
        (base / "train" / wnid).mkdir(parents=True)
        (base / "train" / wnid / "x.JPEG").write_bytes(encoded(picture(i), "JPEG"))
    held = base / "val" if kaggle else base / "val" / "n02"
    held.mkdir(parents=True)
    (held / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded(picture(9), "JPEG"))
    if kaggle:
        with pytest.raises(UserError, match=r"has no class folders, and there is no LOC_val_solution\.csv"):
            open_source(str(tmp_path / "ILSVRC"), SourceOptions())
        answers = "ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8\n"
        (tmp_path / "ILSVRC" / "LOC_val_solution.csv").write_text(answers)
    sets = write_source(str(tmp_path / "ILSVRC"), tmp_path / "out", SourceOptions(), Recipe())
    assert {name: (m.classes, m.samples) for name, m in sets.items()} == {
        "train": (("n01", "n02", "n03"), 3),
        "val": (("n01", "n02", "n03"), 1),
    }
    assert list(contents(sets["val"]).values()) == [("n02", None)]


def test_several_sets_become_one(images: dict[str, bytes], tmp_path: Path) -> None:
    for name, kept in (("one", ["a/p0.png", "b/p1.png"]), ("two", ["b/p3.png"])):
        (tmp_path / "names").write_text("b\na\n")
        (tmp_path / "list.txt").write_text("".join(f"images/{path}\n" for path in kept))
        options = {"label": "parent", "classes": tmp_path / "names"}
        write(tmp_path / "list.txt", tmp_path / "sets" / name, **options)
    (tmp_path / "sets" / "one" / ".partial").mkdir()
    tar_of(tmp_path / "sets" / "one" / ".partial" / "hidden.tar", {"x.png": images["a/p2.png"]})
    manifest = write(tmp_path / "sets", tmp_path / "set", kind="tars")
    assert manifest.classes == ("b", "a")
    assert contents(manifest) == expected({n: images[n] for n in ("a/p0.png", "b/p1.png", "b/p3.png")}, True, False)
    write(tmp_path / "images" / "a", tmp_path / "sets" / "three")
    with pytest.raises(UserError, match="its sets one and three have different classes"):
        write(tmp_path / "sets", tmp_path / "set2", kind="tars")


def test_numbers_as_labels_keep_their_meaning(images: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path,y\n" + "".join(f"images/{n},{7 if n[0] == 'a' else 2}\n" for n in images))
    manifest = write(tmp_path / "x.csv", tmp_path / "set", label="y")
    assert manifest.classes == tuple("01234567")
    assert {label for label, _ in contents(manifest).values()} == {"7", "2"}


def test_class_names_can_be_given(images: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "names").write_text("z\nb\na\n")
    manifest = write(tmp_path / "images", tmp_path / "set", classes=tmp_path / "names")
    assert manifest.classes == ("z", "b", "a")
    assert contents(manifest) == expected(images, True, False)
    (tmp_path / "names").write_text("b\nz\n")
    with pytest.raises(UserError, match="its subfolder a is not one of the 2 given classes"):
        write(tmp_path / "images", tmp_path / "set2", classes=tmp_path / "names")
    where, options = as_list(images, tmp_path)
    manifest = write(where, tmp_path / "set3", classes=tmp_path / "names", **options)
    assert {label for label, _ in contents(manifest).values()} == {"b"}
    lines = (tmp_path / "set3" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert "not one of the classes given" in lines[0]


def test_repeated_path_is_written_twice(images: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("images/a/p0.png\n" * 3 + "images/b/p1.png\n")
    manifest = write(tmp_path / "x.txt", tmp_path / "set")
    assert manifest.samples == 4
    assert len(contents(manifest)) == 2


BAD = {
    "x.csv": ("a,b\n1,2\n", {}, r"none of its columns \(a, b\) is named like a path"),
    "y.csv": ("path,b\n1,2\n", {"label": "bb"}, r"--label bb: no such column; did you mean 'b'"),
    "z.csv": ("path,b\n", {}, "no usable rows below its header"),
    "v.csv": ("", {}, "its first row must name the columns"),
    "m.csv": ("", {"audio_column": "sound"}, "its first row must name the columns"),
    "n.csv": ("path,sound\n", {"audio_column": "sound"}, "no usable rows below its header"),
    "o.csv": ("path,sound\nx.png,y.wav\n", {"audio_column": "sounds"}, "did you mean 'sound'"),
    "w.csv": ("path,b\nx.png\n", {"label": "b"}, "line 2 has 1 columns, too few"),
    "x.txt": ("\n# only\n", {}, "holds no path"),
    "y.txt": ("\0\1\2" * 10, {}, "line 1 is not a path"),
    "z.txt": ("word\n", {"label": "last"}, "line 1 has one word"),
    "x.tar": ("no tar", {}, "no image in its 1 tars .*cut short"),
    "x.tar.gz": ("x", {}, "compressed tar"),
    "x.zip": ("no zip", {}, "not a readable zip file"),
    "x.parquet": ("no parquet", {}, "not a readable parquet file"),
    "x.doc": ("x", {}, r"not a readable kind of source; save a table as CSV \(UTF-8\)"),
    "x.jpg": ("x", {}, "is a file, not a folder"),
    "q.txt": ("x", {"kind": "lists"}, "--from lists: unknown kind of source; did you mean 'list'"),
    "r.txt": ("x", {"label": "first"}, "--label first"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_sources_are_errors(name: str, tmp_path: Path) -> None:
    text, options, says = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        write_source(str(tmp_path / name), tmp_path / "set", SourceOptions(**options), Recipe())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_missing_pyarrow_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'esvit-scale\[parquet\]'"):
        open_source(str(tmp_path / "x.parquet"), SourceOptions())


def test_wrong_root_stops_instead_of_quarantining_everything(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("".join(f"no/{i}.png\n" for i in range(300)))
    with pytest.raises(UserError, match=r"like the 99 files before it; is .* the folder that the paths start at"):
        write_source(str(tmp_path / "x.txt"), tmp_path / "set", SourceOptions(), Recipe())
    assert not (tmp_path / "set").exists()
