"""CSV and TSV files as a source: with a column of image paths, and optional columns of labels and captions."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import NO_PATH, ROWS, LeftOut
from esvit_scale.data.sources.base import is_image
from esvit_scale.data.sources.listing import PathSource
from esvit_scale.data.sources.members import MemberColumns, MemberSource, member_rows
from esvit_scale.errors import UserError, nearest

IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
LABEL_COLUMNS = frozenset(
    [
        "label",
        "labels",
        "target",
        "targets",
        "class",
        "class_id",
        "class_name",
        "category",
        "fine_label",
        "coarse_label",
        "y",
    ]
)
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
UTF16 = (b"\xff\xfe", b"\xfe\xff")
WORKBOOKS = {b"PK\x03\x04": "this is an Excel workbook (zip)", b"\xd0\xcf\x11\xe0": "this is an Excel workbook"}
SEPARATOR_LINE = re.compile(r'"?sep=([^"\w])"?', re.IGNORECASE)  # a first line that tells Excel the separator
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
UTF8_ADVICE = "save the table as UTF-8 (Excel: 'CSV UTF-8'; iconv -f latin1 -t utf-8)"


class TableColumns:
    """The indices of the columns that hold image paths, labels and captions; None for a column that is not used.

    Raises:
        UserError: the table has no such column, or two of that name.
    """

    def __init__(
        self, where: str, names: Sequence[str], image: str | None, label: str | None, caption: str | None
    ) -> None:
        self._where, self._names = where, list(names)
        found = image or next((name for name in IMAGE_COLUMNS if name in self._names), None)
        if found is None:
            raise UserError(
                f"{where}: none of its columns ({', '.join(map(printable, self._names[:12]))}) is named like a path; "
                "name the column of paths with --image-column"
            )
        self.image = self._at(found, "--image-column")
        self.label = self._at(label, "--label") if label and label != "none" else None
        self.caption = self._at(caption, "--caption") if caption else None

    def label_unused(self, label: str | None, others: Iterable[str] = ()) -> str:
        """Return a line for the user if --label is not given although a column seems to hold labels, else "".

        Args:
            label: the value of --label.
            others: columns that hold labels although their names do not say so.
        """
        found = [name for name in self._names if name.strip().lower() in LABEL_COLUMNS or name in others]
        if label is not None or not found:
            return ""
        return (
            f"{self._where}: the set will have no classes, since column {printable(found[0])} is not used; give --label "
            f"{printable(found[0])} to use it, or --label none if no classes are wanted"
        )

    def _at(self, name: str, option: str) -> int:
        return _at(self._where, self._names, name, option)


def _at(where: str, names: Sequence[str], name: str, option: str) -> int:
    """Return the index of a column. Raises UserError if there is none, or two, of that name."""
    if name not in names:
        raise UserError(f"{where}: {option} {name}: no such column{nearest(name, names)}")
    if list(names).count(name) > 1:
        places = [str(at) for at, other in enumerate(names, 1) if other == name]
        raise UserError(f"{where}: line 1: columns {' and '.join(places)} are both named {name!r}; rename one of them")
    return list(names).index(name)


class Dialect(NamedTuple):
    """The format of a table."""

    encoding: str
    separator: str
    quoted: bool  # whether fields may be quoted
    above: int = 0  # number of lines above the header

    def rows(self, path: Path, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of each row's first line, from 1, and its fields. Raises UserError for an unclosed quote."""
        lines = islice(lines, self.above, None)
        if self.quoted:
            reader = csv.reader(lines, delimiter=self.separator, strict=True)
        else:
            reader = csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE)
        while True:
            line = self.above + reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{path}: line {line}: not a readable row: {error}; is a quote not closed, or a quote inside a field not "
                    "doubled?"
                ) from None
            if row is None:
                return
            yield line, row


def table_source(
    path: Path,
    separator: str,
    quoted: bool,
    root: Path | str | None,
    image: str | None,
    label: str | None,
    caption: str | None,
    classes: Sequence[str] | None,
) -> PathSource:
    """Read a table whose first row names the columns, and return it as a source. Relative paths start at `root`, by
    default at the table's folder.

    Raises:
        UserError: the table cannot be read, has no header or no rows, lacks a column, is not UTF-8, or has a row with
            too few or too many columns or an unclosed quote.
    """
    notes: list[str] = []
    left = LeftOut()
    with _opened(path, separator, quoted, notes) as (dialect, header, rows):
        columns = _columns(path, header, dialect, image, label, caption)
        notes += filter(None, [columns.label_unused(label)])
        start = root if root is not None else path.parent
        source = PathSource(_rows(path, rows, dialect, columns, len(header), left, notes), start, classes)
    _finish(path, source, notes, left)
    return source


