"""Parquet files with a column of image paths or of image bytes (plain, or Hugging Face's {bytes, path}).

pyarrow reads them; it comes with the extra `parquet`.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esvit_scale.data.decode import BadImage
from esvit_scale.data.sources.base import Item, Labels, Source, labelled
from esvit_scale.data.sources.listing import PathSource
from esvit_scale.data.sources.table import Columns
from esvit_scale.errors import UserError

CACHED_BYTES = 512_000_000  # of row groups in memory per process, and one at least
BATCH = 4096  # rows of small columns read at a time


def parquet_source(
    paths: Sequence[Path],
    root: Path | None,
    image: str | None,
    label: str | None,
    caption: str | None,
    classes: Sequence[str] | None,
) -> Source:
    """Rows of one or more files, in the order given.

    Raises:
        UserError: pyarrow is missing, a file cannot be read, no such column or one of another type, no rows.
    """
    _pyarrow()
    first = _open(paths[0])
    names = first.schema_arrow.names
    columns = Columns(str(paths[0]), names, image, label, caption)
    chosen = [names[i] if i is not None else None for i in (columns.image, columns.label, columns.caption)]
    for path in paths:
        missing = [name for name in chosen if name and name not in _open(path).schema_arrow.names]
        if missing:
            raise UserError(f"{path}: no column {missing[0]}, which {paths[0].name} has")
    if not sum(_open(path).metadata.num_rows for path in paths):
        raise UserError(f"{paths[0]}: no rows")
    kind = first.schema_arrow.field(columns.image).type
    name = str(chosen[0])
    if _is_bytes(kind):
        return BytesSource(paths, name, name, chosen[1], chosen[2], classes)
    if _is_struct_of_bytes(kind):
        return BytesSource(paths, name, f"{name}.bytes", chosen[1], chosen[2], classes)
    if not _is_text(kind):
        raise UserError(f"{paths[0]}: column {name} holds {kind}; paths (text) or image files (binary) are needed")
    start = root if root is not None else paths[0].parent
    return PathSource(_path_rows(paths, name, chosen[1], chosen[2]), start, classes)


class BytesSource(Source):
    """Image files inside a column. Its blocks are row groups, which can only be read as a whole."""

    def __init__(
        self,
        paths: Sequence[Path],
        image: str,
        field: str,
        label: str | None,
        caption: str | None,
        classes: Sequence[str] | None,
    ) -> None:
        super().__init__()
        self.root = paths[0].parent
        self._paths, self._image, self._field, self._caption = list(paths), image, field, caption
        self._groups: list[tuple[int, int]] = []  # (file, row group) of every block
        sizes: list[int] = []
        for number, path in enumerate(paths):
            meta = _open(path).metadata
            rows = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            self._groups += [(number, g) for g, n in enumerate(rows) if n]
            sizes += [n for n in rows if n]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.blocks = self._starts[:-1]
        labels = Labels()
        if label is None:
            labels.extend_without(len(self))
        else:
            for path in paths:
                for row in _rows(path, [label]):
                    labels.append(None if row[label] is None else str(row[label]))
        self.classes, self._labels = labels.finish(classes)
        if len(self._labels) != len(self):
            raise UserError(
                f"{paths[0] if len(paths) == 1 else self.root}: damaged: {len(self)} rows by its index, "
                f"{len(self._labels)} labels in it"
            )
        stats = [(str(p.name), p.stat().st_size) for p in paths]
        self._digest = repr((stats, field, label, caption, self.classes)).encode()
        self._cache: OrderedDict[int, tuple[Any, Any]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        block = self._block(i)
        file, group = self._groups[block]
        stem = self._paths[file].name.rpartition(".")[0]
        return f"{stem}/{group:04d}-{i - int(self._starts[block]):06d}"

    def read(self, i: int) -> Item:
        block = self._block(i)
        images, captions = self._group(block)
        row = i - int(self._starts[block])
        try:
            data = images[row].as_py()
            text = captions[row].as_py() if captions is not None else None
        except (ValueError, IndexError, _pyarrow().ArrowException) as error:
            raise BadImage(f"its row cannot be read: {_line(error)}") from None
        if data is None:
            raise BadImage("no bytes in this row")
        return Item(data, labelled(self, self._labels, i), {"txt": str(text).encode()} if text else {})

    def size(self, i: int) -> int:
        return 0  # known only by reading the column

    def fingerprint(self) -> bytes:
        return self._digest

    def _block(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _group(self, block: int) -> tuple[Any, Any]:
        """Arrow columns of images and captions (None without)."""
        found = self._cache.get(block)
        if found is None:
            while self._cache and sum(images.nbytes for images, _ in self._cache.values()) > CACHED_BYTES:
                self._cache.popitem(last=False)
            file, group = self._groups[block]
            found = self._cache[block] = self._read_group(self._paths[file], group)
        else:
            self._cache.move_to_end(block)
        return found

    def _read_group(self, path: Path, group: int) -> tuple[Any, Any]:
        wanted = [self._field] + ([self._caption] if self._caption else [])
        try:
            table = _open(path).read_row_group(group, columns=wanted, use_threads=False)
        except (OSError, ValueError, _pyarrow().ArrowException) as error:
            raise BadImage(f"its row group cannot be read: {_line(error)}") from None
        column = table.column(self._image)
        if self._field != self._image:
            column = _pyarrow().compute.struct_field(column, "bytes")
        return column, table.column(self._caption) if self._caption else None


def _path_rows(paths: Sequence[Path], image: str, label: str | None, caption: str | None) -> Iterator[list[str | None]]:
    for path in paths:
        rows = _rows(path, [c for c in (image, label, caption) if c])
        for number, row in enumerate(rows, 1):
            name, text, words = (row[c] if c else None for c in (image, label, caption))
            if not name:
                raise UserError(f"{path}: row {number} names no image file")
            yield [name, None if text is None else str(text), None if words is None else str(words)]


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    try:
        for batch in _open(path).iter_batches(BATCH, columns=list(columns), use_threads=False):
            yield from batch.to_pylist()
    except (OSError, ValueError, _pyarrow().ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {_line(error)}") from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet files need pyarrow: pip install 'esvit-scale[parquet]', or pip install pyarrow"
        ) from None
    return pyarrow


def _open(path: Path) -> Any:
    arrow = _pyarrow()
    try:
        file = arrow.parquet.ParquetFile(os.fspath(path))
        _ = file.schema_arrow.names  # names that are no text are found here
        return file
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file: {_line(error)}") from None


def _is_bytes(kind: Any) -> bool:
    types = _pyarrow().types
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    types = _pyarrow().types
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_struct_of_bytes(kind: Any) -> bool:
    if not _pyarrow().types.is_struct(kind):
        return False
    at = kind.get_field_index("bytes")
    return at >= 0 and _is_bytes(kind.field(at).type)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
