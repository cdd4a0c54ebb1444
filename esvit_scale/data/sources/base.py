"""The interface of all sources of images: numbered samples that are read one at a time."""

import json
import os
import tempfile
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data import left_out
from esvit_scale.data.class_names import NO_LABEL, UNKNOWN, numbered, numbered_as, remark
from esvit_scale.data.decode import EXTENSIONS, BadImage
from esvit_scale.data.image_folder import printable, walk
from esvit_scale.data.left_out import ARCHIVES, FILES, IMAGES, LeftOut
from esvit_scale.errors import UserError
from esvit_scale.progress import say

EXTRAS = ("json", "txt")  # extensions of members that are copied with their image: metadata and caption
SAY_AFTER = 2_000_000  # samples between progress lines while a source is listed
SET_FILES = ("manifest.json", "quarantine.jsonl")  # beside the tars of a shard set
MAX_EXTRA = 1 << 20  # bytes; a larger text or json is left out


class Item(NamedTuple):
    """One sample, as `Source.read` returns it."""

    data: bytes  # the image file; empty: the sample has none
    label: int | None = None  # class number
    extras: Mapping[
        str, bytes
    ] = {}  # metadata and caption files, by their extension in EXTRAS; those of signal_members.py
    missing: Mapping[str, tuple[str, str]] = {}  # members that cannot be read: (message, reason in left_out.py)


class Source(ABC):
    """A source of images: samples 0 … N−1, in an order that depends on the source's content alone.

    A source holds about 8 bytes per sample in memory and its rows in an unlinked temporary file. It can be read from
    forked processes.
    """

    classes: tuple[str, ...] = ()  # empty: no labels
    blocks: NDArray[np.int64] | None = None  # first samples of runs to be read in sequence; None: any order is as fast
    root: Path  # the file or folder that must exist for any sample to be read
    modal: bool = False  # samples have sound, video or text of their own, and may lack an image
    together: int = 1  # samples of a shard that are read at the same time, by threads: more than 1 for slow stores

    def __init__(self) -> None:
        self.notes: list[str] = []  # lines for the user about the whole source
        self.left_out = LeftOut()  # counts of what was left out before an image was read
        self.damaged: list[tuple[str, str]] = []  # (name, reason) of archives of which only a part can be read

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str:
        """Return the sample's name for messages, the quarantine and keep-lists; undecodable bytes are surrogates."""

    def path(self, i: int) -> str:
        """Return the relative path (with `/`) from which the sample's key is made."""
        return self.name(i)

    @abstractmethod
    def read(self, i: int) -> Item:
        """Read sample i: its image file, class number and extras. Raises BadImage or OSError."""

    @abstractmethod
    def size(self, i: int) -> int:
        """Return the size of the image file in bytes; 0 when the source does not know it."""

    def labels(self) -> NDArray[np.int32] | None:
        """Return every sample's class number, negative without one; None where only reading a sample tells."""
        return None

    def beside(self, i: int) -> int:
        """Return the number of members or files that go with the image of sample i: label, caption, metadata."""
        return 0

    @abstractmethod
    def fingerprint(self) -> bytes:
        """Return bytes that identify the content: they change if the samples, or their sizes (where known), change."""


_encode = json.JSONEncoder(separators=(",", ":")).encode  # made once, which saves two thirds of the time of a long list
_decode = json.JSONDecoder().decode


