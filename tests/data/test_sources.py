"""Every kind of source gives the writer the same images, labels and captions; hostile ones give nothing but lines."""

import csv
import io
import json
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import BadImage
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_verify import verify
from esvit_scale.data.shard_writer import create, write_source
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.data.sources.zips import MAX_INFLATED
from esvit_scale.errors import UserError
from tests.data.conftest import encoded, picture

Contents = dict[bytes, tuple[str | None, str | None]]  # image bytes → class name, caption


def contents(manifest: Manifest) -> Contents:
    reader, found = ShardReader(manifest), {}
    for number, shard in enumerate(manifest.shards):
        for i in range(shard.samples):
            entry = reader.entry(number, i)
            label = reader.label(number, entry)
            caption = None
            if "txt" in entry.members:
                offset, size = entry.members["txt"]
                caption = (manifest.root / shard.name).read_bytes()[offset : offset + size].decode()
            found[reader.image(number, entry)] = (manifest.classes[label] if label >= 0 else None, caption)
    reader.close()
    return found


@pytest.fixture
def images(image_folder: Path) -> dict[str, bytes]:
    """Path below the folder → bytes; 12 of them in a/ and b/."""
    return {p.relative_to(image_folder).as_posix(): p.read_bytes() for p in sorted(image_folder.rglob("*.png"))}


def write(where: Path | str, out: Path, recipe: Recipe | None = None, **options: object) -> Manifest:
    [manifest] = write_source(
        str(where),
        out,
        SourceOptions(**options),  # type: ignore[arg-type]
        recipe or Recipe(samples_per_shard=5),
    ).values()
    assert verify(out) == []
    return manifest


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def expected(images: dict[str, bytes], label: bool, caption: bool) -> Contents:
    return {data: (name[0] if label else None, f"it's {name}" if caption else None) for name, data in images.items()}


def rows(images: dict[str, bytes]) -> list[dict[str, str]]:
    return [{"path": name, "kind": name[0], "words": f"it's {name}"} for name in images]


