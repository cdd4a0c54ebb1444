"""Damaged and hostile sources give nothing but lines in the quarantine."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import BadImage
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import create
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.data.sources.zips import MAX_INFLATED
from esvit_scale.errors import UserError
from tests.data.conftest import encoded, picture
from tests.data.source_helpers import as_parquet_of_bytes, as_table, as_tars, as_zip, contents, tar_of, write


def test_links_and_climbing_names_in_tars_are_harmless(tmp_path: Path) -> None:
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
    assert all(not entry.key.startswith("/") and ".." not in entry.key for entry in entries)


def test_truncated_tar_gives_its_whole_members(images: dict[str, bytes], tmp_path: Path) -> None:
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
def test_index_that_does_not_fit_its_tar_is_ignored(place: list[int], images: dict[str, bytes], tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "x.tar", images)
    lines = [{"format_version": 1, "shard": "x.tar"}, *([name, {"png": place}] for name in ("p", "q"))]
    manifests.index_path(tar).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(contents(write(tar, tmp_path / "set"))) == set(images.values())


def test_hostile_zip_members_are_bad_images(images: dict[str, bytes], tmp_path: Path) -> None:
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


def test_picture_bomb_is_refused_before_decoding(tmp_path: Path) -> None:
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


def test_list_paths_that_are_not_utf8_are_read(tmp_path: Path) -> None:
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


def test_create_equals_a_folder_source_with_defaults(image_folder: Path, tmp_path: Path) -> None:
    one = create(image_folder, tmp_path / "one")
    two = write(image_folder, tmp_path / "two", Recipe(), kind="folder")
    assert [s.sha256 for s in one.shards] == [s.sha256 for s in two.shards]