def member_table(
    path: Path,
    separator: str,
    quoted: bool,
    root: Path | str | None,
    named: Mapping[str, str | None],
    fields: Sequence[str],
    classes: Sequence[str] | None,
) -> MemberSource:
    """Return a table as a source of samples of several members; no row needs an image.

    Args:
        named: the columns of `image`, `audio`, `video`, `label` and `caption`; None for one that is not named: then the
            image's is looked for as in any table, and the others are not used.
        fields: columns that become fields of the sample's .json.

    Raises:
        UserError: as `table_source`.
    """
    notes: list[str] = []
    left = LeftOut()
    with _opened(path, separator, quoted, notes) as (_, header, rows):
        found = {**named, "image": named["image"] or next((name for name in IMAGE_COLUMNS if name in header), None)}
        options = {"image": "--image-column", "audio": "--audio-column", "video": "--video-column"}
        at = {
            kind: _at(str(path), header, name, options.get(kind, f"--{kind}")) if name and name != "none" else None
            for kind, name in found.items()
        }
        columns = MemberColumns(**at, fields={name: _at(str(path), header, name, "--fields") for name in fields})
        used = [number for number in (*at.values(), *columns.fields.values()) if number is not None]
        start = root if root is not None else path.parent
        checked = _whole_rows(path, rows, used, len(header))
        source = MemberSource(member_rows(checked, columns, start, left), start, classes)
    _finish(path, source, notes, left)
    return source


@contextmanager
def _opened(
    path: Path, separator: str, quoted: bool, notes: list[str]
) -> Iterator[tuple[Dialect, list[str], Iterator[tuple[int, list[str]]]]]:
    """Open a table; give its dialect, its header and an iterator over the rows below, which must be read inside.

    Raises:
        UserError: the table cannot be read, is empty, or is not text in its encoding.
    """
    csv.field_size_limit(1 << 20)
    encoding = "UTF-8"
    try:
        dialect = _dialect(path, separator, quoted, notes)
        encoding = dialect.encoding
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            rows = dialect.rows(path, file)
            header = [name.strip() for name in next(rows, (1, []))[1]]
            if not header:
                raise UserError(f"{path}: empty; its first row must name the columns")
            yield dialect, header, rows
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeError as error:
        raise UserError(f"{path}: not text in {encoding}: {error}") from None


def _finish(path: Path, source: PathSource | MemberSource, notes: list[str], left: LeftOut) -> None:
    """Give a table's source its notes and what was left out; raise UserError if it has no rows."""
    if not len(source):
        raise UserError(f"{path}: no usable rows below its header{': ' + left.short() if left else ''}")
    source.notes, source.left_out = [*notes, *source.notes], left


