"""Class numbers from names, the same for every source: whole numbers stay what they are, names are numbered in order."""

import math
import os
from collections.abc import Iterable, Sequence

from esvit_scale.errors import UserError

NO_LABEL, UNKNOWN = -1, -2
MISSING = frozenset(["", "nan", "na", "n/a", "none", "null", "<na>"])  # how programs write an empty cell among numbers
MAX_DIGITS = 6  # a longer number is a name: an id, a date


def numbered(texts: Iterable[str], folders: bool = False) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names, and the class number of every text (NO_LABEL for one that means "no label").

    Texts that are all whole numbers are class numbers themselves, also as other programs write them (`3.0`): the names
    are then `0` … the largest, -1 means no label, and so does an empty cell (`nan`, `NA`, …). Other texts are numbered in
    the order of their UTF-8 bytes, or of their values where all are numbers of another kind.

    Args:
        folders: the texts are names of folders: all of them are classes, and two never mean the same one.

    Raises:
        UserError: a whole number under -1 among whole numbers.
    """
    known = list(dict.fromkeys(texts))
    empty = set() if folders else {text for text in known if text.strip().lower() in MISSING}
    values = {text: _number(text, plain=folders) for text in known if text not in empty}
    if values and all(value is not None for value in values.values()):
        return _of_numbers({text: value for text, value in values.items() if value is not None}, empty, folders)
    named = [text for text in known if text.strip()] if not folders else known
    return _of_names(sorted(named, key=os.fsencode))


def numbered_as(classes: Sequence[str], texts: Iterable[str]) -> dict[str, int]:
    """Return the class number of every text among given classes: by name, or by number where no class is named so.

    NO_LABEL stands for a text that means "no label", UNKNOWN for one that is no class.
    """
    by_name = {name: number for number, name in enumerate(classes)}
    found = {}
    for text in texts:
        value = _number(text, plain=False)
        if text in by_name:
            found[text] = by_name[text]
        elif value is not None and value == int(value) and 0 <= value < len(classes):
            found[text] = int(value)
        else:
            found[text] = NO_LABEL if value == NO_LABEL or text.strip().lower() in MISSING else UNKNOWN
    return found


def _of_numbers(values: dict[str, float], empty: set[str], folders: bool) -> tuple[tuple[str, ...], dict[str, int]]:
    def by_value(text: str) -> tuple[float, str]:
        return values[text], text

    whole = {text: int(value) for text, value in values.items() if value == int(value)}
    classes = {text: value for text, value in whole.items() if value != NO_LABEL}
    missing = dict.fromkeys([*empty, *(whole.keys() - classes.keys())], NO_LABEL)
    if len(whole) < len(values) or any(len(str(abs(value))) > MAX_DIGITS for value in whole.values()):
        names, find = _of_names(sorted(values, key=by_value))
        return names, find | dict.fromkeys(empty, NO_LABEL)
    if classes and min(classes.values()) < 0:
        text = min(classes, key=classes.__getitem__)
        raise UserError(
            f"label {text}: class numbers begin at 0, and -1 means no label; name the classes with --classes FILE"
        )
    if folders and len(set(classes.values())) < len(classes):  # 1 and 01
        return _of_names(sorted(values, key=by_value))
    if not classes:
        return (), missing
    every = [str(number) for number in range(max(classes.values()) + 1)]
    if folders:
        for text, value in classes.items():
            every[value] = text
    return tuple(every), classes | missing


def _of_names(ordered: list[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    return tuple(ordered), {text: number for number, text in enumerate(ordered)}


def _number(text: str, plain: bool) -> float | None:
    """The finite number that a text is; of a folder's name only decimal digits are one."""
    text = text.strip()
    if plain:
        return float(text) if text.isascii() and text.isdecimal() and len(text) <= 15 else None
    if not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) < 1e15 else None