def as_list(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    (root / "x.txt").write_text("# a comment\n\n" + "".join(f"./images/{name}\r\n" for name in images))
    return root / "x.txt", {"label": "parent"}


def as_list_with_classes(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    (root / "x.lst").write_text("".join(f"{root}/images/{name} {name[0]}\n" for name in images))
    return root / "x.lst", {"label": "last"}


def as_table(
    images: dict[str, bytes], root: Path, separator: str = ",", kind: str = "csv"
) -> tuple[Path, dict[str, object]]:
    with (root / f"x.{kind}").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, ["kind", "words", "path"], delimiter=separator)
        table.writeheader()
        table.writerows(rows(images))
    return root / f"x.{kind}", {"label": "kind", "caption": "words", "root": root / "images"}


def as_tsv(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    return as_table(images, root, "\t", "tsv")


def as_parquet_of_paths(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    pq.write_table(pa.Table.from_pylist(rows(images)), root / "x.parquet")
    return root / "x.parquet", {"label": "kind", "caption": "words", "root": root / "images"}


def as_parquet_of_bytes(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    (root / "pq").mkdir()
    table = [row | {"image": {"bytes": images[row["path"]], "path": None}} for row in rows(images)]
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(table[part::2]), root / "pq" / f"{part}.parquet", row_group_size=2)
    return root / "pq", {"label": "kind", "caption": "words", "image_column": "image"}


def as_tars(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    """The same names in every tar, as img2dataset and many others number them."""
    (root / "tars").mkdir()
    for part in range(2):
        members = {}
        for i, (name, data) in enumerate(list(images.items())[part::2]):
            members |= {f"{i:04d}.png": data, f"{i:04d}.cls": name[0].encode(), f"{i:04d}.txt": f"it's {name}".encode()}
        tar_of(root / "tars" / f"{part}.tar", members | {"README": b"x", "0.pickle": b"cos\nsystem\n."})
    return root / "tars", {}


def as_class_tars(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    (root / "wnids").mkdir()
    for kind in "ab":
        tar_of(root / "wnids" / f"{kind}.tar", {n[2:]: data for n, data in images.items() if n[0] == kind})
    return root / "wnids", {"label": "archive"}


def as_zip(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    with zipfile.ZipFile(root / "x.zip", "w") as file:
        for i, (name, data) in enumerate(images.items()):
            file.writestr(name, data, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
        file.writestr("notes.md", b"x")
    return root / "x.zip", {"label": "parent"}


def as_img2dataset(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    out = root / "laion"
    out.mkdir()
    members = {
        f"{i:09d}.{e}": d
        for i, (n, b) in enumerate(images.items())
        for e, d in (("jpg", b), ("txt", f"it's {n}".encode()), ("json", b"{}"))
    }
    tar_of(out / "00000.tar", members)
    tar_of(out / "00001.tar", {"x.jpg": b"half a download"})
    (out / "00000_stats.json").write_text("{}")
    return out, {}


def as_img2dataset_files(images: dict[str, bytes], root: Path) -> tuple[Path, dict[str, object]]:
    (root / "laion" / "00000").mkdir(parents=True)
    (root / "laion" / "00000_stats.json").write_text("{}")
    for i, (name, data) in enumerate(images.items()):
        (root / "laion" / "00000" / f"{i:05d}.jpg").write_bytes(data)
        (root / "laion" / "00000" / f"{i:05d}.txt").write_text(f"it's {name}")
    return root / "laion", {}


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


def test_a_list_may_come_on_stdin(images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"images/{name}\n" for name in images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert set(contents(write("-", tmp_path / "set"))) == set(images.values())


@pytest.mark.parametrize("kaggle", [False, True])
def test_imagenets_layout_becomes_two_sets_with_the_same_classes(kaggle: bool, tmp_path: Path) -> None:
    base = tmp_path / ("ILSVRC/Data/CLS-LOC" if kaggle else "ILSVRC")
    for i, wnid in enumerate(["n03", "n01", "n02"]):
        (base / "train" / wnid).mkdir(parents=True)
        (base / "train" / wnid / "x.JPEG").write_bytes(encoded(picture(i), "JPEG"))
    held = base / "val" if kaggle else base / "val" / "n02"
    held.mkdir(parents=True)
    (held / "ILSVRC2012_val_00000001.JPEG").write_bytes(encoded(picture(9), "JPEG"))
    if kaggle:
        with pytest.raises(UserError, match=r"flat, and no LOC_val_solution\.csv"):
            open_source(str(tmp_path / "ILSVRC"), SourceOptions())
        answers = "ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4 n02 5 6 7 8\n"
        (tmp_path / "ILSVRC" / "LOC_val_solution.csv").write_text(answers)
    sets = write_source(str(tmp_path / "ILSVRC"), tmp_path / "out", SourceOptions(), Recipe())
    assert {name: (m.classes, m.samples) for name, m in sets.items()} == {
        "train": (("n01", "n02", "n03"), 3),
        "val": (("n01", "n02", "n03"), 1),
    }
    assert list(contents(sets["val"]).values()) == [("n02", None)]


def test_sets_become_one_set(images: dict[str, bytes], tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="the sets one and three in it have different classes"):
        write(tmp_path / "sets", tmp_path / "set2", kind="tars")


def test_numbers_as_labels_keep_their_meaning(images: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("path,y\n" + "".join(f"images/{n},{7 if n[0] == 'a' else 2}\n" for n in images))
    manifest = write(tmp_path / "x.csv", tmp_path / "set", label="y")
    assert manifest.classes == tuple("01234567")
    assert {label for label, _ in contents(manifest).values()} == {"7", "2"}


def test_classes_may_be_given(images: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "names").write_text("z\nb\na\n")
    manifest = write(tmp_path / "images", tmp_path / "set", classes=tmp_path / "names")
    assert manifest.classes == ("z", "b", "a")
    assert contents(manifest) == expected(images, True, False)
    (tmp_path / "names").write_text("b\nz\n")
    with pytest.raises(UserError, match="its subfolder a is not among the 2 classes"):
        write(tmp_path / "images", tmp_path / "set2", classes=tmp_path / "names")
    where, options = as_list(images, tmp_path)
    manifest = write(where, tmp_path / "set3", classes=tmp_path / "names", **options)
    assert {label for label, _ in contents(manifest).values()} == {"b"}
    lines = (tmp_path / "set3" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert "not one of the classes given" in lines[0]


def test_a_path_that_comes_twice_is_written_twice(images: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("images/a/p0.png\n" * 3 + "images/b/p1.png\n")
    manifest = write(tmp_path / "x.txt", tmp_path / "set")
    assert manifest.samples == 4
    assert len(contents(manifest)) == 2


BAD = {
    "x.csv": ("a,b\n1,2\n", {}, r"none of its columns \(a, b\) is named like a path"),
    "y.csv": ("path,b\n1,2\n", {"label": "bb"}, r"--label bb: no such column; did you mean 'b'"),
    "z.csv": ("path,b\n", {}, "no rows below its header"),
    "v.csv": ("", {}, "its first row names the columns"),
    "w.csv": ("path,b\nx.png\n", {"label": "b"}, "line 2 has 1 columns, too few"),
    "x.txt": ("\n# only\n", {}, "no path in it"),
    "y.txt": ("\0\1\2" * 10, {}, "line 1 is no path"),
    "z.txt": ("word\n", {"label": "last"}, "line 1 has one word"),
    "x.tar": ("no tar", {}, "no image in its 1 tars .*cut short"),
    "x.tar.gz": ("x", {}, "compressed tar"),
    "x.zip": ("no zip", {}, "not a readable zip file"),
    "x.parquet": ("no parquet", {}, "not a readable parquet file"),
    "x.doc": ("x", {}, r"not a source that can be read; save it as CSV \(UTF-8\)"),
    "x.jpg": ("x", {}, "is a file, not a folder"),
    "q.txt": ("x", {"kind": "lists"}, "--from lists: unknown kind of source; did you mean 'list'"),
    "r.txt": ("x", {"label": "first"}, "--label first"),
}


@pytest.mark.parametrize("name", BAD)
def test_sources_that_are_not_what_they_seem(name: str, tmp_path: Path) -> None:
    text, options, says = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        write_source(str(tmp_path / name), tmp_path / "set", SourceOptions(**options), Recipe())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'esvit-scale\[parquet\]'"):
        open_source(str(tmp_path / "x.parquet"), SourceOptions())


def test_a_wrong_root_stops_instead_of_quarantining_everything(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("".join(f"no/{i}.png\n" for i in range(300)))
    with pytest.raises(UserError, match=r"like the 99 files before it; is .* the folder that the paths start at"):
        write_source(str(tmp_path / "x.txt"), tmp_path / "set", SourceOptions(), Recipe())
    assert not (tmp_path / "set").exists()


# --- hostile ---------------------------------------------------------------------------------------------------------


def test_links_and_climbing_names_in_tars_are_only_text(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(picture(5)))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind, link in [
            ("link.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")),
            ("hard.png", tarfile.LNKTYPE, "../secret.png"),
            ("fifo.png", tarfile.FIFOTYPE, ""),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
        for name in ["../../climbs.png", "/abs.png", "caf\udce9 x.png"]:
            info = tarfile.TarInfo(name)
            info.size = len(encoded(picture(0)))
            tar.addfile(info, io.BytesIO(encoded(picture(0))))
    manifest = write(tmp_path / "x.tar", tmp_path / "out" / "set")
    assert manifest.samples == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "secret.png", "x.tar"]
    entries = manifests.read_index(tmp_path / "out" / "set" / "shard-000000.tar")
    assert all(not key.startswith("/") and ".." not in key for key, _ in entries)


def test_a_cut_tar_gives_what_is_whole_and_says_so(images: dict[str, bytes], tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", images)
    with tarfile.open(tar) as file:
        seventh = file.getmembers()[6]
    os.truncate(tar, seventh.offset_data + 10)
    manifest = write(tar, tmp_path / "set", label="parent")
    assert set(contents(manifest)) == set(list(images.values())[:6])
    row = json.loads((tmp_path / "set" / "quarantine.jsonl").read_text())
    assert row["file"] == "x.tar"
    assert "cut" in row["reason"]


@pytest.mark.parametrize("place", [[512, 1 << 60], [1 << 62, 10], [-1, 5]])
def test_an_index_beside_a_tar_that_cannot_be_true(place: list[int], images: dict[str, bytes], tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", images)
    lines = [{"format_version": 1, "shard": "x.tar"}, *([name, {"png": place}] for name in ("p", "q"))]
    manifests.index_path(tar).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(contents(write(tar, tmp_path / "set"))) == set(images.values())


def test_hostile_zips(images: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    good = images["a/p0.png"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ["../climbs.png", "/abs.png", "C:\\x.png", "caf\xe9.png", "ok.png"]:
            file.writestr(name, good)
        file.writestr("bomb.png", bytes(30 << 20))  # zeros: 1000:1
        file.writestr("lies.png", bytes(1000))
        file.writestr("lzma.png", good, zipfile.ZIP_LZMA)
        file.writestr("crypt.png", good)
        file.writestr("huge.png", good)
    data = bytearray(path.read_bytes())
    for name, offset, value in [
        (b"lies.png", 24, struct.pack("<I", 10)),  # says that it inflates to 10 bytes
        (b"crypt.png", 8, b"\1\0"),
        (b"huge.png", 24, struct.pack("<I", MAX_INFLATED + 1)),
    ]:
        entry = data.rindex(name) - 46  # in the table of contents
        assert data[entry : entry + 4] == b"PK\1\2"
        data[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(data)
    manifest = write(path, tmp_path / "out" / "set")
    assert manifest.samples == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "out", "x.zip"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "set" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {row["file"].partition("/")[2]: row["reason"] for row in rows}
    assert reasons.keys() == {"bomb.png", "lies.png", "lzma.png", "crypt.png", "huge.png"}
    assert "not an image" in reasons["bomb.png"]
    assert "length or checksum" in reasons["lies.png"]
    assert "packed with method 14" in reasons["lzma.png"]
    assert reasons["crypt.png"] == "encrypted"
    assert "zip bomb" in reasons["huge.png"]


def test_a_picture_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    bomb = bytearray(encoded(picture(0)))
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    tar_of(tmp_path / "x.tar", {"bomb.png": bytes(bomb), "ok.png": encoded(picture(0))})
    assert write(tmp_path / "x.tar", tmp_path / "set").samples == 1
    assert "pixels" in (tmp_path / "set" / "quarantine.jsonl").read_text()


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet", "csv"])
def test_mutated_archives_give_images_or_one_line(kind: str, tmp_path: Path, images: dict[str, bytes]) -> None:
    """Random damage: no crash, no other exception than the two that are promised, nothing outside the source."""
    make = {"tar": as_tars, "zip": as_zip, "parquet": as_parquet_of_bytes, "csv": as_table}[kind]
    where, options = make(images, tmp_path)
    path = next(p for p in sorted(where.rglob("*")) if p.is_file()) if where.is_dir() else where
    whole = path.read_bytes()
    rng = np.random.default_rng(7)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(len(data)))
            choice = rng.integers(3)
            if choice == 0:
                data[at] ^= 1 << int(rng.integers(8))
            elif choice == 1:
                data[at : at + 8] = rng.bytes(8)
            else:
                del data[at : at + int(rng.integers(1, 600))]
                data = data or bytearray(b"x")
        path.write_bytes(data)
        try:
            [source] = open_source(str(where), SourceOptions(**options)).values()  # type: ignore[arg-type]
        except UserError:
            continue
        for i in range(len(source)):
            with suppress(BadImage, OSError):
                source.read(i)


def test_names_that_are_no_utf8_in_lists(tmp_path: Path) -> None:
    name = b"caf\xe9.png"
    (tmp_path / os.fsdecode(name)).write_bytes(encoded(picture(0)))
    (tmp_path / "x.txt").write_bytes(name + b"\n" + b"gone\xe9.png\n")
    assert write(tmp_path / "x.txt", tmp_path / "set").samples == 1
    assert json.loads((tmp_path / "set" / "quarantine.jsonl").read_text())["file"] == "gone\\xe9.png"
    (tmp_path / "x.csv").write_bytes(b"path,c\n" + name + b",plain\n")
    assert write(tmp_path / "x.csv", tmp_path / "set2", caption="c").samples == 1
    (tmp_path / "x.csv").write_bytes(b"path,c\n" + name + b",plain\n" + name + b",na\xefve\n")
    with pytest.raises(UserError, match=r"line 3: na\\xefve is not UTF-8"):
        write(tmp_path / "x.csv", tmp_path / "set3", caption="c")


def test_create_is_the_folder_with_the_defaults(image_folder: Path, tmp_path: Path) -> None:
    one = create(image_folder, tmp_path / "one")
    two = write(image_folder, tmp_path / "two", Recipe(), kind="folder")
    assert [s.sha256 for s in one.shards] == [s.sha256 for s in two.shards]
