"""The format of the lines in log.txt, in which warnings are marked."""

import logging
import re
from pathlib import Path

WARNING = "warning: "  # stands before the text of a warning
STOPPED = (
    "stopped at step %d/%d and saved; the same command continues"  # format of the message after ctrl-C or a signal
)
_STOPPED = re.compile(re.escape(STOPPED).replace("%d", r"\d+"))


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
    """Return the texts of the warnings in a log.txt; with `notes`, also what a start says about unsuitable settings.

    The message that ctrl-C or a signal stopped the run is left out; `count_stops` counts it.
    """
    marks = re.escape(WARNING) + (r"|note {7}" if notes else "")
    return [text for text in _texts(log, marks) if not _STOPPED.match(text)]


def count_stops(log: Path) -> int:
    """Return how often ctrl-C, a time limit or another signal stopped the run of a log.txt, which was then saved."""
    return sum(bool(_STOPPED.match(text)) for text in _texts(log, re.escape(WARNING)))


def _texts(log: Path, marks: str) -> list[str]:
    """Return what follows one of the marks (a regular expression) in the lines of a log.txt."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = (re.match(rf"\d\d:\d\d:\d\d (?:{marks})(.*)", line) for line in lines)
    return [match[1] for match in found if match]
