"""MDS data sets as a source: one that mosaicml-streaming 0.13.0 wrote (mds_fixture.py), and the library itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from esvit_scale.data.decode import decode
from esvit_scale.data.image_folder import printable
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import UserError
from tests.data import mds_fixture
from tests.data.source_helpers import contents, counts, write


@pytest.fixture
def mds(tmp_path: Path) -> Path:
    return mds_fixture.unpack(tmp_path / "mds")


def pixels_of(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))


@pytest.mark.parametrize("column", ["picture", "pixels"])
def test_images_labels_and_captions_are_those_that_were_written(column: str, mds: Path, tmp_path: Path) -> None:
    made = write(mds, tmp_path / "set", image_column=column, label="kind", caption="words")
    assert made.classes == ("tall", "wide")
    found = contents(made)
    assert len(found) == 7
    by_caption = {caption: (pixels_of(data), label) for data, (label, caption) in found.items()}
    for row in mds_fixture.rows():
        image, label = by_caption[row["words"]]
        assert np.array_equal(image, np.asarray(row["picture"]))
        assert label == row["kind"]


def test_source_order_numbers_and_what_is_not_used(mds: Path, tmp_path: Path) -> None:
    made = write(
        mds, tmp_path / "set", Recipe(samples_per_shard=99, shuffle=False), image_column="picture", label="number"
    )
    reader = ShardReader(made)
    assert [reader.label(0, reader.entry(0, i)) for i in range(7)] == [i % 3 for i in range(7)]
    [source] = open_source(str(mds), SourceOptions(image_column="picture")).values()
    assert len(source) == 7
    assert source.classes == ()
    assert source.name(6).startswith("shard.0000")
    assert all(source.size(i) > 50 for i in range(7))


def test_damaged_samples_are_quarantined(mds: Path, tmp_path: Path) -> None:
    shard = mds / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    first, second, third = np.frombuffer(data[4:16], np.uint32)
    at = data.index(b"IHDR", first)
    data[at : at + 4] = b"XXXX"  # the first picture
    data[second : second + 4] = b"\xff\xff\xff\x7f"  # the size of a value of the second sample
    shard.write_bytes(data)
    assert third > second
    made = write(mds, tmp_path / "set", image_column="picture")
    assert made.samples == 5
    assert sum(counts(made).values()) == 2
    reasons = (tmp_path / "set" / "quarantine.jsonl").read_text()
    assert "the sizes of its columns do not fit" in reasons
    assert printable("shard.00000/000000") in reasons


def test_what_cannot_be_read_is_an_error_that_says_why(mds: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: str) -> None:
        with pytest.raises(UserError, match=match):
            open_source(str(mds), SourceOptions(**options))  # type: ignore[arg-type]

    refused(r"name the column of images with --image-column; there are kind \(str\), number \(int\), picture \(png\)")
    refused(r"column words holds str, but jpeg, png, bytes, pil", image_column="words")
    refused(r"--label kin: no such column; did you mean kind|--label kin", image_column="picture", label="kin")
    refused(r"column pixels holds pil, but", image_column="picture", label="pixels")
    index = json.loads((mds / "index.json").read_text())
    (mds / "shard.00000.mds").rename(mds / "shard.00000.mds.zstd")
    index["shards"][0]["zip_data"] = {"basename": "shard.00000.mds.zstd", "bytes": 1, "hashes": {}}
    index["shards"][0]["compression"] = "zstd"
    (mds / "index.json").write_text(json.dumps(index))
    refused(r"shard\.00000\.mds\.zstd: is compressed \(zstd\)", image_column="picture")
    (mds / "shard.00000.mds.zstd").unlink()
    refused(r"shard\.00000\.mds: not there; the index lists it", image_column="picture")
    (mds / "shard.00000.mds").write_bytes(b"short")
    refused(r"shard\.00000\.mds: 5 bytes; the index says \d+", image_column="picture")
    index["shards"][0]["raw_data"]["basename"] = "../x.mds"
    (mds / "index.json").write_text(json.dumps(index))
    refused("does not lie below it", image_column="picture")
    (tmp_path / "both" / "train").mkdir(parents=True)
    (tmp_path / "both" / "val").mkdir()
    shutil.copytree(mds_fixture.unpack(tmp_path / "whole"), tmp_path / "both" / "train", dirs_exist_ok=True)
    with pytest.raises(UserError, match="give one of them, such as"):
        open_source(str(tmp_path / "both"), SourceOptions())


@pytest.mark.slow
def test_library_writes_what_is_committed(mds: Path, tmp_path: Path) -> None:
    pytest.importorskip(
        "streaming", reason="mosaicml-streaming is not installed (pip install mosaicml-streaming==0.13.0)"
    )
    mds_fixture.write(tmp_path / "now")
    names = sorted(path.name for path in mds.iterdir())
    assert sorted(path.name for path in (tmp_path / "now").iterdir()) == names
    shards = [name for name in names if name.endswith(".mds")]
    assert all((tmp_path / "now" / name).read_bytes() == (mds / name).read_bytes() for name in shards)
    mds_fixture.write(tmp_path / "packed", compression="zstd")
    with pytest.raises(UserError, match=r"is compressed \(zstd"):
        open_source(str(tmp_path / "packed"), SourceOptions(image_column="picture"))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("samples", -1, "no room for -1 samples"),
        ("samples", 10**9, "no room for 1000000000 samples"),
        ("samples", "7", "no room for '7' samples"),
        ("column_sizes", ["x"] * 6, "column_sizes"),
        ("column_sizes", [None], "column_sizes"),
        ("column_encodings", [1] * 6, "its columns are no texts"),
        ("raw_data", [], "not the index"),
        ("column_names", None, "not the index"),
    ],
)
def test_index_is_not_trusted(key: str, value: object, match: str, mds: Path) -> None:
    index = json.loads((mds / "index.json").read_text())
    index["shards"][0][key] = value
    (mds / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=match):
        open_source(str(mds), SourceOptions(image_column="picture", label="kind"))


def test_deeply_nested_index_is_an_error(mds: Path) -> None:
    (mds / "index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not the index of an MDS data set"):
        open_source(str(mds), SourceOptions(kind="mds"))
    with pytest.raises(UserError):
        open_source(str(mds), SourceOptions())
