"""Access to parquet files with pyarrow (extra `parquet`): types of columns, and rows read one batch at a time."""

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
    """Return the module pyarrow, with its parquet part imported. Raises UserError when it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet files need pyarrow: pip install 'esvit-scale[parquet]', or pip install pyarrow"
        ) from None
    return pyarrow


def open_file(path: Path) -> Any:
    """Open a parquet file so that its columns are streamed. Raises UserError when it cannot be read.

    Without pre_buffer=False, pyarrow would hold a row group's whole column in memory, whatever the size of the batch.
    """
    arrow = pyarrow()
    try:
        file = arrow.parquet.ParquetFile(os.fspath(path), buffer_size=STREAM, pre_buffer=False)
        _ = file.schema_arrow.names  # raises an error for names that are not text
        return file
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {one_line(error)}") from None


def rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield each row as a dict with the values of the given columns. Raises UserError when the file cannot be read."""
    try:
        for batch in open_file(path).iter_batches(BATCH, columns=list(columns), use_threads=False):
            yield from batch.to_pylist()
    except (OSError, ValueError, pyarrow().ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {one_line(error)}") from None


def plain(kind: Any) -> Any:
    """Return the Arrow type of the values themselves: the type without dictionary encoding and extension types."""
    while True:
        if isinstance(kind, pyarrow().BaseExtensionType):
            kind = kind.storage_type
        elif pyarrow().types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def kind_of(kind: Any) -> str:
    """Return the kind of an Arrow type: BYTES, TEXT, STRUCT, NUMBERS (bytes as a list of numbers) or OTHER."""
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
    """Map the name of each field of a struct type to the kind of its values (`kind_of`)."""
    kind = plain(kind)
    return {kind.field(at).name: kind_of(kind.field(at).type) for at in range(kind.num_fields)}


def is_label(kind: Any) -> bool:
    """Return whether a column of this Arrow type can hold labels: single values per row, not lists or structs."""
    types, kind = pyarrow().types, plain(kind)
    return not types.is_nested(kind)


def class_names(path: Path, column: str) -> tuple[str, ...] | None:
    """Return the class names of a Hugging Face ClassLabel column from the schema's metadata; None when there are none.

    Such a column holds integers, or floats if pandas wrote it.
    """
    schema = open_file(path).schema_arrow
    types, kind = pyarrow().types, plain(schema.field(column).type)
    if not (types.is_integer(kind) or types.is_floating(kind)):
        return None
    names = _class_labels(schema).get(column)
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        return None
    return tuple(map(str, names))


def class_label_columns(path: Path) -> list[str]:
    """Return the names of the columns that Hugging Face's metadata in the schema declare as ClassLabel."""
    return list(_class_labels(open_file(path).schema_arrow))


def _class_labels(schema: Any) -> dict[str, Any]:
    """Map each ClassLabel column to its class names as the schema's Hugging Face metadata give them, unchecked."""
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
    """Return a label value as text, as `Labels.append` takes it; None for null and NaN."""
    if value is None or value != value:  # NaN
        return None
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def one_line(error: Exception) -> str:
    """Return an error's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def _is(types: Any, kind: Any, *names: str) -> bool:
    """Return whether an Arrow type is one of those named, such as `binary` (pyarrow's `is_binary`); names that an older
    pyarrow does not know (the views) are skipped."""
    return any(check(kind) for name in names if (check := getattr(types, f"is_{name}", None)))
