"""Rules that turn label texts into class numbers: whole numbers keep their value, names get their rank in sorted order.

Sources of every kind use these rules.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from esvit_scale.errors import UserError

NO_LABEL, UNKNOWN = -1, -2
MISSING = frozenset(["", "nan", "na", "n/a", "none", "null", "<na>"])  # texts that programs write for an empty cell
MAX_DIGITS = 6  # a whole number with more digits is taken as a name (an id, a date)


def numbered(texts: Iterable[str], folders: bool = False) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names, and the class number of every text (NO_LABEL for one that means "no label").

    If all texts are whole numbers (`3` or `3.0`) of at most MAX_DIGITS digits, they are the class numbers: the class
    names are `0` to the largest number, and -1 and texts for an empty cell (MISSING: `nan`, `NA`, …) mean no label.
    Otherwise the texts are names, numbered in the order of their UTF-8 bytes, or of their values if all are numbers. If
    only some texts are numbers, a number written in two ways (`0`, `0.0`) is one class; -1 and blank texts mean no
    label, and so do the other texts for an empty cell if at least half of the texts are numbers.

    Args:
        folders: the texts are names of folders: each is a class of its own, and none means "no label".

    Raises:
        UserError: all texts are whole numbers, and one is below -1.
    """
    known = list(dict.fromkeys(texts))
    empty = set() if folders else {text for text in known if text.strip().lower() in MISSING}
    values = _values(known, folders, empty)
    if values and len(values) + len(empty) == len(known):
        return _of_numbers(values, empty, folders)
    if folders:
        return _of_names(sorted(known, key=os.fsencode))
    return _of_mixed(known, values, empty)


def remark(texts: Iterable[str], names: Sequence[str], folders: bool = False) -> str:
    """Return a note for the user about a surprising result of `numbered`, or "" if nothing about it is surprising.

    It is surprising that a few texts which are not numbers turn all numbers into names, or that the class numbers have
    so many gaps that most classes are empty.
    """
    known = list(dict.fromkeys(texts))
    empty = set() if folders else {text for text in known if text.strip().lower() in MISSING}
    values = {text: value for text, value in _values(known, folders, empty).items() if value != NO_LABEL}
    classes = set(names)
    others = [text for text in known if text in classes and text not in values and text not in empty]
    if others and len(values) >= len(others):
        return (
            f"label {min(others)!r} is no class number, so all labels are taken as names and numbered in the order of their "
            f"bytes (class 0 is {names[0]!r}); --classes FILE sets the classes and their numbers"
        )
    used = len(set(values.values()))
    if not others and len(names) > 2 * used + 10:
        return (
            f"{used} class numbers up to {len(names) - 1} make {len(names)} classes, most of them empty; --classes FILE "
            "(one name per line) numbers them from 0"
        )
    return ""


def numbered_as(classes: Sequence[str], texts: Iterable[str]) -> dict[str, int]:
    """Return for every text its class number: the index of the class in `classes`.

    A text stands for the class of the same name, or for the class whose name is the same number (`1.0` for `1`). If not
    all class names are numbers, a whole number also stands for the class with this index. The result is NO_LABEL for a
    text that means "no label", and UNKNOWN for one that stands for no class, or for several.
    """
    by_name = {name: number for number, name in enumerate(classes)}
    values = _values(classes, False, set())
    by_value = {value: by_name[name] for name, value in values.items()}
    twice = {value for value, times in Counter(values.values()).items() if times > 1}  # `1` and `01`
    found = {}
    for text in texts:
        value = _number(text, plain=False)
        if text in by_name:
            found[text] = by_name[text]
        elif value in by_value:
            found[text] = UNKNOWN if value in twice else by_value[value]
        elif len(values) < len(classes) and value is not None and value == int(value) and 0 <= value < len(classes):
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
    if len(whole) < len(values):
        names, find = _of_names(sorted(values, key=by_value))
        return names, find | dict.fromkeys(empty, NO_LABEL)
    if any(len(str(abs(value))) > MAX_DIGITS for value in whole.values()):
        if folders:
            return _of_names(sorted(values, key=by_value))
        names, find = _of_groups(sorted(classes, key=by_value), values)
        return names, find | missing
    if classes and min(classes.values()) < 0:
        text = min(classes, key=classes.__getitem__)
        raise UserError(
            f"label {text}: class numbers begin at 0, and -1 means no label; list the classes with --classes FILE"
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


def _of_mixed(known: list[str], values: dict[str, float], empty: set[str]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names for texts of which not all are numbers, and the class number of every text."""
    missing = {text for text, value in values.items() if value == NO_LABEL}
    missing |= {text for text in known if not text.strip()}
    numbers = len(values.keys() - missing)
    if numbers and 2 * numbers >= len(known) - len(empty | missing):
        missing |= empty
    names, find = _of_groups(sorted((text for text in known if text not in missing), key=os.fsencode), values)
    return names, find | dict.fromkeys(missing, NO_LABEL)


def _of_groups(ordered: list[str], values: dict[str, float]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names, in the order of `ordered`, and the class number of every text.

    Texts that are the same number are one class, named after the first of the shortest texts.
    """
    name: dict[float, str] = {}
    for text in sorted(ordered, key=len):
        if text in values:
            name.setdefault(values[text], text)
    names, number = _of_names([text for text in ordered if text not in values or name[values[text]] == text])
    return names, {text: number[name[values[text]] if text in values else text] for text in ordered}


def _values(texts: Iterable[str], folders: bool, empty: set[str]) -> dict[str, float]:
    """Return a dict from each text that is a number to its value; texts in `empty` are skipped."""
    found = ((text, _number(text, plain=folders)) for text in texts if text not in empty)
    return {text: value for text, value in found if value is not None}


def _number(text: str, plain: bool) -> float | None:
    """Return the finite number that a text stands for, else None; `plain` accepts decimal digits only (folder names)."""
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
