"""Files of one JSON object a line (metrics.jsonl, quarantine.jsonl): read past damage, cut at a step, appended to on a
disk that may be full."""

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
MAX_LINE = 1 << 20  # bytes; what is longer is no row of ours


class Line(NamedTuple):
    end: int  # place in the file behind it
    text: bytes  # the row as it was written, with a newline; empty where there is none
    row: Row | None  # None: damaged
    is_intact: bool  # `text` is exactly what the file holds


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; damaged lines are passed over, wherever they are. Empty without a file."""
    return [line.row for line in read_lines(path) if line.row is not None]


def read_lines(path: Path) -> Iterator[Line]:
    """Yield every line of a file. A row has an integer "step".

    NULs before a row (a block that a power failure left empty) and a torn row before it on the same line are dropped
    from it. Blank lines and a last line without a newline that is no whole row, which a killed process leaves, are not
    reported as damage: they are skipped.

    Raises:
        UserError: the path is a folder, or may not be read.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; move it away or set it right") from None
    with file:
        while (raw := _next_line(file)) is not None:
            row, text = _parse(raw.strip(b"\0 \t\r\n"))
            if row is not None:
                yield Line(file.tell(), text + b"\n", row, text + b"\n" == raw)
            elif raw.endswith(b"\n") and raw.strip(b" \t\r\n"):
                yield Line(file.tell(), b"", None, False)


def cut(path: Path, is_kept: Callable[[Row], bool]) -> None:
    """Drop the rows that are not kept, and damaged lines, whose number is logged.

    Where only the end of the file goes it is cut off in place, which needs no room on the disk.

    Raises:
        UserError: the path is no file.
        OSError: the disk does not take the rest.
    """
    kept = damaged = end = 0
    is_prefix = True  # so far the kept lines are what the file holds, from its start to `end`
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
    """Return a line with its newline, None at the end; of one longer than MAX_LINE the part after leading NULs, or, when
    that is too long itself, one newline."""
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
    """Return the row of a line and its text; None when there is none."""
    for start in dict.fromkeys((0, max(text.rfind(b'{"step"'), 0))):
        try:
            row = json.loads(text[start:])
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row, text[start:]
    return None, b""


class RowFile:
    """A file that rows are appended to. Rows that the disk does not take wait in memory and are written when it does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._end = 0  # of the last whole row
        self._waiting: list[bytes] = []
        self._is_failing = False

    def append(self, row: Row) -> None:
        self._waiting.append(json.dumps(row).encode() + b"\n")
        self._write_waiting()

    def close(self) -> None:
        """Close the file; rows that could not be written are counted in the log, and lost."""
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
                    "%s: cannot be written: %s; training goes on, and its rows wait in memory",
                    *(self._path, error.strerror or error),
                )
            self._is_failing = True
            return
        if self._is_failing:
            log.warning("%s: written again, with the %d rows that waited", self._path, len(self._waiting))
        self._is_failing = False
        self._waiting.clear()

    def _write(self, data: bytes) -> None:
        """Append all of `data` or nothing."""
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
