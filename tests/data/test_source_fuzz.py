"""Generated sources of every kind, with what people have in them: used and counted together are everything."""

import csv
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from esvit_scale.data import manifest as manifests
from esvit_scale.data.left_out import LeftOut
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_writer import write_source
from esvit_scale.data.sources import SourceOptions

FAST, ALL = 60, 500
NAMES = ["cat", "dog", "10", "2", "ünï", "a b", "x.y"]


class Case:
    """A source that is drawn from a seed: `planted` things of the unit that is counted, in `root`."""

    def __init__(self, seed: int, root: Path) -> None:
        self.rng, self.root, self.planted, self._made = np.random.default_rng([7, seed]), root, 0, 0
        self.classes: dict[bytes, str] = {}  # image file → the class that it should come out with
        root.mkdir()

    def image(self, label: str) -> bytes:
        """A small picture like no other, of a class."""
        self._made += 1
        pixels = self.rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, ["PNG", "BMP", "WEBP"][self._made % 3], **({"lossless": True}))
        self.classes[out.getvalue()] = label
        return out.getvalue()

    def broken(self) -> bytes:
        """A file that is no usable picture: empty, text, cut, or too small."""
        tiny = io.BytesIO()
        Image.new("RGB", (2, 2)).save(tiny, "PNG")
        return [b"", b"no picture", self.image("")[:40], tiny.getvalue()][int(self.rng.integers(4))]

    def some(self, most: int = 3) -> range:
        return range(int(self.rng.integers(most + 1)))

    def label(self) -> str:
        return NAMES[int(self.rng.integers(len(NAMES)))]


