"""The format of the lines in log.txt, in which warnings are marked."""

import logging
import re
from pathlib import Path

WARNING = "warning: "  # stands before the text of a warning


class FileFormatter(logging.Formatter):
    """A formatter that writes the time, the word "warning: " before warnings and errors, and the message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of a record, without its traceback."""
        if record.levelno >= logging.WARNING:
            record.message = WARNING + record.message
        return super().formatMessage(record)


def read_warnings(log: Path, notes: bool = False) -> list[str]:
    """Return the texts of the warnings in a log.txt; with `notes`, also what a start says about unsuitable settings."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    marks = re.escape(WARNING) + (r"|note {7}" if notes else "")
    found = (re.match(rf"\d\d:\d\d:\d\d (?:{marks})(.*)", line) for line in lines)
    return [match[1] for match in found if match]
