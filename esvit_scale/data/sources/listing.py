"""A list of image paths as a source: one path per line, from a file or stdin."""

import codecs
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from esvit_scale import store_urls
from esvit_scale.data.image_folder import read_file
from esvit_scale.data.remote import url_files
from esvit_scale.data.sources.base import Item, Labels, Rows, Source, labelled, parent_label
from esvit_scale.errors import UserError

MAX_LINE = 1 << 16  # bytes; a longer line is not a path
TOGETHER = 8  # files that a process reads at the same time, if they are named by URLs


class PathSource(Source):
    """A source of the image files that the rows of a list or table name, by path or URL.

    Args:
        rows: yields [path, label text or None, caption or None]; relative paths start at `root`, a folder or URL.
        by_number: labels are numbers of `classes`, even if the class names look like other numbers.
    """

    def __init__(
        self, rows: Iterator[list[str | None]], root: Path | str, classes: Sequence[str] | None, by_number: bool = False
    ) -> None:
        super().__init__()
        self._start = root
        self.root = root if isinstance(root, Path) else Path("/")
        self._rows, labels = Rows(), Labels()
        digest = hashlib.sha256(repr((str(root), classes)).encode())
        elsewhere = isinstance(root, str)
        for path, label, caption in rows:
            digest.update(repr((path, label, caption)).encode())
            self._rows.append([path, caption] if caption else [path])
            labels.append(label)
            if (elsewhere or "://" in (path or "")) and isinstance(place := self._place(path or ""), str):
                self.together = TOGETHER
                if problem := store_urls.secret_in_url(place):
                    raise UserError(f"row {len(self._rows)} of the list or table: {problem}")
        self._rows.finish()
        self._digest = digest.digest()
        self.classes, self._labels = labels.finish(classes, by_number)
        self.notes += labels.notes

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        """Return the path as the list or table has it."""
        path: str = self._rows[i][0]
        return path

    def path(self, i: int) -> str:
        """Return the path without `.`, `..` and empty parts, and without the protocol and query of a URL."""
        name = self.name(i)
        if store_urls.protocol(name):
            name = name.partition("://")[2].partition("?")[0]
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        return "/".join(parts)

    def _place(self, path: str) -> Path | str:
        """Return where the file of a row is: a path or a URL."""
        if store_urls.protocol(path):
            return path
        if isinstance(self._start, str):
            return store_urls.join(self._start, path.removeprefix("./"))
        return self._start / path

    def read(self, i: int) -> Item:
        """Read the image file. Raises BadImage or OSError."""
        path, *caption = self._rows[i]
        place = self._place(path)
        data = url_files.read(place) if isinstance(place, str) else read_file(place)
        extras = {"txt": caption[0].encode("utf-8", "backslashreplace")} if caption else {}
        return Item(data, labelled(self, self._labels, i), extras)

    def size(self, i: int) -> int:
        """Return the size of the image file in bytes; 0 when it is missing, or named by a URL."""
        place = self._place(self.name(i))
        try:
            return 0 if isinstance(place, str) else place.stat().st_size
        except OSError:
            return 0

    def fingerprint(self) -> bytes:
        """Return a hash of all rows."""
        return self._digest


def list_source(where: str, root: Path | str | None, label: str | None, classes: Sequence[str] | None) -> PathSource:
    """Read a list of image paths and return it as a source.

    Args:
        where: a file, or `-` for stdin.
        root: folder or URL at which relative paths start; None: the list's folder, or the current one for stdin.
        label: where classes come from: `parent`: the folder that holds the image; `last`: the line's last word; None or
            `none`: no classes.

    Raises:
        UserError: the list cannot be read, or holds no path.
    """
    if label not in (None, "none", "parent", "last"):
        raise UserError(
            f"--label {label}: for a list it can be 'parent' (the image's folder is the class), 'last' (the line's last word "
            "is) or 'none'"
        )
    start = root if root is not None else Path() if where == "-" else Path(where).parent
    try:
        if where == "-":
            source = PathSource(_lines(sys.stdin.buffer, label, "stdin"), start, classes)
        else:
            with closing(Path(where).open("rb")) as file:
                source = PathSource(_lines(file, label, where), start, classes)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    if not len(source):
        raise UserError(f"{'stdin' if where == '-' else where}: holds no path; write one image path or URL per line")
    return source


def _lines(file: BinaryIO, label: str | None, name: str) -> Iterator[list[str | None]]:
    number = 0
    while raw := file.readline(MAX_LINE):
        number += 1
        if len(raw) == MAX_LINE or b"\0" in raw:
            raise UserError(
                f"{name}: line {number} is not a path (longer than {MAX_LINE} bytes, or binary); is this file a list?"
            )
        line = os.fsdecode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).strip("\r\n")
        if not line.strip() or line.startswith("#"):
            continue
        path, text = line, None
        if label == "parent":
            text = parent_label(line)
        elif label == "last":
            path, _, text = line.rstrip().replace("\t", " ").rpartition(" ")
            if not path.strip():
                raise UserError(f"{name}: line {number} has one word; --label last needs a path and a class")
            path = line[: len(path)].rstrip()
        yield [path, text, None]
