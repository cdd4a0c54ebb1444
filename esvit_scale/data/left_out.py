"""Counts of what a source holds but its shard set does not, so that nothing is lost silently.

Every file, member, row or label of a source is either used or counted here, by what it is (images, files, members,
rows, folders, archives) and by the reason. The counts are printed when a set is finished, and stored in its manifest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from esvit_scale.errors import UserError

# What was left out. `IMAGES` and `ROWS` count as lost images: those that the set should have but has not.
IMAGES, FILES, MEMBERS, ROWS, FOLDERS, ARCHIVES = "images", "files", "members", "rows", "folders", "archives"

# Why it was left out; manifests record these texts. A source may add reasons of its own.
HIDDEN = "hidden (name begins with a dot)"
NO_IMAGE = "no image in its group"
NOT_READ = "no image in its group, and nothing else that the run reads"
DANGLING = "dangling link"
LINK_LOOP = "link back to a folder that holds it"
LINK = "link inside an archive"
SPECIAL = "no regular file (pipe, socket, device)"
UNLABELLED = "no label"
UNKNOWN_LABEL = "label is not one of the classes"
BESIDE_CLASSES = "beside the class folders"
BESIDE_ARCHIVES = "beside the archives or tables"
BESIDE_SPLITS = "beside train/ and val/"
BESIDE_IMAGES = "array (.npy) beside image files"
DUPLICATE = "duplicate"
EMPTY = "empty"
CUT = "cut short or damaged; only its first part is used"
UNFINISHED = "not finished by img2dataset"
DAMAGED = "damaged, or not an image"
OTHER_PIXELS = "other channels or bits"
TOO_SMALL = "too small"
UNDER_MIN_SIDE = "smaller than --min-side"
TOO_LARGE = "too large"
UNREADABLE = "cannot be read"
NO_PATH = "row that names no image"
MISSING = "no such file"
EXTRA_TOO_LARGE = "text or metadata over 1 MiB"
EMPTY_CLASS = "class folder without images"
WENT_WITH = "went with an image that is left out"
NOT_KEPT = "not on the keep-list"
NOT_CHOSEN = "not in the fraction of its class"

ASKED = frozenset([UNDER_MIN_SIDE, DUPLICATE, NOT_KEPT])  # left out because an option asks for it

WARN_SHARE = 0.01  # fraction of lost images above which a warning is printed


def not_an_image(ending: str) -> str:
    """Return the reason for a file whose name does not end like an image's; `ending` has no dot and may be empty."""
    return f"no image by its name ({'.' + ending[:12] if ending else 'no extension'})"


@dataclass
class Count:
    """How many things of one kind were left out for one reason."""

    number: int
    first: str  # printable name of the first one
    asked: bool  # whether an option asked for it (--min-side, --drop-duplicates, --keep, …)


class LeftOut:
    """Counts of things that were left out, by what they are and why, each with the name of the first of them."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._counts: dict[tuple[str, str], Count] = {}
        for row in rows:
            self.add(str(row["what"]), str(row["why"]), str(row["first"]), int(row["count"]), bool(row.get("asked")))

    def add(self, what: str, why: str, first: str, number: int = 1, asked: bool = False) -> None:
        """Count `number` more things of a kind; `first` is the printable name of the first of them."""
        if number <= 0:
            return
        found = self._counts.setdefault((what, why), Count(0, first, asked))
        found.number += number

    def update(self, other: "LeftOut") -> None:
        """Add the counts of another summary to these."""
        for (what, why), found in other._counts.items():
            self.add(what, why, found.first, found.number, found.asked)

    def __contains__(self, kind: tuple[str, str]) -> bool:
        """Return whether anything of this (what, why) was counted."""
        return kind in self._counts

    def __bool__(self) -> bool:
        return bool(self._counts)

    def total(self, *what: str) -> int:
        """Return how many things were left out, of the kinds `what`, or of all kinds when none is named."""
        return sum(found.number for (kind, _), found in self._counts.items() if not what or kind in what)

    def unasked(self) -> "LeftOut":
        """Return the counts of what no option asked to leave out."""
        return LeftOut(row for row in self.rows() if not row["asked"])

    def rows(self) -> list[dict[str, Any]]:
        """Return the counts for a JSON file: images first, then other kinds, each with the largest count first."""
        order = sorted(self._counts.items(), key=lambda item: (item[0][0] != IMAGES, item[0][0], -item[1].number))
        return [
            {"what": what, "why": why, "count": found.number, "first": found.first, "asked": found.asked}
            for (what, why), found in order
        ]

    def table(self) -> str:
        """Return a table to print, one line per kind; empty when nothing was left out."""
        if not self:
            return ""
        rows = self.rows()
        width = max(len(f"{row['count']:,}") for row in rows)
        what = max(len(row["what"]) for row in rows)
        why = max(len(row["why"]) for row in rows)
        lines = [
            f"  {row['count']:>{width},} {row['what']:<{what}}  {row['why']:<{why}}  first: {row['first'][:100]}"
            for row in rows
        ]
        return "\n".join(["left out:", *lines])

    def short(self) -> str:
        """Return the counts on one line, for messages."""
        return ", ".join(f"{row['count']:,} {row['what']}: {row['why']} ({row['first'][:100]})" for row in self.rows())

    def warning(self, used: int) -> str:
        """Return a warning when more than WARN_SHARE of the images were left out without an option for it, else "".

        Args:
            used: number of images in the set.
        """
        lost = LeftOut(row for row in self.unasked().rows() if row["what"] in (IMAGES, ROWS))
        number = lost.total()
        if number <= WARN_SHARE * (used + number):
            return ""
        share = 100 * number / (used + number)
        return f"warning: {number:,} of {used + number:,} images ({share:.1f} %) are not in the set: {lost.short()}"


def of_bad(rows: Iterable[dict[str, Any]]) -> LeftOut:
    """Count the images that quarantine rows name, and the members (labels, captions) that were left out with them."""
    left = LeftOut()
    for row in rows:
        kind, first = str(row.get("kind", DAMAGED)), str(row["file"])
        left.add(str(row.get("what", IMAGES)), kind, first, asked=kind in ASKED)
        left.add(MEMBERS, WENT_WITH, first, int(row.get("beside", 0)), asked=kind in ASKED)
    return left


def refuse(left_out: Sequence[LeftOut], where: str) -> None:
    """Raise UserError, as --strict demands, when anything was left out that no option asked to leave out."""
    together = LeftOut()
    for some in left_out:
        together.update(some)
    unasked = together.unasked()
    if unasked:
        raise UserError(f"{where}: not everything is used, as --strict demands; left out: {unasked.short()}")