class Rows:
    """A list of JSON values in an unlinked temporary file, with 8 bytes each in memory; forked processes can read
    it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="esvit-scale-")  # noqa: SIM115 (lives as long as the rows)
        self._ends = array("q", [0])

    def append(self, value: Any) -> None:
        """Add a value; print a progress line after every SAY_AFTER values."""
        if len(self._ends) % SAY_AFTER == 0:
            say(f"{len(self._ends):,} samples listed, continuing")
        self._ends.append(self._ends[-1] + self._file.write(_encode(value).encode()))

    def finish(self) -> "Rows":
        """Make the values readable after the last was added, and return self."""
        self._file.flush()
        return self

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Any:
        start, end = self._ends[i], self._ends[i + 1]
        return _decode(os.pread(self._file.fileno(), end - start, start).decode())


class Labels:
    """The labels of a source's samples: added as texts, returned as class numbers; 4 bytes of memory per sample."""

    NONE, UNKNOWN = NO_LABEL, UNKNOWN

    def __init__(self) -> None:
        self._ids = array("i")
        self._known: dict[str, int] = {}
        self.notes: list[str] = []  # lines for the user about how the labels were numbered

    def append(self, text: str | None) -> None:
        """Add the label of the next sample; None or an empty text means no label."""
        text = text.strip() if text is not None else ""
        self._ids.append(self._known.setdefault(text, len(self._known)) if text else -1)

    def extend_without(self, n: int) -> None:
        """Add n samples without a label."""
        self._ids.extend(array("i", [-1]) * n)

    def finish(
        self, classes: Iterable[str] | None = None, by_number: bool = False
    ) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """Return the class names, and each sample's class number: NONE without a label, UNKNOWN if not in `classes`.

        Args:
            classes: class names in the order of their numbers, among which `class_names.numbered_as` finds the labels;
                None: `class_names.numbered` makes the classes from the labels.
            by_number: the labels are numbers of `classes`, not names.

        Raises:
            UserError: all labels are whole numbers, and one is below -1.
        """
        ids = np.frombuffer(self._ids, np.int32) if self._ids else np.empty(0, np.int32)
        if classes is None or not self._known:
            names, find = numbered(self._known)
            self.notes += filter(None, [remark(self._known, names)])
        else:
            names = tuple(classes)
            find = numbered_as(names if not by_number else list(map(str, range(len(names)))), self._known)
        table = np.array([*(find.get(text, self.NONE) for text in self._known), self.NONE], np.int32)
        return names, table[ids]


def labelled(source: Source, labels: NDArray[np.int32], i: int) -> int | None:
    """Return the class number of sample i; None in a source without classes. Raises BadImage without a valid label."""
    if not source.classes:
        return None
    label = int(labels[i])
    if label < 0:
        if label == Labels.NONE:
            raise BadImage("has no label", left_out.UNLABELLED)
        raise BadImage("its label is not one of the classes given", left_out.UNKNOWN_LABEL)
    return label


def extension(name: str) -> str:
    """Return the extension of a path in lower case: `jpg` for `a/b.JPG`; empty when there is none."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def is_image(name: str) -> bool:
    """Return whether a name ends like an image's and is not hidden."""
    return extension(name) in EXTENSIONS and not name.rpartition("/")[2].startswith(".")


def parent_label(path: str) -> str | None:
    """Return the name of the folder that holds a file; None when there is none."""
    return path.rpartition("/")[0].rpartition("/")[2] or None


def visible_files(root: Path, suffixes: tuple[str, ...], left: LeftOut) -> list[Path]:
    """Return the files below `root` with one of these endings, sorted; links to folders are followed.

    All other files are counted in `left`, except a shard set's own manifest, indexes and quarantine.
    """
    found = []
    for path in walk(root, left):
        base = path.rpartition("/")[2]
        if base.lower().endswith(suffixes):
            found.append(root / path)
        elif base not in SET_FILES and not base.endswith(".index.jsonl"):
            left.add(what_file(path), left_out.BESIDE_ARCHIVES, printable(path))
    return sorted(found)


def what_file(path: str) -> str:
    """Return the kind under which a left-out file is counted: IMAGES, ARCHIVES or FILES."""
    if is_image(path):
        return IMAGES
    return ARCHIVES if extension(path) in ("tar", "zip", "parquet", "pq") else FILES


def count_beside(root: Path, left: LeftOut, why: str, skip: Collection[str]) -> None:
    """Count all files below `root` in `left`, for the reason `why`, except the paths in `skip` (relative to `root`)."""
    for path in walk(root, left, skip):
        left.add(what_file(path), why, printable(path))


def read_classes(path: Path | None) -> tuple[str, ...] | None:
    """Return class names from a file with one per line, in the order of their numbers; None when no file is given.

    Raises:
        UserError: the file cannot be read, is empty, or contains a name twice.
    """
    if path is None:
        return None
    try:
        names = tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"{path}: {'names a class twice' if names else 'names no class'}; write one class name per line"
        )
    return names
