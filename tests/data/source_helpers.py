"""Sources of every kind, and what the shard set made of one holds: shared by the tests of data/sources."""

import csv
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esvit_scale import cli
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.shard_verify import verify
from esvit_scale.data.shard_writer import write_source
from esvit_scale.data.sources import SourceOptions, open_source
from tests.data.conftest import encoded, picture

Capture = pytest.CaptureFixture[str]
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


def classes(root: Path, names: list[str], n: int = 3) -> Path:
    """Class folders of n small pictures each."""
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            (root / name / f"{i}.png").write_bytes(encoded(picture(100 * c + i)))
    return root


def run_create(*arguments: object) -> int:
    return cli.main(["shards", "create", *map(str, arguments), "--workers", "1"])


def counts(manifest: Manifest) -> dict[tuple[str, str], int]:
    return {(row["what"], row["why"]): row["count"] for row in manifest.left_out}


def left(where: Path, **options: str) -> dict[tuple[str, str], tuple[int, str]]:
    """What is left out of all splits of a source: how many, and the first."""
    rows = [
        row
        for s in open_source(str(where), SourceOptions(**options)).values()
        for row in s.left_out.rows()  # type: ignore[arg-type]
    ]
    return {(row["what"], row["why"]): (row["count"], row["first"]) for row in rows}


def parquet(path: Path, columns: dict[str, object], names: list[str] | None = None) -> Path:
    made = pa.table(columns)
    if names:
        about = {"info": {"features": {"y": {"names": names, "_type": "ClassLabel"}}}}
        made = made.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(made, path, row_group_size=3)
    return path


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
