"""Joining of tar members into samples by their keys, where the members of one key do not lie side by side.

Runs of members are written to a temporary file as they are read, with two hashes of each run in memory; runs that
belong together are then found by sorting the hashes. So a tar takes about 40 bytes of memory per run, whatever its
order (200 if all keys are the same up to their first dot), and the samples of a tar that is in order are unchanged.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.hashing import hash64
from esvit_scale.data.manifest import Entry
from esvit_scale.data.sources.base import EXTRAS, Rows
from esvit_scale.data.tar_names import base_key, chosen_images, companion


def joined(runs: Iterable[tuple[int, Entry]]) -> Iterator[Entry]:
    """Yield one entry per sample of a tar, with all members of its key, in the order in which the keys first occur.

    If an extension repeats under a key (`tar --append`), a new sample begins. A member that is not next to the others
    of its key goes to the first sample of that key that has no member of its extension yet. Members without an image of
    their own, such as `x.json`, belong to every image whose name continues their key: `x.0.jpg`, `x.1.jpg`. If the file
    is several tar archives one after the other, members are joined within each archive first, so that a label goes to
    an image of the same key in another archive only if its own archive has no image of that key.

    Args:
        runs: (number of the archive, neighbouring members of one key), in the order of the archives.
    """
    rows, keys, bases, archives = Rows(), array("Q"), array("Q"), array("I")
    for archive, entry in runs:
        archives.append(archive)
        rows.append(entry)
        keys.append(hash64(entry.key))
        bases.append(hash64(base_key(entry.key)))
    rows.finish()
    if not rows:
        return
    by_key, by_base = np.frombuffer(keys, np.uint64), np.frombuffer(bases, np.uint64)
    by_archive = np.frombuffer(archives, np.uintc)
    order = np.lexsort((np.arange(len(rows)), by_base))
    starts = np.flatnonzero(np.append(True, by_base[order[1:]] != by_base[order[:-1]]))
    ends = np.append(starts[1:], len(order))
    for group in np.argsort(order[starts], kind="stable").tolist():
        together = order[starts[group] : ends[group]]
        if len(together) == 1:
            yield _entry(rows, int(together[0]))
        elif by_archive[together[0]] == by_archive[together[-1]]:
            yield from _of_one_base(rows, together, by_key)
        else:
            parts = np.split(together, np.flatnonzero(np.diff(by_archive[together])) + 1)
            found = [entry for part in parts for entry in _of_one_base(rows, part, by_key)]
            found_keys = np.array([hash64(entry.key) for entry in found], np.uint64)
            yield from _of_one_base(found, np.arange(len(found)), found_keys)


def _entry(rows: Rows | Sequence[Any], i: int) -> Entry:
    key, members, *_ = rows[i]
    return Entry(key, {ext: (place[0], place[1]) for ext, place in members.items()})


def _of_one_base(rows: Rows | Sequence[Any], numbers: NDArray[np.int64], by_key: NDArray[np.uint64]) -> Iterator[Entry]:
    """Join the rows `numbers`, whose keys agree up to their first dot, and yield the resulting entries."""
    groups = _groups(numbers, by_key[numbers])
    shared = _shared(rows, groups) if len(groups) > 1 else None
    used: set[str] = set()
    for group in groups:
        for entry in _merged([_entry(rows, i) for i in group]):
            if shared is None:
                yield entry
            elif entry.key != shared.key:
                more = {ext: place for ext, place in shared.members.items() if _takes(entry, ext)}
                used |= more.keys()
                yield Entry(entry.key, entry.members | more)
    if shared is not None and (rest := {ext: place for ext, place in shared.members.items() if ext not in used}):
        yield Entry(shared.key, rest)


def _takes(entry: Entry, ext: str) -> bool:
    """Return whether a member with extension `ext` is a label, caption or metadata that an image of the entry lacks."""
    if ext in entry.members or ext not in (*EXTRAS, "cls"):
        return False
    return any(companion([*entry.members, ext], image, ext) == ext for image in chosen_images(entry.members))


def _groups(numbers: NDArray[np.int64], keys: NDArray[np.uint64]) -> list[list[int]]:
    """Group row numbers by their keys, in the order of the first row of each key."""
    of_key: dict[int, list[int]] = {}
    for number, key in zip(numbers.tolist(), keys.tolist(), strict=True):
        of_key.setdefault(key, []).append(number)
    return list(of_key.values())


def _shared(rows: Rows | Sequence[Any], groups: list[list[int]]) -> Entry | None:
    """Return the entry whose key the others continue (`x` of `x.0` and `x.1`); None if it has an image of its own.

    Args:
        groups: row numbers by key; all keys agree up to their first dot.
    """
    for group in groups:
        first = _entry(rows, group[0])
        if first.key == base_key(first.key):
            found = _merged([_entry(rows, i) for i in group])
            return found[0] if len(found) == 1 and not chosen_images(found[0].members) else None
    return None


def _merged(runs: list[Entry]) -> list[Entry]:
    """Join runs of one key into entries.

    A run that fits into no entry as a whole begins another entry if it holds an image; otherwise each of its members
    goes into an entry that lacks it.
    """
    found: list[Entry] = []
    for key, members, *_ in runs:
        same = [entry for entry in found if entry.key == key]
        whole = bool(chosen_images(members)) or _lacking(same, members) is not None
        for part in [members] if whole else [{ext: place} for ext, place in members.items()]:
            into = _lacking(same, part)
            if into is None:
                same.append(Entry(key, {}))
                found.append(into := same[-1])
            into.members.update(part)
    return found


def _lacking(entries: list[Entry], members: Iterable[str]) -> Entry | None:
    """Return the first entry that has none of these members; None when all have one."""
    return next((entry for entry in entries if entry.members.keys().isdisjoint(members)), None)