def _whole_rows(
    path: Path, rows: Iterable[tuple[int, list[str]]], used: Sequence[int], width: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not empty. Raises UserError for one that is cut off, too long or not UTF-8."""
    for line, row in rows:
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if max(used, default=0) >= len(row) or any(row[width:]):
            raise UserError(
                f"{path}: line {line} has {len(row)} columns, and the header has {width}; is it cut off or quoted wrongly?"
            )
        for field in (row[at] for at in used):
            if "\0" in field or any("\udc80" <= letter <= "\udcff" for letter in field):
                raise UserError(f"{path}: line {line}: {printable(field[:80])} is not UTF-8 (Latin-1?); {UTF8_ADVICE}")
        yield line, row


def _columns(
    path: Path, header: Sequence[str], dialect: Dialect, image: str | None, label: str | None, caption: str | None
) -> TableColumns:
    """Return the columns of a header. Raises UserError as `TableColumns` does, and for a quoted or not UTF-8 header."""
    if not dialect.quoted:
        for name in header:
            _check_unquoted(path, dialect.above + 1, name)
    try:
        return TableColumns(str(path), header, image, label, caption)
    except UserError:
        if any("\udc80" <= letter <= "\udcff" for name in header for letter in name):
            raise UserError(f"{path}: line 1: the header is not UTF-8 (Latin-1?); {UTF8_ADVICE}") from None
        raise


def _check_unquoted(path: Path, line: int, field: str) -> None:
    """Raise UserError for a field in quotes in a table whose fields are not quoted."""
    field = field.strip()
    if len(field) > 1 and field[0] == field[-1] == '"':
        raise UserError(
            f"{path}: line {line}: {printable(field[:80])} begins and ends with a quote; if the table's fields are quoted, "
            "add --quoted"
        )


def _dialect(path: Path, separator: str, quoted: bool, notes: list[str]) -> Dialect:
    """Detect a table's format from its first bytes. Raises UserError for a file that is not text.

    UTF-16 is detected by its byte-order mark, another separator by the header or by a line `sep=;` above it.
    """
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start[:4] in WORKBOOKS:
        raise UserError(f"{path}: {WORKBOOKS[start[:4]]}; export it as CSV (UTF-8)")
    encoding = "utf-16" if start[:2] in UTF16 else "utf-8-sig"
    if encoding == "utf-8-sig" and b"\0" in start:
        raise UserError(f"{path}: not text in UTF-8 (UTF-16 without its mark, or binary); {UTF8_ADVICE}")
    header = start.decode(encoding, "replace").splitlines()[:1]
    if header and (said := SEPARATOR_LINE.fullmatch(header[0].strip(" "))):
        return Dialect(encoding, said[1], quoted, above=1)
    if header and separator not in header[0]:
        others = [other for other in SEPARATORS if other in header[0]]
        if len(others) == 1:
            notes.append(f"{path}: line 1: columns are separated by {SEPARATORS[others[0]]}, and are read that way")
            separator = others[0]
    return Dialect(encoding, separator, quoted)


def _rows(
    path: Path,
    rows: Iterator[tuple[int, list[str]]],
    dialect: Dialect,
    columns: TableColumns,
    width: int,
    left: LeftOut,
    notes: list[str],
) -> Iterator[list[str | None]]:
    """Yield [path, label, caption] of every row that names an image, and count the other rows in `left`."""
    commas = False
    for line, row in rows:
        if not row or (len(row) == 1 and not row[0].strip()):  # an empty line
            continue
        _check_row(path, line, row, columns, width, dialect)
        image = row[columns.image]
        if image.strip():
            label = None if columns.label is None else row[columns.label]
            if label and dialect.separator == ";" and DECIMAL_COMMA.fullmatch(label.strip()):
                if not commas:
                    notes.append(
                        f"{path}: line {line}: {label.strip()} has a decimal comma; read as {label.replace(',', '.')}"
                    )
                label, commas = label.replace(",", "."), True
            yield [image, label, None if columns.caption is None else row[columns.caption]]
        else:
            left.add(ROWS, NO_PATH, f"line {line}")


def _check_row(path: Path, line: int, row: list[str], columns: TableColumns, width: int, dialect: Dialect) -> None:
    needed = [at for at in (columns.image, columns.label, columns.caption) if at is not None]
    hint = "is it cut off, or quoted wrongly?" if dialect.quoted else "if its fields are quoted, add --quoted"
    if max(needed) >= len(row):
        raise UserError(f"{path}: line {line} has {len(row)} columns, too few (the header has {width}); {hint}")
    if not dialect.quoted:
        for at in (columns.image, columns.label):
            _check_unquoted(path, line, "" if at is None else row[at])
    if any(row[width:]):
        if not dialect.quoted and any(field.startswith('"') for field in row):
            raise UserError(f"{path}: line {line} has {len(row)} columns, too many (the header has {width}); {hint}")
        raise UserError(
            f"{path}: line {line} has {len(row)} columns, too many (the header has {width}); does an unquoted field contain "
            f"{SEPARATORS.get(dialect.separator, 'separators')}?"
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


def _check_lines(path: Path, line: int, text: str, columns: TableColumns, width: int, dialect: Dialect) -> None:
    """Raise UserError for a quoted field whose lines look like rows of the table, because a quote was not closed."""
    for number, inner in enumerate(text.splitlines()[1:], 1):
        fields = next(csv.reader([inner], delimiter=dialect.separator), [])
        if len(fields) == width and is_image(fields[columns.image]):
            raise UserError(
                f"{path}: line {line}: a quoted field continues over line {line + number}, which looks like a row of its own; "
                "is a quote not closed, or a quote inside a field not doubled?"
            )
