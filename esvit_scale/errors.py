"""Exceptions that end a command, each with the exit code that scripts and schedulers act on.

0 finished, or saved and asking for a requeue; 130 ctrl-C (saved); 2 a mistake of the user; 3 diverged, or ended by train.guard; 75 a restart can
help.
"""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can correct; the message says in one line what, where, and the nearest right value."""

    exit_code = 2


class Diverged(Exception):
    """The error of a run that diverged, or whose features `train.guard` found destroyed; the message says what to try."""

    exit_code = 3


class RestartCanHelp(Exception):
    """A failure of the machine rather than the run; the same command continues from the last checkpoint."""

    exit_code = 75


# The errnos of storage that is full, gone or broken, as opposed to a wrong request. A restart can help.
MACHINE_ERRNOS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EAGAIN, errno.EREMOTEIO, errno.ENETDOWN}
    | {errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOSPC, errno.EDQUOT, errno.EROFS}
)


def is_machine_fault(error: BaseException) -> bool:
    """Return whether an error comes from storage that is full, gone or broken."""
    return isinstance(error, OSError) and error.errno in MACHINE_ERRNOS


def in_words(error: OSError) -> str:
    """Return the one-line message of a file system error: the file, and the system's own words."""
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{os.fsdecode(error.filename)}: {what}" if isinstance(error.filename, str | bytes | os.PathLike) else what


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters, or the name of its type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _as_os_error(error: Exception) -> OSError | None:
    """Return a file system error as Python's OSError, or None for any other error.

    Libraries written in Rust (safetensors) raise errors of their own, whose text ends in `(os error 28)`.
    """
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


@contextmanager
def translate_file_errors() -> Iterator[None]:
    """Convert file system errors raised in the `with` block to exceptions with a one-line message and an exit code.

    Raises:
        RestartCanHelp: storage that is full, gone or broken.
        UserError: a file that may not be read or written.
    """
    try:
        yield
    except (UserError, Diverged, RestartCanHelp):
        raise
    except Exception as raised:
        error = _as_os_error(raised)
        if error is None:
            raise
        if is_machine_fault(error):
            raise RestartCanHelp(
                f"{in_words(error)}; nothing that was saved is lost; run the same command again when the storage works"
            ) from error
        if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
            raise UserError(f"{in_words(error)}; correct this and run the same command again") from error
        raise


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint to append to an error message: `; did you mean 'x'?`, or the known words when none is close."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
