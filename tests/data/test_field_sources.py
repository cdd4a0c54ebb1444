"""Folders, tables and parquet files as people really have them, each with its right value."""

import errno
import fcntl
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from esvit_scale import cli
from esvit_scale.config import validate
from esvit_scale.data import left_out, staging, stream
from esvit_scale.data import manifest as manifests
from esvit_scale.data.class_names import numbered, numbered_as
from esvit_scale.data.evaluation import evaluation_batches
from esvit_scale.data.left_out import LeftOut
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.reencode import Reencode
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.data.url_stream import UrlSets
from esvit_scale.errors import UserError
from esvit_scale.evaluate.feature_cache import source_digest
from tests import tiny
from tests.data.conftest import encoded, picture
from tests.data.test_sources import contents, tar_of, write

Capture = pytest.CaptureFixture[str]


def classes(root: Path, names: list[str], n: int = 3) -> Path:
    """Class folders of n small pictures each."""
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f"{i}.png").write_bytes(encoded(picture(100 * c + i)))
    return root


def create(*arguments: object) -> int:
    return cli.main(["shards", "create", *map(str, arguments), "--workers", "1"])


def counts(manifest: Manifest) -> dict[tuple[str, str], int]:
    return {(row["what"], row["why"]): row["count"] for row in manifest.left_out}


# --- folders ---------------------------------------------------------------------------------------------------------


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


def test_links_are_followed_but_not_in_circles(linked: Path, tmp_path: Path, capsys: Capture) -> None:
    assert create(linked, tmp_path / "set") == 0
    manifest = manifests.load(tmp_path / "set")
    assert (manifest.samples, manifest.classes) == (9, ("birds", "cats", "dogs"))
    assert counts(manifest) == {("images", left_out.DANGLING): 1, ("folders", left_out.LINK_LOOP): 1}
    said = capsys.readouterr()
    assert "1 images   dangling link" in said.out
    assert "warning: 1 of 10 images (10.0 %) are not in the set" in said.err
    assert create(linked, tmp_path / "strict", "--strict") == 2
    assert "--strict" in capsys.readouterr().err
    assert not (tmp_path / "strict" / manifests.MANIFEST).exists()


