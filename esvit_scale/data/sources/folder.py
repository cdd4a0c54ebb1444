"""A folder of image files; the first-level subfolder is the class."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from esvit_scale.data.image_folder import ImageFolder, list_images, read_file
from esvit_scale.data.sources.base import EXTRAS, MAX_EXTRA, Item, Rows, Source, count_left_out, labelled
from esvit_scale.errors import UserError


class FolderSource(Source):
    """Args:
    labels: classes by first-level subfolder where there are such.
    classes: names in the order of their numbers, instead of the subfolders' alphabetical order.
    captions: `x.txt` and `x.json` beside `x.jpg` belong to it.

    Raises:
        UserError: as `list_images`; a subfolder that is not one of `classes`.
    """

    def __init__(
        self, root: Path, labels: bool = True, classes: Sequence[str] | None = None, captions: bool = False
    ) -> None:
        super().__init__()
        self.root = root
        self._captions = captions
        folder = list_images(root)
        ignored = {ext: n for ext, n in folder.ignored.items() if not (captions and ext.lstrip(".") in EXTRAS)}
        if ignored:
            self.notes.append(f"{root}: {count_left_out(ignored)}")
        numbers = _numbers(folder, classes) if labels else {}
        if numbers:
            self.classes = tuple(classes or folder.classes)
        self._labels = np.fromiter((numbers.get(file.label, -1) for file in folder.files), np.int32, len(folder.files))
        digest, self._paths = hashlib.sha256(repr(self.classes).encode()), Rows()
        for file in folder.files:
            size = _size(root / file.path)
            digest.update(b"\0%s\0%d" % (os.fsencode(file.path), size))
            self._paths.append([file.path, size])
        self._paths.finish()
        self._digest = digest.digest()

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        path: str = self._paths[i][0]
        return path

    def read(self, i: int) -> Item:
        path = self.name(i)
        data = read_file(self.root / path)
        return Item(data, labelled(self, self._labels, i), self._extras(path) if self._captions else {})

    def _extras(self, path: str) -> dict[str, bytes]:
        beside = {ext: (self.root / path).with_suffix(f".{ext}") for ext in EXTRAS}
        return {ext: p.read_bytes() for ext, p in beside.items() if p.is_file() and p.stat().st_size <= MAX_EXTRA}

    def size(self, i: int) -> int:
        return max(int(self._paths[i][1]), 0)

    def fingerprint(self) -> bytes:
        return self._digest


def _numbers(folder: ImageFolder, classes: Sequence[str] | None) -> dict[int, int]:
    """The folder's own class numbers → those asked for."""
    if classes is None:
        return {i: i for i in range(len(folder.classes))}
    unknown = [name for name in folder.classes if name not in classes]
    if unknown:
        raise UserError(f"{folder.root}: its subfolder {unknown[0]} is not among the {len(classes)} classes given")
    return {i: classes.index(name) for i, name in enumerate(folder.classes)}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
