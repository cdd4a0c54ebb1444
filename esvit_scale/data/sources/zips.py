"""Zip files of images as a source: one zip or a folder of them, not extracted.

Python's zipfile reads the table of contents once; members are then read by their offsets, so that worker processes
share nothing, and a member is inflated up to its recorded size only.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from esvit_scale.data import left_out
from esvit_scale.data.decode import BadImage
from esvit_scale.data.image_folder import check_arrays, printable
from esvit_scale.data.left_out import IMAGES, MEMBERS, LeftOut
from esvit_scale.data.raster import ARRAY
from esvit_scale.data.sources.base import (
    Item,
    Labels,
    Rows,
    Source,
    extension,
    is_image,
    labelled,
    parent_label,
    visible_files,
)
from esvit_scale.data.tar_names import no_sample, parts_of
from esvit_scale.errors import UserError

HOW_LABELS = (None, "none", "parent", "archive")
MAX_INFLATED = 1 << 28  # bytes; a larger member is a zip bomb, or no image for training
LOCAL_HEADER = 30  # bytes before the member's name


class ZipSource(Source):
    """A source of all images in a list of zip files.

    Args:
        root: folder below which the zips lie; messages name them relative to it.
        label: where classes come from: `parent`: the folder in the zip; `archive`: the zip's name; None or `none`: no
            classes.

    Raises:
        UserError: a zip cannot be read, or no zip holds an image.
    """

    def __init__(
        self, zips: Sequence[Path], root: Path, label: str | None = None, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if label not in HOW_LABELS:
            raise UserError(
                f"--label {label}: for zips it can be 'parent' (the folder is the class), 'archive' (the zip's name is) or "
                "'none'"
            )
        self.root, self._zips = root, list(zips)
        self._rows, digest = Rows(), hashlib.sha256(repr((label, classes)).encode())
        labels = Labels()
        for number, path in enumerate(self._zips):
            infos = list(_contents(path))
            pictures = [info.filename for info in infos if is_image(info.filename) and not no_sample(info.filename)]
            numeric = [info.filename for info in infos if extension(info.filename) == ARRAY]
            check_arrays(path, pictures, numeric)
            arrays = not pictures
            for info in infos:
                if not self._usable(path, info.filename, arrays):
                    continue
                row = [number, info.filename, info.header_offset, info.compress_size, info.file_size, info.CRC]
                self._rows.append([*row, info.compress_type, info.flag_bits])
                digest.update(repr((path.name, *row[1:])).encode("utf-8", "backslashreplace"))
                by = {"parent": parent_label("/".join(parts_of(info.filename))), "archive": path.stem}
                text = by.get(label or "")
                labels.append(printable(text) if text else None)
        self._rows.finish()
        if not len(self._rows):
            raise UserError(
                f"{root}: no image in its {len(self._zips)} zips; they hold {self.left_out.short() or 'nothing'}"
            )
        self._digest = digest.digest()
        self.classes, self._labels = labels.finish(classes)
        self.notes += labels.notes

    def __len__(self) -> int:
        return len(self._rows)

    def _usable(self, zip_file: Path, member: str, arrays: bool) -> bool:
        """Return whether a member is used as an image (a `.npy` file only with `arrays`); count it as left out if
        not."""
        why = no_sample(member)
        if (is_image(member) or (arrays and extension(member) == ARRAY)) and not why:
            return True
        array = not why and extension(member) == ARRAY
        why = why or (left_out.BESIDE_IMAGES if array else left_out.not_an_image(printable(extension(member))))
        self.left_out.add(IMAGES if array else MEMBERS, why, printable(f"{zip_file.name}/{member}"))
        return False

    def name(self, i: int) -> str:
        """Return the zip's path relative to `root`, followed by the member's name in the zip."""
        number, member, *_ = self._rows[i]
        path = self._zips[number]
        return f"{path.relative_to(self.root).as_posix() if path != self.root else path.name}/{member}"

    def path(self, i: int) -> str:
        """Return the member's name without `.`, `..` and empty parts."""
        return "/".join(parts_of(self._rows[i][1]))

    def read(self, i: int) -> Item:
        """Read and inflate the image. Raises BadImage or OSError."""
        number, _, offset, packed, size, crc, method, flags = self._rows[i]
        return Item(
            _member(self._zips[number], offset, packed, size, crc, method, flags), labelled(self, self._labels, i)
        )

    def size(self, i: int) -> int:
        """Return the size of the image in bytes."""
        return int(self._rows[i][4])

    def fingerprint(self) -> bytes:
        """Return a hash of the classes and of all images."""
        return self._digest


def zip_source(where: Path, label: str | None, classes: Sequence[str] | None) -> ZipSource:
    """Return a zip, or the zips of a folder in the order of their names, as a source.

    Raises:
        UserError: there is no zip, or `ZipSource` raises it.
    """
    if where.is_file():
        return ZipSource([where], where, label, classes)
    left = LeftOut()
    zips = visible_files(where, (".zip",), left)
    if not zips:
        raise UserError(f"{where}: holds no .zip files")
    source = ZipSource(zips, where, label, classes)
    source.left_out.update(left)
    return source


def _contents(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as file:
            return [info for info in file.infolist() if not info.is_dir()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # zipfile raises almost anything on a damaged table of contents
        raise UserError(f"{path}: not a readable zip file: {printable(str(error))[:200]}") from None


def _member(path: Path, offset: int, packed: int, size: int, crc: int, method: int, flags: int) -> bytes:
    if flags & 0x1:
        raise BadImage("encrypted", left_out.UNREADABLE)
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadImage(f"packed with method {method}; stored and deflate can be read", left_out.UNREADABLE)
    if size > MAX_INFLATED or packed > MAX_INFLATED:
        raise BadImage(f"{size} bytes: over the limit of {MAX_INFLATED} (zip bomb?)", left_out.TOO_LARGE)
    with path.open("rb") as file:
        if offset + LOCAL_HEADER + packed > os.fstat(file.fileno()).st_size:
            raise BadImage("lies beyond the end of the zip (cut short?)")
        header = os.pread(file.fileno(), LOCAL_HEADER, offset)
        if header[:4] != b"PK\3\4" or len(header) != LOCAL_HEADER:
            raise BadImage("its header in the zip is damaged")
        start = (
            offset + LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        data = os.pread(file.fileno(), packed, start)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, size + 1)
        except zlib.error as error:
            raise BadImage(f"cannot be inflated: {error}") from None
    if len(data) != size or zlib.crc32(data) != crc:
        raise BadImage("its length or checksum is not the zip's")
    return data
