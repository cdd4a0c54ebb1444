"""A folder of image files as a source; the class is the first-level subfolder, or the folder that holds the image."""

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from esvit_scale.data import left_out
from esvit_scale.data.image_folder import ImageFolder, list_images, printable, read_file
from esvit_scale.data.left_out import FILES
from esvit_scale.data.sources.base import EXTRAS, MAX_EXTRA, Item, Rows, Source, labelled
from esvit_scale.errors import UserError


class FolderSource(Source):
    """A source of the image files below a folder.

    Args:
        label: as in `list_images`.
        classes: class names in the order of their numbers; None: the subfolders' own order.
        captions: treat `x.txt` and `x.json` beside `x.jpg` as its caption and metadata.
        skip: as in `image_folder.walk`.

    Raises:
        UserError: as `list_images`, or a subfolder is not one of `classes`.
    """

    def __init__(
        self,
        root: Path,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        captions: bool = False,
        skip: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.root = root
        folder = list_images(root, label, EXTRAS if captions else (), skip=skip)
        self.left_out, self.notes = folder.left_out, folder.notes
        self._extra_files = self._sort_out(folder) if captions else {}
        numbers = _numbers(folder, classes)
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
        """Return the sample's path below the folder."""
        path: str = self._paths[i][0]
        return path

    def read(self, i: int) -> Item:
        """Read the image file, and the caption and metadata beside it. Raises BadImage or OSError."""
        path = self.name(i)
        data = read_file(self.root / path)
        extras = {ext: (self.root / extra).read_bytes() for ext, extra in self._extras(path).items()}
        return Item(data, labelled(self, self._labels, i), extras)

    def beside(self, i: int) -> int:
        """Return the number of caption and metadata files that go with image i."""
        return len(self._extras(self.name(i)))

    def _extras(self, path: str) -> dict[str, str]:
        """Return the paths of the caption and metadata files that go with the image `path`, by their extension."""
        stem = path.rpartition(".")[0]
        return {ext: self._extra_files[f"{stem}.{ext}"] for ext in EXTRAS if f"{stem}.{ext}" in self._extra_files}

    def _sort_out(self, folder: ImageFolder) -> dict[str, str]:
        """Map the names of images' caption and metadata files, with a lower-case ending, to their paths; count other
        captions and metadata as left out."""
        stems, found = {file.path.rpartition(".")[0] for file in folder.files}, {}
        for path in folder.beside:
            stem, _, ending = path.rpartition(".")
            name = f"{stem}.{ending.lower()}"
            if stem not in stems or name in found:
                self.left_out.add(FILES, left_out.NO_IMAGE, printable(path))
            elif _size(self.root / path) > MAX_EXTRA:
                self.left_out.add(FILES, left_out.EXTRA_TOO_LARGE, printable(path))
            else:
                found[name] = path
        return found

    def size(self, i: int) -> int:
        """Return the size of the image file in bytes."""
        return max(int(self._paths[i][1]), 0)

    def fingerprint(self) -> bytes:
        """Return a hash of the classes, paths and file sizes."""
        return self._digest


def _numbers(folder: ImageFolder, classes: Sequence[str] | None) -> dict[int, int]:
    """Map the folder's own class numbers to the numbers in `classes`."""
    if classes is None:
        return {i: i for i in range(len(folder.classes))}
    used = sorted({file.label for file in folder.files if file.label >= 0})  # folders 2 and 5 make classes 0 … 5
    unknown = [folder.classes[number] for number in used if folder.classes[number] not in classes]
    if unknown:
        raise UserError(f"{folder.root}: its subfolder {unknown[0]} is not one of the {len(classes)} given classes")
    return {number: classes.index(folder.classes[number]) for number in used}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
