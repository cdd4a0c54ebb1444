"""Files with one JSON object per line (metrics.jsonl, quarantine.jsonl).

Reading skips damaged lines, `cut` removes the rows after a step, and appending survives a full disk.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from esvit_scale import files
from esvit_scale.errors import UserError

log = logging.getLogger("esvit_scale")

Row = dict[str, Any]
MAX_LINE = 1 << 20  # bytes; a longer line is not a row


class Line(NamedTuple):
    """One line of a file of rows."""

    end: int  # offset of the next line
    text: bytes  # the row as it was written, with a newline; empty if the line is damaged
    row: Row | None  # None: damaged
    is_intact: bool  # `text` is exactly what the file holds


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, without damaged lines. Return an empty list if there is no file."""
    return [line.row for line in read_lines(path) if line.row is not None]


def read_lines(path: Path) -> Iterator[Line]:
    """Yield every line of a file. A row is a JSON object with an integer "step".

    NULs before a row (a power failure leaves blocks empty) and an unfinished row before it on the same line are
    removed. Blank lines, and an unfinished last line, which a killed process leaves, are skipped and not reported as
    damage.

    Raises:
        UserError: the path is a folder, or must not be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; move it away, or make it a readable file") from None
    with file:
        while (raw := _next_line(file)) is not None:
            row, text = _parse(raw.strip(b"\0 \t\r\n"))
            if row is not None:
                yield Line(file.tell(), text + b"\n", row, text + b"\n" == raw)
            elif raw.endswith(b"\n") and raw.strip(b" \t\r\n"):
                yield Line(file.tell(), b"", None, False)


def cut(path: Path, is_kept: Callable[[Row], bool]) -> None:
    """Remove the rows for which `is_kept` is false, and damaged lines, whose number is logged.

    If only the end of the file is removed, it is truncated in place, which needs no space on the disk.

    Raises:
        UserError: the path is not a file.
        OSError: the remaining rows could not be written.
    """
    kept = damaged = end = 0
    is_prefix = True  # so far the kept lines are the bytes from the start of the file to `end`
    for line in read_lines(path):
        damaged += line.row is None
        if line.row is None or not is_kept(line.row):
            continue
        is_prefix = is_prefix and line.is_intact and line.end == end + len(line.text)
        kept, end = kept + 1, line.end
    if damaged:
        lines = "1 damaged line was" if damaged == 1 else f"{damaged} damaged lines were"
        log.warning("%s: %s left out, %d rows kept", path, lines, kept)
    if not path.exists():
        return
    if is_prefix:
        if path.stat().st_size > end:
            os.truncate(path, end)
        return
    with files.replacing(path) as tmp, tmp.open("wb") as file:
        file.writelines(line.text for line in read_lines(path) if line.row is not None and is_kept(line.row))


def _next_line(file: BinaryIO) -> bytes | None:
    """Return the next line with its newline, and None at the end of the file.

    A line longer than MAX_LINE is returned without its leading NULs. If it is still too long, a damaged line is
    returned.
    """
    line = file.readline(MAX_LINE)
    if len(line) < MAX_LINE or line.endswith(b"\n"):
        return line or None
    is_long = False
    while not line.endswith(b"\n") and (more := file.readline(MAX_LINE)):
        line = (line + more).lstrip(b"\0")
        is_long = is_long or len(line) > MAX_LINE
        line = line[-1:] if is_long else line
    return b"?\n" if is_long else line


def _parse(text: bytes) -> tuple[Row | None, bytes]:
    """Return the row that ends a line, and the row's text; None and an empty text if there is none."""
    for start in dict.fromkeys((0, max(text.rfind(b'{"step"'), 0))):
        try:
            row = json.loads(text[start:])
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row, text[start:]
    return None, b""


class RowFile:
    """A file to which rows are appended. Rows that cannot be written wait in memory until the disk takes them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._end = 0  # offset behind the last whole row
        self._waiting: list[bytes] = []
        self._is_failing = False

    def append(self, row: Row) -> None:
        """Write a row behind those that still wait in memory; if the disk does not take them, this row waits, too."""
        self._waiting.append(json.dumps(row).encode() + b"\n")
        self._write_waiting()

    def close(self) -> None:
        """Close the file. Rows that still cannot be written are lost; their number is logged."""
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            log.error("%s: %d rows could not be written", self._path, len(self._waiting))
        if self._file is not None:
            with suppress(OSError):  # network storage may report here what was logged before
                os.close(self._file)
            self._file = None

    def _write_waiting(self) -> None:
        try:
            self._write(b"".join(self._waiting))
        except OSError as error:
            if not self._is_failing:
                log.warning(
                    "%s: cannot be written: %s; training continues, and new rows wait in memory",
                    *(self._path, error.strerror or error),
                )
            self._is_failing = True
            return
        if self._is_failing:
            log.warning("%s: can be written again; the %d rows that waited are in it", self._path, len(self._waiting))
        self._is_failing = False
        self._waiting.clear()

    def _write(self, data: bytes) -> None:
        """Append all of `data`, or nothing."""
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._end = os.fstat(self._file).st_size
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)