def test_strict_tells_of_images_when_all_are_looked_at(image_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (image_folder / "a" / "bad.png").write_bytes(b"no picture")
    assert create(image_folder, tmp_path / "set", "--strict") == 2
    assert "1 images: damaged, or not an image (a/bad.png)" in capsys.readouterr().err
    assert create(image_folder, tmp_path / "set") == 0  # goes on with the shards that were written
    assert create(image_folder, tmp_path / "set", "--strict") == 2  # a finished set is told of too
    (image_folder / "a" / "bad.png").unlink()
    assert create(image_folder, tmp_path / "other", "--strict", "--min-side", 17) == 2  # nothing is left
    assert create(image_folder, tmp_path / "good", "--strict") == 0


def test_dangling_links_in_evaluation_are_left_out(linked: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sum(len(batch.keys) for batch in evaluation_batches(linked, 8, 4)) == 9
    assert "left out 1 bad images of 10 (first: birds/gone.jpg" in caplog.text
    assert source_digest(linked) == source_digest(linked)


def test_a_stray_image_is_named_and_labels_stay(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    root = classes(tmp_path / "src", ["x", "y"])
    (root / "cover.jpg").write_bytes(encoded(picture(9)))
    (root / "empty").mkdir()
    assert create(root, tmp_path / "set") == 0
    manifest = manifests.load(tmp_path / "set")
    assert (manifest.samples, manifest.classes) == (6, ("x", "y"))
    assert counts(manifest) == {("images", left_out.BESIDE_CLASSES): 1, ("folders", left_out.EMPTY_CLASS): 1}
    assert "first: cover.jpg" in capsys.readouterr().err
    assert create(root, tmp_path / "asked", "--label", "parent") == 2
    assert "cover.jpg lies in no subfolder" in capsys.readouterr().err
    assert create(root, tmp_path / "none", "--label", "none") == 0
    assert manifests.load(tmp_path / "none").samples == 7
    labels = [label for batch in evaluation_batches(root, 8, 4) for label in batch.labels.tolist()]
    assert sorted(labels) == [-1, 0, 0, 0, 1, 1, 1]
    assert "first: cover.jpg" in caplog.text


def test_the_innermost_folder_can_be_the_class(tmp_path: Path, capsys: Capture) -> None:
    classes(tmp_path / "src" / "images" / "a", ["x", "y"])
    classes(tmp_path / "src" / "images" / "b", ["y", "z"])
    assert write(tmp_path / "src", tmp_path / "set", label="parent").classes == ("x", "y", "z")
    assert write(tmp_path / "src", tmp_path / "one").classes == ("images",)
    assert "--label parent makes the innermost folders the classes" in capsys.readouterr().err


def test_folders_named_by_numbers_keep_them(tmp_path: Path) -> None:
    root = classes(tmp_path / "src", ["0", "2", "10"], 1)
    manifest = write(root, tmp_path / "set")
    assert manifest.classes == tuple(map(str, range(11)))
    assert {label for label, _ in contents(manifest).values()} == {"0", "2", "10"}
    assert [batch.labels.tolist() for batch in evaluation_batches(root, 8, 4)] == [[0, 10, 2]]


NUMBERED = [
    (["3.0", "1", " 2", "", "-1", "nan"], ("0", "1", "2", "3"), [3, 1, 2, -1, -1, -1]),
    (["b", "a", "nan"], ("a", "b", "nan"), [1, 0, 2]),
    (["10", "9", "1.5"], ("1.5", "9", "10"), [2, 1, 0]),
    (["20260101", "7"], ("7", "20260101"), [1, 0]),
    (["-1", ""], (), [-1, -1]),
    (["10", "2.0", "unknown", "2", "-1", "nan"], ("10", "2", "unknown"), [0, 1, 2, 1, -1, -1]),
    (["cat", "-1", "NA", "dog"], ("NA", "cat", "dog"), [1, -1, 0, 2]),
    (["20260101", "20260101.0", "7", "-1"], ("7", "20260101"), [1, 1, 0, -1]),
]


@pytest.mark.parametrize(("texts", "names", "numbers"), NUMBERED)
def test_whole_numbers_are_class_numbers(texts: list[str], names: tuple[str, ...], numbers: list[int]) -> None:
    found, of = numbered(texts)
    assert (found, [of.get(text, -1) for text in texts]) == (names, numbers)


def test_numbers_among_given_classes() -> None:
    assert list(numbered_as(["x", "y"], ["y", "0", "1.0", "-1", "2", "z", ""]).values()) == [1, 0, 1, -1, -2, -2, -1]
    assert numbered(["1", "01", "2"], folders=True) == (("01", "1", "2"), {"01": 0, "1": 1, "2": 2})
    with pytest.raises(UserError, match="label -3: class numbers begin at 0"):
        numbered(["-3", "4"])
    floats = ["0.0", "2", "1.0", "", "3.0", "-1.0"]
    assert list(numbered_as(["2", "1", "0"], floats).values()) == [2, 0, 1, -1, -2, -1]
    assert list(numbered_as(["5", "7", "07"], ["5.0", "7", "7.0", "0"]).values()) == [0, 1, -2, -2]


@pytest.mark.parametrize("names", ["2\n1\n0\n", "5\n7\n9\n"])
def test_a_set_whose_classes_are_named_by_numbers_keeps_them(names: str, pictures: Path, tmp_path: Path) -> None:
    listed = names.split()
    (pictures / "x.csv").write_text(
        "path,y\n" + "".join(f"{i}.png,{name}.0\n" for i, name in enumerate(sorted(listed)))
    )
    (pictures / "names").write_text(names)
    first = contents(write(pictures / "x.csv", tmp_path / "sets" / "a", label="y", classes=pictures / "names"))
    assert sorted(label or "" for label, _ in first.values()) == sorted(listed)
    (pictures / "other").write_text("\n".join(sorted(listed)) + "\nmore\n")
    for number, options in enumerate(({}, {"classes": pictures / "names"}, {"classes": pictures / "other"})):
        assert contents(write(tmp_path / "sets" / "a", tmp_path / f"one{number}", **options)) == first
        assert contents(write(tmp_path / "sets", tmp_path / f"all{number}", kind="tars", **options)) == first


def test_a_numbering_that_nobody_expects_is_said(pictures: Path, tmp_path: Path) -> None:
    def notes(where: Path, **options: str) -> list[str]:
        return open_source(str(where), SourceOptions(**options))[""].notes  # type: ignore[arg-type]

    table = pictures / "x.csv"
    table.write_text("path,y\n0.png,10\n1.png,2\n2.png,unknown\n")
    assert "label 'unknown' is no class number: all labels are names" in notes(table, label="y")[0]
    table.write_text("path,y\n0.png,2019\n1.png,2020\n2.png,\n")
    assert "2 class numbers up to 2020 make 2021 classes" in notes(table, label="y")[0]
    table.write_text("path,y\n0.png,2\n1.png,10\n2.png,-1\n3.png,nan\n")
    assert notes(table, label="y") == []
    root = classes(tmp_path / "years", ["2019", "2020"], 1)
    assert "make 2021 classes" in notes(root)[0]
    (tmp_path / "names").write_text("\ufeff2019\n2020\n")
    manifest = write(root, tmp_path / "set", classes=tmp_path / "names")
    assert {label for label, _ in contents(manifest).values()} == {"2019", "2020"}

    (tmp_path / "list.txt").write_text("\ufeff0.png\n")
    assert [s.name(0) for s in open_source(str(tmp_path / "list.txt"), SourceOptions()).values()] == ["0.png"]


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i)))
    return tmp_path


