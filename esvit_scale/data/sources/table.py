"""CSV and TSV files with a column of image paths, and columns of labels and captions by option."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import NO_PATH, ROWS, LeftOut
from esvit_scale.data.sources.base import is_image
from esvit_scale.data.sources.listing import PathSource
from esvit_scale.errors import UserError, nearest

IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
UTF16 = (b"\xff\xfe", b"\xfe\xff")
UTF8_ADVICE = "save the table as UTF-8 (Excel: 'CSV UTF-8'; iconv -f latin1 -t utf-8)"


class Columns:
    """Which columns of a table mean what.

    Raises:
        UserError: the table has no such column, or two of that name; names the nearest.
    """

    def __init__(
        self, where: str, names: Sequence[str], image: str | None, label: str | None, caption: str | None
    ) -> None:
        self._where, self._names = where, list(names)
        found = image or next((name for name in IMAGE_COLUMNS if name in self._names), None)
        if found is None:
            raise UserError(
                f"{where}: none of its columns ({', '.join(map(printable, self._names[:12]))}) is named like a path; "
                "say which it is with --image-column"
            )
        self.image = self._at(found, "--image-column")
        self.label = self._at(label, "--label") if label and label != "none" else None
        self.caption = self._at(caption, "--caption") if caption else None

    def _at(self, name: str, option: str) -> int:
        if name not in self._names:
            raise UserError(f"{self._where}: {option} {name}: no such column{nearest(name, self._names)}")
        if self._names.count(name) > 1:
            places = [str(at) for at, other in enumerate(self._names, 1) if other == name]
            raise UserError(
                f"{self._where}: line 1: columns {' and '.join(places)} are both named {name!r}; rename one of them"
            )
        return self._names.index(name)


class Dialect(NamedTuple):
    """How a table is written."""

    encoding: str
    separator: str
    quoted: bool  # whether a field that begins with a quote ends with one

    def rows(self, path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Each row's first line, counted from 1, and its fields. Raises UserError for a quote that is not closed."""
        if self.quoted:
            reader = csv.reader(lines, delimiter=self.separator, strict=True)
        else:
            reader = csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{path}: line {line}: not a readable row: {error}; is a quote not closed, or inside a field and not "
                    "doubled?"
                ) from None
            if row is None:
                return
            yield line, row


def table_source(
    path: Path,
    separator: str,
    quoted: bool,
    root: Path | None,
    image: str | None,
    label: str | None,
    caption: str | None,
    classes: Sequence[str] | None,
) -> PathSource:
    """Read a table whose first row names the columns; relative paths start at `root`, by default the table's folder.

    Raises:
        UserError: cannot be read, no header, no such column, a row with too few or too many columns, text that is not
            UTF-8, a quote that is not closed, no rows.
    """
    csv.field_size_limit(1 << 20)
    notes: list[str] = []
    left = LeftOut()
    encoding = "UTF-8"
    try:
        dialect = _dialect(path, separator, quoted, notes)
        with path.open(encoding=dialect.encoding, errors="surrogateescape", newline="") as file:
            encoding, rows = dialect.encoding, dialect.rows(path, file)
            header = [name.strip() for name in next(rows, (1, []))[1]]
            if not header:
                raise UserError(f"{path}: empty; its first row names the columns")
            columns = Columns(str(path), header, image, label, caption)
            start = root if root is not None else path.parent
            source = PathSource(_rows(path, rows, dialect, columns, len(header), left), start, classes)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeError as error:
        raise UserError(f"{path}: not text in {encoding}: {error}") from None
    if not len(source):
        raise UserError(f"{path}: no rows below its header{': ' + left.short() if left else ''}")
    source.notes, source.left_out = [*notes, *source.notes], left
    return source


def _dialect(path: Path, separator: str, quoted: bool, notes: list[str]) -> Dialect:
    """How the table is written, from its first bytes: UTF-16 by its byte-order mark, another separator by the header."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    encoding = "utf-16" if start[:2] in UTF16 else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in start:
        raise UserError(f"{path}: not text in UTF-8 (UTF-16 without its mark, or binary); {UTF8_ADVICE}")
    header = start.decode(encoding, "replace").splitlines()[:1]
    if header and separator not in header[0]:
        others = [other for other in SEPARATORS if other in header[0]]
        if len(others) == 1:
            notes.append(f"{path}: line 1: columns are separated by {SEPARATORS[others[0]]}; read so")
            separator = others[0]
    return Dialect(encoding, separator, quoted)


def _rows(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    dialect: Dialect,
    columns: Columns,
    width: int,
    left: LeftOut,
) -> Iterator[list[str | None]]:
    """[path, label, caption] of every row that names an image; the others are counted."""
    for line, row in rows:
        if not row:  # an empty line
            continue
        _check_row(path, line, row, columns, width, dialect)
        image = row[columns.image]
        if image.strip():
            label = None if columns.label is None else row[columns.label]
            yield [image, label, None if columns.caption is None else row[columns.caption]]
        else:
            left.add(ROWS, NO_PATH, f"line {line}")


def _check_row(path: Path, line: int, row: list[str], columns: Columns, width: int, dialect: Dialect) -> None:
    needed = [at for at in (columns.image, columns.label, columns.caption) if at is not None]
    hint = "is it cut off, or quoted wrongly?" if dialect.quoted else "or are its fields quoted? Then add --quoted"
    if max(needed) >= len(row):
        raise UserError(f"{path}: line {line} has {len(row)} columns, too few (the header has {width}); {hint}")
    if any(row[width:]):
        raise UserError(
            f"{path}: line {line} has {len(row)} columns, too many (the header has {width}); does a field that is not "
            f"quoted hold {SEPARATORS.get(dialect.separator, 'separators')}?"
        )
    if "\0" in row[columns.image]:
        raise UserError(f"{path}: line {line} names no image file")
    for at in needed[1:]:
        try:
            row[at].encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path}: line {line}: {printable(row[at][:80])} is not UTF-8 (Latin-1?); {UTF8_ADVICE}"
            ) from None
    for text in row:
        if "\n" in text or "\r" in text:
            _check_lines(path, line, text, columns, width, dialect)


def _check_lines(path: Path, line: int, text: str, columns: Columns, width: int, dialect: Dialect) -> None:
    """A field may hold line breaks, but not lines that are rows themselves: then a quote was not closed."""
    for number, inner in enumerate(text.splitlines()[1:], 1):
        fields = next(csv.reader([inner], delimiter=dialect.separator), [])
        if len(fields) == width and is_image(fields[columns.image]):
            raise UserError(
                f"{path}: line {line}: a quoted field goes on over line {line + number}, which looks like a row of its own; "
                "is a quote not closed, or inside a field and not doubled?"
            )
