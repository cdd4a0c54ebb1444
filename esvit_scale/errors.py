"""The ways a command can end badly, each with the exit code that scripts and schedulers act on.

0 finished, or saved and asking for a requeue; 130 ctrl-C (saved); 2 the user's error; 3 diverged; 75 a restart can help.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can put right: one line that says what, where, and the nearest right value."""

    exit_code = 2


class Diverged(Exception):
    """Training cannot go on: the report in the message says since when and what to try."""

    exit_code = 3


class RestartCanHelp(Exception):
    """The machine failed, not the run: the same command again continues from the last checkpoint."""

    exit_code = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for an error line, or the list of what is known when nothing is close."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