def test_pandas_floats_and_empty_cells(pictures: Path) -> None:
    (pictures / "x.csv").write_text(",path,y\n0,0.png,2.0\n1,1.png,\n2,2.png,10.0\n3,3.png,-1\n")
    manifest = write(pictures / "x.csv", pictures / "set", label="y")
    assert sorted(label or "" for label, _ in contents(manifest).values()) == ["10", "2"]
    assert counts(manifest) == {("images", left_out.UNLABELLED): 2}


def test_tsv_has_no_quoting_unless_asked(pictures: Path) -> None:
    text = 'path\twords\n0.png\t"quoted\n1.png\tb\n2.png\tends"\n3.png\td\n'
    (pictures / "x.tsv").write_text(text)
    found = contents(write(pictures / "x.tsv", pictures / "set", caption="words"))
    assert sorted(str(words) for _, words in found.values()) == ['"quoted', "b", "d", 'ends"']
    (pictures / "x.tsv").write_text('path\twords\n0.png\t"one\ntwo"\n')
    with pytest.raises(UserError, match=r"line 3 has 1 columns, too few .*--quoted"):
        write(pictures / "x.tsv", pictures / "set2", caption="words")
    found = contents(write(pictures / "x.tsv", pictures / "set3", caption="words", quoted=True))
    assert [words for _, words in found.values()] == ["one\ntwo"]


def test_semicolons_and_utf16_are_read(pictures: Path, capsys: Capture) -> None:
    text = "path;y\n0.png;São\n1.png;dog\n"
    for encoding in ("utf-8-sig", "utf-16"):
        (pictures / "x.csv").write_text(text, encoding)
        assert write(pictures / "x.csv", pictures / encoding, label="y").classes == ("São", "dog")
        assert "line 1: columns are separated by semicolons" in capsys.readouterr().err


TABLES = {
    "a quote that swallows rows": (
        'path,w\n0.png,"a\n1.png,b\n2.png,c"\n',
        "line 2: a quoted field goes on over line 3",
    ),
    "a quote that is never closed": ('path,w\n0.png,"a\n', "line 2: not a readable row"),
    "a comma in a caption": ("path,w\n0.png,a\n1.png,a, b\n", "line 3 has 3 columns, too many"),
    "a name twice": ("path,w,w\n0.png,a,b\n", "line 1: columns 2 and 3 are both named 'w'"),
    "latin-1": ("path,w\n0.png,a\n1.png,S\udce3o\n", r"line 3: S\\xe3o is not UTF-8 \(Latin-1\?\)"),
    "utf-16 without a mark": ("p\0a\0t\0h\0", "UTF-16 without its mark"),
    "no label at all": ("path,w\n0.png,\n1.png,nan\n2.png,-1\n", "--label w: none of its 3 images has one"),
}


