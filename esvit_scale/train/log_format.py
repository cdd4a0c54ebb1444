"""The format of the lines in log.txt, in which warnings are marked."""

import logging

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
