"""CSV and TSV files with a column of image paths, and columns of labels and captions by option."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from esvit_scale.data.sources.listing import PathSource
from esvit_scale.errors import UserError, nearest

IMAGE_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
NO_LABEL = ("", "none")


class Columns:
    """Which columns of a table mean what.

    Raises:
        UserError: the table has no such column; names the nearest.
    """

    def __init__(
        self, where: str, names: Sequence[str], image: str | None, label: str | None, caption: str | None
    ) -> None:
        self._where, self._names = where, list(names)
        found = image or next((name for name in IMAGE_COLUMNS if name in self._names), None)
        if found is None:
            raise UserError(
                f"{where}: none of its columns ({', '.join(self._names[:12])}) is named like a path; "
                "say which it is with --image-column"
            )
        self.image = self._at(found, "--image-column")
        self.label = self._at(label, "--label") if label and label != "none" else None
        self.caption = self._at(caption, "--caption") if caption else None

    def _at(self, name: str, option: str) -> int:
        if name not in self._names:
            raise UserError(f"{self._where}: {option} {name}: no such column{nearest(name, self._names)}")
        return self._names.index(name)


def table_source(
    path: Path,
    separator: str,
    root: Path | None,
    image: str | None,
    label: str | None,
    caption: str | None,
    classes: Sequence[str] | None,
) -> PathSource:
    """The first row names the columns; relative paths start at `root`, by default the table's folder.

    Raises:
        UserError: cannot be read, no header, no such column, a row with too few columns, no rows.
    """
    csv.field_size_limit(1 << 20)
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, delimiter=separator)
            header = next(rows, [])
            if not header:
                raise UserError(f"{path}: empty; its first row names the columns")
            columns = Columns(str(path), [name.strip() for name in header], image, label, caption)
            source = PathSource(_rows(path, rows, columns), root if root is not None else path.parent, classes)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"{path}: not a readable table: {error}") from None
    if not len(source):
        raise UserError(f"{path}: no rows below its header")
    return source


def _rows(path: Path, rows: Iterator[list[str]], columns: Columns) -> Iterator[list[str | None]]:
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            image = row[columns.image]
            label = None if columns.label is None else row[columns.label]
            caption = None if columns.caption is None else row[columns.caption]
        except IndexError:
            raise UserError(
                f"{path}: row {number} has {len(row)} columns, too few; is it cut off or quoted wrongly?"
            ) from None
        if not image or "\0" in image:
            raise UserError(f"{path}: row {number} names no image file")
        yield [image, label, caption]
