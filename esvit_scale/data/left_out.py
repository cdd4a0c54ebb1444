"""What a source holds and a shard set does not: counted by kind, so that nothing is lost in silence.

Every file, member, row or label of a source is either used or counted here, by what it is (images, files, members,
rows, folders, archives) and why it was left out. The counts are printed when a set is finished, and its manifest keeps
them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from esvit_scale.errors import UserError

# What was left out. Only `IMAGES` count as lost images: pictures that the set should have and has not.
IMAGES, FILES, MEMBERS, ROWS, FOLDERS, ARCHIVES = "images", "files", "members", "rows", "folders", "archives"

# Why. A source may add reasons of its own; these are shared.
HIDDEN = "hidden (name begins with a dot)"
NO_IMAGE = "no image in its group"
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

ASKED = frozenset([UNDER_MIN_SIDE, DUPLICATE, NOT_KEPT])  # left out because an option says so

WARN_SHARE = 0.01  # of the images: a larger lost share is a warning


def not_an_image(ending: str) -> str:
    """The reason for a file whose name does not end like an image's; `ending` without its dot, may be empty."""
    return f"no image by its name ({'.' + ending[:12] if ending else 'no extension'})"


@dataclass
class Count:
    number: int
    first: str  # name of the first one, printable
    asked: bool  # an option asked for it (--min-side, --drop-duplicates, --keep, …)


class LeftOut:
    """Counts by (what, why), each with the name of the first one."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._counts: dict[tuple[str, str], Count] = {}
        for row in rows:
            self.add(str(row["what"]), str(row["why"]), str(row["first"]), int(row["count"]), bool(row.get("asked")))

    def add(self, what: str, why: str, first: str, number: int = 1, asked: bool = False) -> None:
        """Count `number` more of a kind; `first` is what a person calls the first of them, as printable text."""
        if number <= 0:
            return
        found = self._counts.setdefault((what, why), Count(0, first, asked))
        found.number += number

    def update(self, other: "LeftOut") -> None:
        """Add the counts of another summary to these."""
        for (what, why), found in other._counts.items():
            self.add(what, why, found.first, found.number, found.asked)

    def __contains__(self, kind: tuple[str, str]) -> bool:
        """Whether some of this (what, why) were counted."""
        return kind in self._counts

    def __bool__(self) -> bool:
        return bool(self._counts)

    def total(self, *what: str) -> int:
        """How many were left out, of all kinds or of those named."""
        return sum(found.number for (kind, _), found in self._counts.items() if not what or kind in what)

    def unasked(self) -> "LeftOut":
        """The counts of what no option asked to leave out."""
        return LeftOut(row for row in self.rows() if not row["asked"])

    def rows(self) -> list[dict[str, Any]]:
        """The counts for a JSON file: images first, then other kinds, the largest count first."""
        order = sorted(self._counts.items(), key=lambda item: (item[0][0] != IMAGES, item[0][0], -item[1].number))
        return [
            {"what": what, "why": why, "count": found.number, "first": found.first, "asked": found.asked}
            for (what, why), found in order
        ]

    def table(self) -> str:
        """A table for a person: one line a kind, empty when nothing was left out."""
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
        """The counts on one line, for messages."""
        return ", ".join(f"{row['count']:,} {row['what']}: {row['why']} ({row['first'][:100]})" for row in self.rows())

    def warning(self, used: int) -> str:
        """A sentence when more than WARN_SHARE of the images are lost that nobody asked to leave out; else empty.

        Args:
            used: images that the set has.
        """
        lost = LeftOut(row for row in self.unasked().rows() if row["what"] in (IMAGES, ROWS))
        number = lost.total()
        if number <= WARN_SHARE * (used + number):
            return ""
        share = 100 * number / (used + number)
        return f"warning: {number:,} of {used + number:,} images ({share:.1f} %) are not in the set: {lost.short()}"


def of_bad(rows: Iterable[dict[str, Any]]) -> LeftOut:
    """Count rows of a quarantine, and what went with the images that they name."""
    left = LeftOut()
    for row in rows:
        kind, first = str(row.get("kind", DAMAGED)), str(row["file"])
        left.add(str(row.get("what", IMAGES)), kind, first, asked=kind in ASKED)
        left.add(MEMBERS, WENT_WITH, first, int(row.get("beside", 0)), asked=kind in ASKED)
    return left


def refuse(left_out: Sequence[LeftOut], where: str) -> None:
    """What --strict does.

    Raises:
        UserError: something was left out that no option asked to leave out.
    """
    together = LeftOut()
    for some in left_out:
        together.update(some)
    unasked = together.unasked()
    if unasked:
        raise UserError(f"{where}: --strict, and not everything is used: {unasked.short()}")