def folder(case: Case) -> tuple[Path, dict[str, Any]]:
    def put(path: str, data: bytes) -> None:
        (case.root / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        (case.root / "src" / path).write_bytes(data)
        case.planted += 1

    for i in range(6 + len(case.some())):
        name = case.label()
        put(f"{name}/{i}.PNG", case.image(name))
    for i in case.some():
        put(f"cat/bad{i}.jpg", case.broken())
    for i in case.some():
        put(f"cat/{['.hid.jpg', 'notes.txt', 'README', '._0.jpg', '.deep/x.png'][i]}", b"x")
    for i in case.some(1):
        put(f"stray{i}.png", case.image(""))
    if case.some(1):
        (case.root / "src" / "cat").mkdir(exist_ok=True)
        (case.root / "src" / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
        case.planted += 1
    if case.some(1):
        (case.root / "far").mkdir()
        (case.root / "far" / "l.png").write_bytes(case.image("linked"))
        (case.root / "src" / "linked").symlink_to("../far")
        (case.root / "far" / "up").symlink_to("../src")
        case.planted += 1
    return case.root / "src", {}


def table(case: Case, kind: str) -> tuple[Path, dict[str, Any]]:
    rows, number = [["path", "y", "words"]], bool(case.some(1))
    for i in range(6 + len(case.some())):
        label = str(i % 3) if number else case.label()
        (case.root / f"{i}.png").write_bytes(case.image(label))
        rows.append([f"{i}.png", f"{label}.0" if number and i % 2 else label, "a, b\tc" if kind == "csv" else 'say "x'])
    for i in case.some():
        (case.root / f"bad{i}.png").write_bytes(case.broken())
        rows.append([[f"bad{i}.png", "", f"gone{i}.png"][int(case.rng.integers(3))], "0", ""])
    for i in case.some():
        (case.root / f"none{i}.png").write_bytes(case.image(""))
        rows.append([f"none{i}.png", ["", "-1", "nan"][i] if number else "", ""])
    case.planted = len(rows) - 1
    path = case.root / f"t.{kind}"
    if kind == "csv":
        with path.open("w", encoding=["utf-8", "utf-8-sig", "utf-16"][int(case.rng.integers(3))], newline="") as file:
            csv.writer(file, delimiter=",;"[int(case.rng.integers(2))]).writerows(rows)
    else:
        path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
    return path, {"label": "y", "caption": "words"}


def listing(case: Case) -> tuple[Path, dict[str, Any]]:
    lines = []
    for i in range(6):
        label = case.label()
        (case.root / label).mkdir(exist_ok=True)
        (case.root / label / f"{i}.png").write_bytes(case.image(label))
        lines.append(f"./{label}/{i}.png")
    lines += [f"gone/{i}.png" for i in case.some()]
    for i in case.some():
        (case.root / f"loose{i}.png").write_bytes(case.image(""))
        lines.append(f"loose{i}.png")
    case.planted = len(lines)
    (case.root / "list.txt").write_text("# a comment\n\n" + "\r\n".join(lines) + "\n")
    return case.root / "list.txt", {"label": "parent"}


def parquet(case: Case) -> tuple[Path, dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(6 + len(case.some())):
        label = i % 3
        data = case.image("abc"[label])
        if i % 3 == 1:
            (case.root / f"{i}.png").write_bytes(data)
        rows.append({"image": {"bytes": None if i % 3 == 1 else data, "path": f"{i}.png"}, "y": label})
    bad = [{"bytes": None, "path": p} for p in (None, "gone.png", "../up.png", "https://x/y.png")]
    rows += [{"image": bad[int(case.rng.integers(4))], "y": 0} for _ in case.some()]
    rows += [{"image": {"bytes": case.broken(), "path": None}, "y": 0} for _ in case.some()]
    rows += [{"image": {"bytes": case.image(""), "path": None}, "y": (-1, None, -1)[i]} for i in case.some()]
    case.planted = len(rows)
    features = {"y": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    made = pa.Table.from_pylist(rows).replace_schema_metadata(about)
    pq.write_table(made, case.root / "x.parquet", row_group_size=int(case.rng.integers(1, 9)))
    return case.root / "x.parquet", {"label": "y"}


def tars(case: Case) -> tuple[Path, dict[str, Any]]:
    members: list[tuple[str, bytes]] = []
    for i in range(6 + len(case.some())):
        label = "abc"[i % 3]
        stem = [f"./{label}/{i}", f"{i}.v1", f"d/{i:04d}", f"._x/{i}"][min(i % 5, 2)]
        own = [(f"{stem}.jpg", case.image(label)), (f"{stem}.cls", label.encode())]
        members += own + ([(f"{stem}.txt", b"words")] if i % 2 else [])
    members += [(f"bad{i}.png", case.broken()) for i in case.some()] + [("bad0.cls", b"a"), ("bad0.json", b"{}")]
    members += [(f"loose{i}.png", case.image("")) for i in case.some()]
    members += [([f"._m{i}.jpg", f"only{i}.txt", f"x{i}.pickle"][i], b"x") for i in case.some()]
    case.planted = len(members)
    if case.some(1):
        order = case.rng.permutation(len(members)).tolist()
        members = [members[i] for i in order]
    halves = [members[: len(members) // 2], members[len(members) // 2 :]] if case.some(1) else [members]
    with (case.root / "x.tar").open("wb") as file:  # one end marker after the other, as `cat` leaves them
        for half in halves:
            with tarfile.open(fileobj=file, mode="w", format=int(case.rng.integers(3))) as tar:
                for name, data in half:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return case.root, {"kind": "tars"}


def zips(case: Case) -> tuple[Path, dict[str, Any]]:
    with zipfile.ZipFile(case.root / "x.zip", "w") as file:
        for i in range(6):
            label = case.label()
            file.writestr(f"./{label}/{i}.PNG", case.image(label))
        for i in case.some():
            file.writestr(f"cat/bad{i}.png", case.broken())
        for i in case.some(4):
            file.writestr(["__MACOSX/c/._0.jpg", "c/.DS_Store", "notes", "c/Thumbs.db"][i], b"x")
        for i in case.some(1):
            file.writestr(f"loose{i}.png", case.image(""))
        case.planted = len(file.namelist())
    return case.root, {"label": "parent"}


KINDS = [folder, lambda c: table(c, "csv"), lambda c: table(c, "tsv"), listing, parquet, tars, zips]


def members_of(manifest: Manifest) -> list[tuple[bytes, str, dict[str, int]]]:
    """Of every sample its image, the name of its class and how many members it has by extension."""
    found = []
    for shard in manifest.shards:
        data = (manifest.root / shard.name).read_bytes()
        for entry in manifests.read_index(manifest.root / shard.name):
            at, size = manifests.image_member(entry) or (0, 0)
            cls = [data[a : a + n] for ext, (a, n) in entry.members.items() if ext == "cls"]
            label = manifest.classes[int(cls[0])] if cls else ""
            found.append((data[at : at + size], label, dict.fromkeys(entry.members, 1)))
    return found


def check(seed: int, root: Path) -> None:
    """Write a generated source and compare what is used and what is counted with what was planted."""
    case = Case(seed, root / f"case{seed}")
    source, options = KINDS[seed % len(KINDS)](case)
    recipe = Recipe(samples_per_shard=4, drop_duplicates=seed % 11 == 0, seed=seed)
    [manifest] = write_source(str(source), root / f"set{seed}", SourceOptions(**options), recipe).values()
    left, samples = LeftOut(manifest.left_out), members_of(manifest)
    used = len(samples)
    if options.get("kind") == "tars":
        used += sum(len(members) - 1 for _, _, members in samples)
    assert len(samples) == manifest.samples == sum(manifest.formats.values())
    assert used + left.total("images", "files", "members", "rows") == case.planted, left.table()
    for data, label, _ in samples:
        assert case.classes[data] == label
    good = [data for data, label in case.classes.items() if label]
    assert len({data for data, _, _ in samples} & set(good)) == len(good), "a good image of a class is not in the set"
    assert bool(left.warning(manifest.samples)) == (left.unasked().total("images", "rows") > 0)  # sets are under 100


@pytest.mark.parametrize("part", range(6))
def test_every_file_is_used_or_counted(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # durability has tests of its own
    for seed in range(part, FAST, 6):
        check(seed, tmp_path)


@pytest.mark.slow
def test_every_file_of_500_sources_is_used_or_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for seed in range(FAST, ALL):
        check(seed, tmp_path)
