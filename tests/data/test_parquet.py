"""Parquet files with the column types that are found in the wild."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esvit_scale.data import left_out
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.errors import UserError
from tests.data.source_helpers import contents, counts, parquet, write


@pytest.mark.parametrize("numbers", [[1, 0, 2, 0, -1], [1.0, 0.0, 2.0, 0.0, None]])
def test_schema_class_names_and_path_columns_are_read(numbers: list[float], pictures: Path) -> None:
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
    assert "column y is not used; give --label y to use it" in unlabelled.notes[0]
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
def test_wrong_column_types_are_errors(name: str, pictures: Path) -> None:
    files = [(pictures / f"{i}.png").read_bytes() for i in range(4)]
    labels = pa.array([1.0, None, 3.0, float("nan")], pa.float32())
    where = parquet(pictures / "x.parquet", {"image": COLUMNS[name](files), "y": labels})
    manifest = write(where, pictures / "set", label="y")
    assert contents(manifest) == {files[0]: ("1", None), files[2]: ("3", None)}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image": [[b"x"]], "y": [1]}, "for several images per row, write a row for each"),
        ({"image": [b"x"], "y": [[1, 2]]}, r"column y holds list<.*one label"),
        ({"image": [1], "y": [1]}, "column image holds int64"),
    ],
)
def test_unreadable_columns_are_refused(columns: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        open_source(str(parquet(tmp_path / "x.parquet", columns)), SourceOptions(label="y"))


def test_row_groups_are_streamed_with_little_memory(tmp_path: Path) -> None:
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
