"""Parquet files as a source, with a column of image paths or of image files (bytes, or Hugging Face's {bytes,
path})."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esvit_scale import store_urls
from esvit_scale.data.decode import BadImage
from esvit_scale.data.image_folder import SPLIT, read_file
from esvit_scale.data.left_out import EMPTY, NO_PATH, ROWS, UNREADABLE, LeftOut
from esvit_scale.data.remote import url_files
from esvit_scale.data.sources import arrow
from esvit_scale.data.sources.base import Item, Labels, Source, labelled
from esvit_scale.data.sources.listing import PathSource
from esvit_scale.data.sources.table import TableColumns
from esvit_scale.errors import UserError

BATCH_BYTES = 16_000_000  # bytes of images in memory at a time, approximately
MOST_ROWS = 1024  # rows of a batch


class Chosen(NamedTuple):
    """The names of the columns that are read."""

    image: str
    label: str | None
    caption: str | None


def parquet_source(
    paths: Sequence[Path],
    root: Path | str | None,
    image: str | None,
    label: str | None,
    caption: str | None,
    classes: Sequence[str] | None,
) -> Source:
    """Return the rows of one or more parquet files as a source, in the order of `paths`.

    Args:
        root: folder at which relative paths start; None: the first file's folder.

    Raises:
        UserError: pyarrow is missing, a file cannot be read, a column is missing or of another type, or there are no
            rows.
    """
    first = arrow.open_file(paths[0])
    names = first.schema_arrow.names
    columns = TableColumns(str(paths[0]), names, image, label, caption)
    more = (names[i] if i is not None else None for i in (columns.label, columns.caption))
    chosen = Chosen(names[columns.image], *more)
    _check_files(paths, chosen)
    start = root if root is not None else paths[0].parent
    kind = first.schema_arrow.field(columns.image).type
    if _holds_images(kind):
        source: Source = BytesSource(paths, start, chosen, classes)
    elif arrow.kind_of(kind) == arrow.TEXT or (
        arrow.kind_of(kind) == arrow.STRUCT and arrow.fields(kind).get("path") == arrow.TEXT
    ):
        left = LeftOut()
        named = _given(paths, chosen, classes)
        source = PathSource(_path_rows(paths, chosen, left), start, named, by_number=named is not classes)
        source.left_out = left
        if not len(source):
            raise UserError(f"{paths[0]}: {left.short()}")
    else:
        several = "; for several images per row, write a row for each" if "list<" in str(kind) else ""
        raise UserError(
            f"{paths[0]}: column {chosen.image} holds {kind}, but paths (text) or image files (binary) are needed{several}"
        )
    others = [name for name in arrow.class_label_columns(paths[0]) if name in names]
    source.notes += filter(None, [columns.label_unused(label, others)])
    splits = sorted({found[1].lower() for path in paths if (found := SPLIT.match(path.name))})
    if len(splits) > 1:
        source.notes.append(
            f"{paths[0].parent}: its files belong to {' and '.join(splits)}, which all go into one set; to avoid this, give the "
            "files of one split"
        )
    return source


def _check_files(paths: Sequence[Path], chosen: Chosen) -> None:
    """Raise UserError if a file lacks a chosen column or has a label column of lists or structs, or if no file has
    rows."""
    total = 0
    for path in paths:
        file = arrow.open_file(path)
        schema = file.schema_arrow
        total += file.metadata.num_rows
        if missing := [name for name in chosen if name and name not in schema.names]:
            raise UserError(f"{path}: has no column {missing[0]}, but {paths[0].name} has one")
        if chosen.label and not arrow.is_label(kind := schema.field(chosen.label).type):
            raise UserError(
                f"{path}: column {chosen.label} holds {kind}, but one label (a number or text) per row is needed"
            )
    if not total:
        raise UserError(f"{paths[0]}: has no rows")


def _holds_images(kind: Any) -> bool:
    if arrow.kind_of(kind) == arrow.STRUCT:
        return arrow.fields(kind).get("bytes") in (arrow.BYTES, arrow.NUMBERS)
    return arrow.kind_of(kind) in (arrow.BYTES, arrow.NUMBERS)


def _given(paths: Sequence[Path], chosen: Chosen, classes: Sequence[str] | None) -> Sequence[str] | None:
    """Return `classes` if given, else the label column's class names from the files' metadata, or None. Raises
    UserError when files have different ones."""
    if classes is not None or chosen.label is None:
        return classes
    found = {arrow.class_names(path, chosen.label): path for path in paths}
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(
            f"{one.name} and {other.name} have different class names for column {chosen.label}; give --classes FILE"
        )
    return next(iter(found))


class BytesSource(Source):
    """A source of image files stored in a column. Its blocks are row groups, each read from front to back in batches.

    The image of a row whose bytes are null is read from the row's path.
    """

    def __init__(self, paths: Sequence[Path], start: Path | str, chosen: Chosen, classes: Sequence[str] | None) -> None:
        super().__init__()
        self.root = paths[0].parent
        self._paths, self._start, self._chosen = list(paths), start, chosen
        self._groups: list[tuple[int, int]] = []  # (file, row group) of every block
        sizes: list[int] = []
        for number, path in enumerate(paths):
            meta = arrow.open_file(path).metadata
            rows = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
            self._groups += [(number, g) for g, n in enumerate(rows) if n]
            sizes += [n for n in rows if n]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.blocks = self._starts[:-1]
        self._read_labels(classes)
        stats = [(str(p.name), p.stat().st_size) for p in paths]
        kind = arrow.open_file(paths[0]).schema_arrow.field(chosen.image).type
        field = f"{chosen.image}.bytes" if arrow.kind_of(kind) == arrow.STRUCT else chosen.image
        self._digest = repr((stats, field, chosen.label, chosen.caption, self.classes)).encode()
        self._stream: _Stream | None = None

    def _read_labels(self, classes: Sequence[str] | None) -> None:
        labels, column = Labels(), self._chosen.label
        named = _given(self._paths, self._chosen, classes)
        if column is None:
            labels.extend_without(len(self))
        else:
            for path in self._paths:
                for row in arrow.rows(path, [column]):
                    labels.append(arrow.label_text(row[column]))
        by_number = named is not classes  # with class names from the file's schema, labels are class numbers
        self.classes, self._labels = labels.finish(named, by_number)
        self.notes += labels.notes
        if len(self._labels) != len(self):
            raise UserError(
                f"{self._paths[0] if len(self._paths) == 1 else self.root}: damaged: its index says {len(self)} rows, but "
                f"{len(self._labels)} labels were read"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        """Return the file's name without ending, the row group and the row of sample i: `train/0002-000017`."""
        block = self._block(i)
        file, group = self._groups[block]
        stem = self._paths[file].name.rpartition(".")[0]
        return f"{stem}/{group:04d}-{i - int(self._starts[block]):06d}"

    def read(self, i: int) -> Item:
        """Read the row of a sample. Raises BadImage or OSError."""
        block = self._block(i)
        row = i - int(self._starts[block])
        image, caption = self._row(block, row)
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if data is None:
            data = self._file(path)
        extras = {} if caption is None else {"txt": str(caption).encode("utf-8", "backslashreplace")}
        return Item(bytes(data), labelled(self, self._labels, i), extras)

    def size(self, i: int) -> int:
        """Return 0: sizes are known only by reading the column."""
        return 0

    def fingerprint(self) -> bytes:
        """Return the files' names and sizes, the columns and the classes."""
        return self._digest

    def _block(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _row(self, block: int, row: int) -> tuple[Any, Any]:
        """Return (image, caption) of a row; the row group is read again from its front if it is past the row."""
        file, group = self._groups[block]
        try:
            if self._stream is None or not self._stream.reaches(block, row):
                self._stream = None  # frees its buffers before the next stream takes its own
                self._stream = _Stream(self._paths[file], block, group, self._chosen)
            return self._stream.row(row)
        except (OSError, ValueError, IndexError, StopIteration, arrow.pyarrow().ArrowException) as error:
            self._stream = None
            raise BadImage(f"its row cannot be read: {arrow.one_line(error) or 'the row group is cut'}") from None

    def _file(self, path: str | None) -> bytes:
        """Read the image file that a row names instead of holding its bytes. Raises BadImage or OSError."""
        if not path:
            raise BadImage("neither bytes nor a path in this row", EMPTY)
        if "://" in path or "\0" in path:
            raise BadImage(f"no bytes in this row, and its path is no file's: {path[:100]!r}", UNREADABLE)
        inside = os.path.normpath(path)
        if inside == ".." or inside.startswith("../"):
            raise BadImage(f"no bytes in this row, and its path leads out of {self._start}: {path[:100]}", UNREADABLE)
        if isinstance(self._start, str):
            return url_files.read(store_urls.join(self._start, inside))
        return read_file(self._start / inside)


class _Stream:
    """The rows of one row group from front to back, with one batch in memory, for use in the process that made it."""

    def __init__(self, path: Path, block: int, group: int, chosen: Chosen) -> None:
        self._chosen, self._at = chosen, (os.getpid(), block)
        file = arrow.open_file(path)
        self._batches = file.iter_batches(
            _batch_rows(file.metadata.row_group(group), chosen.image),
            row_groups=[group],
            columns=[*_leaves(file, chosen.image), *([chosen.caption] if chosen.caption else [])],
            use_threads=False,
        )
        self._first, self._batch = 0, next(self._batches)

    def reaches(self, block: int, row: int) -> bool:
        """Return whether a row can still be read: it is of this row group and does not lie before the current batch."""
        return self._at == (os.getpid(), block) and row >= self._first

    def row(self, row: int) -> tuple[Any, Any]:
        """Return (image, caption) of a row. Raises StopIteration after the last row, and errors of pyarrow."""
        while row >= self._first + len(self._batch):
            self._first += len(self._batch)
            self._batch = next(self._batches)
        at, caption = row - self._first, self._chosen.caption
        text = self._batch.column(caption)[at].as_py() if caption else None
        return self._batch.column(self._chosen.image)[at].as_py(), text


def _leaves(file: Any, image: str) -> list[str]:
    kind = file.schema_arrow.field(image).type
    if arrow.kind_of(kind) != arrow.STRUCT:
        return [image]
    return [f"{image}.bytes", *([f"{image}.path"] if arrow.fields(kind).get("path") == arrow.TEXT else [])]


def _batch_rows(group: Any, image: str) -> int:
    """Return how many rows hold BATCH_BYTES of images on average, between 1 and MOST_ROWS."""
    columns = [group.column(at) for at in range(group.num_columns)]
    own = [c.total_uncompressed_size for c in columns if (c.path_in_schema + ".").startswith(f"{image}.")]
    mean = max(sum(own) // max(group.num_rows, 1), 1)
    return int(min(max(BATCH_BYTES // mean, 1), MOST_ROWS))


def _path_rows(paths: Sequence[Path], chosen: Chosen, left: LeftOut) -> Iterator[list[str | None]]:
    """Yield [path, label, caption] of every row that names an image, and count the other rows in `left`."""
    for file in paths:
        for number, row in enumerate(arrow.rows(file, [c for c in chosen if c]), 1):
            path, label, words = (row[c] if c else None for c in chosen)
            path = path.get("path") if isinstance(path, dict) else path
            if path:
                yield [path, arrow.label_text(label), None if words is None else str(words)]
            else:
                left.add(ROWS, NO_PATH, f"{file.name}: row {number}")