@pytest.mark.parametrize("name", TABLES)
def test_odd_tables_are_named_with_their_line(name: str, pictures: Path) -> None:
    text, says = TABLES[name]
    (pictures / "x.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=says) as caught:
        open_source(str(pictures / "x.csv"), SourceOptions(label="w", caption=None if "label" in name else "w"))
    assert "\n" not in str(caught.value)


QUOTED = {
    "header": '"path"\t"w"\n"0.png"\t"1"\n',
    "paths": 'path\tw\n0.png\t1\n"1.png"\t1\n',
    "labels": 'path\tw\n0.png\t"1"\n',
    "a tab in quotes": 'path\tw\tc\n0.png\t1\t"a\tb"\n',
}


@pytest.mark.parametrize("name", QUOTED)
def test_a_quoted_tsv_asks_for_the_option(name: str, pictures: Path) -> None:
    (pictures / "x.tsv").write_text(QUOTED[name])
    with pytest.raises(UserError, match=r"line \d.* are its fields quoted\? Then add --quoted"):
        open_source(str(pictures / "x.tsv"), SourceOptions(label="w"))
    [source] = open_source(str(pictures / "x.tsv"), SourceOptions(label="w", quoted=True)).values()
    assert (source.name(0), source.classes) == ("0.png", ("0", "1"))


def test_tables_as_excel_writes_them(pictures: Path) -> None:
    def opened(text: bytes, label: str | None = "y") -> tuple[tuple[str, ...], list[str]]:
        (pictures / "x.csv").write_bytes(text)
        [source] = open_source(str(pictures / "x.csv"), SourceOptions(label=label)).values()
        return source.classes, source.notes

    assert opened(b"sep=;\r\npath;y\r\n0.png;1\r\n   \r\n1.png;0\r\n") == (("0", "1"), [])
    found, notes = opened(b"path;y\n0.png;1,0\n1.png;0,0\n2.png;2\n")
    assert found == ("0", "1", "2")
    assert notes[1].endswith("line 2: 1,0 has a decimal comma; read as 1.0")
    assert len(notes) == 2
    assert opened(b"path,a b,Label\n0.png,x,y\n", "none") == ((), [])
    assert "its column Label is not used; --label Label" in opened(b"path,a b,Label\n0.png,x,y\n", None)[1][0]
    with pytest.raises(UserError, match="line 4 has 1 columns"):
        opened(b"sep=;\npath;y\n0.png;1\n1.png\n")
    with pytest.raises(UserError, match=r"line 1: the header is not UTF-8 \(Latin-1\?\); save the table as UTF-8"):
        opened(b"path,S\xe3o\n0.png,1\n", "S\xe3o")
    with pytest.raises(UserError, match=r"this is an Excel workbook \(zip\): export it as CSV"):
        opened(b"PK\x03\x04" + bytes(100))


def test_captions_may_have_several_lines(pictures: Path) -> None:
    (pictures / "x.csv").write_text('path,w\n0.png,"one, two\nthree, four"\n1.png,\n,x\n')
    manifest = write(pictures / "x.csv", pictures / "set", caption="w")
    assert {words for _, words in contents(manifest).values()} == {"one, two\nthree, four", None}
    assert counts(manifest) == {("rows", left_out.NO_PATH): 1}


# --- parquet ---------------------------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, object], names: list[str] | None = None) -> Path:
    made = pa.table(columns)
    if names:
        about = {"info": {"features": {"y": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(made, path, row_group_size=3)
    return path


@pytest.mark.parametrize("numbers", [[1, 0, 2, 0, -1], [1.0, 0.0, 2.0, 0.0, None]])
def test_class_names_of_the_schema_and_paths_instead_of_bytes(numbers: list[float], pictures: Path) -> None:
    files = [(pictures / f"{i}.png").read_bytes() for i in range(4)]
    rows = [
        {"bytes": files[0], "path": "elsewhere.png"},
        {"bytes": None, "path": "1.png"},
        {"bytes": None, "path": str(pictures / "2.png")},
        {"bytes": None, "path": "../3.png"},
        {"bytes": None, "path": None},
    ]
    where = parquet(pictures / "x.parquet", {"image": rows, "y": pa.array(numbers)}, ["9", "cat", "0"])
    [unlabelled] = open_source(str(where), SourceOptions()).values()
    assert "its column y is not used; --label y makes it the classes" in unlabelled.notes[0]
    manifest = write(where, pictures / "set", label="y")
    assert contents(manifest) == {files[0]: ("cat", None), files[1]: ("9", None), files[2]: ("0", None)}
    assert counts(manifest) == {("images", left_out.UNREADABLE): 1, ("images", left_out.EMPTY): 1}


COLUMNS = {
    "binary": lambda files: pa.array(files, pa.binary()),
    "large_binary": lambda files: pa.array(files, pa.large_binary()),
    "binary_view": lambda files: pa.array(files, pa.binary_view()),
    "dictionary": lambda files: pa.array(files, pa.binary()).dictionary_encode(),
    "list of bytes": lambda files: pa.array([list(f) for f in files], pa.list_(pa.uint8())),
    "struct of large ones": lambda files: pa.array(
        [{"bytes": f, "path": None} for f in files],
        pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
    ),
    "paths": lambda files: pa.array([f"{i}.png" for i in range(4)], pa.string_view()),
    "large paths": lambda files: pa.array([f"{i}.png" for i in range(4)], pa.large_string()),
    "coded paths": lambda files: pa.array([f"{i}.png" for i in range(4)]).dictionary_encode(),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.skipif(not hasattr(pa, "binary_view"), reason="this pyarrow has no views")
def test_column_types(name: str, pictures: Path) -> None:
    files = [(pictures / f"{i}.png").read_bytes() for i in range(4)]
    labels = pa.array([1.0, None, 3.0, float("nan")], pa.float32())
    where = parquet(pictures / "x.parquet", {"image": COLUMNS[name](files), "y": labels})
    manifest = write(where, pictures / "set", label="y")
    assert contents(manifest) == {files[0]: ("1", None), files[2]: ("3", None)}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": [[b"x"]], "y": [1]}, "several images a row: write a row for each"),
        ({"image": [b"x"], "y": [[1, 2]]}, r"column y holds list<.*one label"),
        ({"image": [1], "y": [1]}, "column image holds int64"),
    ],
)
def test_columns_that_cannot_be_read(columns: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        open_source(str(parquet(tmp_path / "x.parquet", columns)), SourceOptions(label="y"))


def test_a_row_group_is_streamed(tmp_path: Path) -> None:
    """Memory is that of some pages, whatever the row group: 64 MB of images in one, read with less than 24 MB."""
    file = np.random.default_rng(0).bytes(256_000)
    rows = pa.array([{"bytes": file, "path": None}] * 250, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    made = pa.table({"image": rows})
    pq.write_table(made, tmp_path / "x.parquet", use_dictionary=False, write_batch_size=4)
    del made, rows
    [source] = open_source(str(tmp_path / "x.parquet"), SourceOptions()).values()
    before = pa.default_memory_pool().bytes_allocated()
    most = 0
    for i in range(0, len(source), 5):
        assert source.read(i).data == file
        most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert 1_000_000 < most < 24_000_000


# --- sets beside sets, readers, staging, patterns --------------------------------------------------------------------


def test_a_set_is_not_written_inside_another(image_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    assert create(image_folder, tmp_path / "set") == 0
    for where, *more in ((tmp_path / "set", "--val-fraction", 0.5), (tmp_path / "set" / "inner",)):
        assert create(image_folder, where, *more) == 2
        assert "already holds another shard set" in capsys.readouterr().err
    assert create(image_folder, tmp_path / "two", "--val-fraction", 0.5) == 0
    assert create(image_folder, tmp_path / "two") == 2
    assert "already holds the sets of a split" in capsys.readouterr().err


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for i in range(12):
        kind = ["JPEG", "PNG", "WEBP"][i % 3]
        path = tmp_path / "mixed" / "ab"[i % 2] / f"{i}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i), kind))
    return tmp_path / "mixed"


@pytest.mark.parametrize("form", ["jpg", "png", "webp", "keep"])
def test_one_type_of_images_by_option(form: str, mixed: Path, tmp_path: Path, capsys: Capture) -> None:
    assert create(mixed, tmp_path / "set", "--format", form) == 0
    manifest = manifests.load(tmp_path / "set")
    said = capsys.readouterr().err
    if form == "keep":
        assert manifest.formats == {"jpeg": 4, "png": 4, "webp": 4}
        assert "images of several types (4 .jpeg, 4 .png, 4 .webp)" in said
    else:
        assert (manifest.formats, said) == ({form: 12}, "")
        kinds = {Image.open(io.BytesIO(data)).format for data in contents(manifest)}
        assert kinds == {{"jpg": "JPEG"}.get(form, form.upper())}


def test_the_real_readers(mixed: Path, tmp_path: Path) -> None:
    """What docs/your_data.md says of Hugging Face datasets, webdataset and torch's DataLoader."""
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    import webdataset
    from torch.utils.data import DataLoader

    write(mixed, tmp_path / "one", Recipe(reencode=Reencode(format="jpeg")))
    write(mixed, tmp_path / "several", Recipe())

    def read(name: str) -> object:
        urls = str(tmp_path / name / "*.tar")
        return datasets.load_dataset("webdataset", data_files=urls, split="train", cache_dir=str(tmp_path / "cache"))

    rows = list(read("one"))  # type: ignore[call-overload]
    assert (len(rows), {row["cls"] for row in rows}, rows[0]["jpg"].size) == (12, {0, 1}, (20, 16))
    with pytest.raises(ValueError, match="same types"):
        read("several")
    for name in ("one", "several"):
        tars = [str(path) for path in (tmp_path / name).glob("*.tar")]
        stream = webdataset.WebDataset(tars, shardshuffle=False).decode("pil")
        samples = list(DataLoader(stream, batch_size=None, num_workers=0))
        assert len(samples) == 12
        assert all(
            isinstance(next(v for k, v in s.items() if k in ("jpg", "jpeg", "png", "webp")), Image.Image)
            for s in samples
        )


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_staging_without_locks(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_flock(handle: object, kind: int) -> None:
        raise OSError(code, os.strerror(code))

    shards = manifests.load(tiny.shards(tmp_path / "set"))
    monkeypatch.setattr(fcntl, "flock", no_flock)
    staged = staging.staged(shards, str(tmp_path / "disk"))
    assert manifests.load(staged.root).shards == shards.shards
    assert not list(staged.root.glob(".*.partial"))
    assert "no locks on this file system" in caplog.text


def test_patterns_in_data_train(tmp_path: Path) -> None:
    for name in ("x-0.tar", "x-1.tar", "y.tar"):
        tar_of(tmp_path / name, {"a.png": encoded(picture(0))})

    def opened(train: str) -> tuple[str, ...]:
        config = validate({"data": {"train": train, "epoch_samples": 8}}, "test")
        assert UrlSets.wanted(config.data)
        return UrlSets.open(config.data).sets[0].urls

    assert [Path(url).name for url in opened(f"{tmp_path}/x-*.tar")] == ["x-0.tar", "x-1.tar"]
    assert [Path(url).name for url in opened(f"{tmp_path}/{{x-?,y}}.tar")] == ["x-0.tar", "x-1.tar", "y.tar"]
    with pytest.raises(UserError, match="no file matches this pattern"):
        opened(f"{tmp_path}/z*.tar")
    with pytest.raises(UserError, match="a pattern can name tars"):
        stream.open_data(validate({"data": {"train": f"{tmp_path}/*"}}, "test"))


def test_an_unfinished_tar_of_img2dataset_is_counted(image_folder: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("name", ["all.zip", "labels.tar", "meta.parquet", "dataset_stats.json"])
def test_one_stray_file_does_not_decide_what_a_folder_is(name: str, image_folder: Path) -> None:
    (image_folder / name).write_bytes(b"x")
    (image_folder / "a").rename(image_folder / "cats.zip")  # a class
    [source] = open_source(str(image_folder), SourceOptions()).values()
    assert (len(source), source.classes) == (12, ("b", "cats.zip"))
    assert source.left_out.total("files") == 1
    assert name.endswith("json") or f"12 images; 1 {Path(name).suffix} files in it are left out" in source.notes[-1]


def left(where: Path, **options: str) -> dict[tuple[str, str], tuple[int, str]]:
    """What is left out of all splits of a source: how many, and the first."""
    rows = [
        row
        for s in open_source(str(where), SourceOptions(**options)).values()
        for row in s.left_out.rows()  # type: ignore[arg-type]
    ]
    return {(row["what"], row["why"]): (row["count"], row["first"]) for row in rows}


def test_what_lies_beside_train_and_val_is_counted(tmp_path: Path, capsys: Capture) -> None:
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
    assert create(root, tmp_path / "set", "--strict") == 2
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


def test_what_img2dataset_leaves_beside_its_parts_is_counted(tmp_path: Path) -> None:
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


def test_what_lies_in_a_shard_set_besides_is_counted(image_folder: Path, tmp_path: Path) -> None:
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


def test_arrays_beside_images_are_never_lost_in_silence(image_folder: Path, tmp_path: Path) -> None:
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


def test_folders_named_like_splits_are_said(tmp_path: Path) -> None:
    def notes(root: Path) -> list[str]:
        return open_source(str(root), SourceOptions())[""].notes

    for split in ("Training", "test"):
        classes(tmp_path / "src" / split, ["cat", "dog"], 1)
    assert (
        "(Training, test) are named like splits and became the classes; give one split's folder, or --label parent"
        in (notes(tmp_path / "src")[0])
    )
    assert notes(classes(tmp_path / "trains", ["trains", "test"], 1)) == []
