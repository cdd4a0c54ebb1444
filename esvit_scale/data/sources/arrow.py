"""What parquet files hold, by pyarrow (extra `parquet`): how columns are typed, and rows read a batch at a time."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esvit_scale.errors import UserError

BATCH = 4096  # rows of small columns read at a time
STREAM = 1 << 20  # bytes read ahead in a column

BYTES, TEXT, STRUCT, NUMBERS, OTHER = "bytes", "text", "struct", "list of numbers", "other"  # kinds of columns


def pyarrow() -> Any:
    """The module, with what is used of it. Raises UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet files need pyarrow: pip install 'esvit-scale[parquet]', or pip install pyarrow"
        ) from None
    return pyarrow


def open_file(path: Path) -> Any:
    """A ParquetFile that streams its columns: without pre_buffer=False, pyarrow holds a row group's whole column in memory
    whatever the batch. Raises UserError."""
    arrow = pyarrow()
    try:
        file = arrow.parquet.ParquetFile(os.fspath(path), buffer_size=STREAM, pre_buffer=False)
        _ = file.schema_arrow.names  # names that are no text are found here
        return file
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {one_line(error)}") from None


def rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every row's values of some columns. Raises UserError."""
    try:
        for batch in open_file(path).iter_batches(BATCH, columns=list(columns), use_threads=False):
            yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow().ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {one_line(error)}") from None


def plain(kind: Any) -> Any:
    """The type of the values themselves: without dictionary encoding or an extension's name."""
    while True:
        if isinstance(kind, pyarrow().BaseExtensionType):
            kind = kind.storage_type
        elif pyarrow().types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def kind_of(kind: Any) -> str:
    """BYTES, TEXT, STRUCT, NUMBERS (a list of bytes as numbers) or OTHER, of an Arrow type."""
    types, kind = pyarrow().types, plain(kind)
    if _is(types, kind, "binary", "large_binary", "fixed_size_binary", "binary_view"):
        return BYTES
    if _is(types, kind, "string", "large_string", "string_view"):
        return TEXT
    if types.is_struct(kind):
        return STRUCT
    if _is(types, kind, "list", "large_list", "fixed_size_list", "list_view", "large_list_view"):
        return NUMBERS if types.is_uint8(plain(kind.value_type)) else OTHER
    return OTHER


def fields(kind: Any) -> dict[str, str]:
    """The kinds of a struct's fields by name."""
    kind = plain(kind)
    return {kind.field(at).name: kind_of(kind.field(at).type) for at in range(kind.num_fields)}


def is_label(kind: Any) -> bool:
    """Whether a column has one label in a row: numbers, text, true and false, but no lists or structs."""
    types, kind = pyarrow().types, plain(kind)
    return not types.is_nested(kind)


def class_names(path: Path, column: str) -> tuple[str, ...] | None:
    """The names of a Hugging Face ClassLabel column of numbers (floats where it went through pandas), which the schema's
    metadata hold; None without."""
    schema = open_file(path).schema_arrow
    types, kind = pyarrow().types, plain(schema.field(column).type)
    if not (types.is_integer(kind) or types.is_floating(kind)):
        return None
    names = _class_labels(schema).get(column)
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        return None
    return tuple(map(str, names))


def class_label_columns(path: Path) -> list[str]:
    """The columns that Hugging Face's metadata in the schema call ClassLabel."""
    return list(_class_labels(open_file(path).schema_arrow))


def _class_labels(schema: Any) -> dict[str, Any]:
    """What should be the names of each ClassLabel column, unchecked."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"].items()
    except (KeyError, TypeError, ValueError, RecursionError, AttributeError):
        return {}
    return {
        name: about.get("names")
        for name, about in features
        if isinstance(about, dict) and about.get("_type") == "ClassLabel"
    }


def label_text(value: Any) -> str | None:
    """A label as the text that other sources would have; None for null, NaN and no value."""
    if value is None or value != value:  # NaN
        return None
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _is(types: Any, kind: Any, *names: str) -> bool:
    """Whether a type is one of those named; an older pyarrow does not know the views."""
    return any(check(kind) for name in names if (check := getattr(types, f"is_{name}", None)))
