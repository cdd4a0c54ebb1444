"""MosaicML's MDS data sets as a source: index.json and `shard.NNNNN.mds` files, as mosaicml-streaming writes them.

A shard file is, in little-endian numbers of 32 bits: the number of samples N; N + 1 offsets at which samples begin, the
last one being the end; a description that index.json repeats; the samples. A sample is the sizes of its columns of
variable size, then the values of all columns, in the order of the index.
"""

import hashlib
import io
import json
import os
import struct
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from esvit_scale.data.decode import BadImage
from esvit_scale.data.image_folder import printable
from esvit_scale.data.sources.base import Item, Labels, Source, labelled
from esvit_scale.data.sources.table import TableColumns
from esvit_scale.data.tar_names import MAX_MEMBER
from esvit_scale.errors import UserError

INDEX = "index.json"
FILES = ("jpeg", "png", "bytes")  # encodings that hold an image file
PIXELS = "pil"  # three numbers (width, height, length of the mode), the mode, the pixels
NUMBERS = {f"{kind}{bits}": f"<{kind[0]}{bits // 8}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
NUMBERS |= {"int": "<i8", "float16": "<f2", "float32": "<f4", "float64": "<f8"}
TEXTS = ("str", "str_int", "str_float", "str_decimal")


class Shard(NamedTuple):
    """A file of an MDS data set."""

    path: str  # relative to the folder of the index
    samples: int
    encodings: dict[str, str]  # by name of the column, in the order in which values are stored
    sizes: tuple[int | None, ...]  # bytes of every column's value; None: each sample says


def is_mds(root: Path) -> bool:
    """Return whether a folder holds the index of an MDS data set."""
    try:
        shards = json.loads((root / INDEX).read_bytes())["shards"]
        return bool(shards) and all(shard["format"] == "mds" for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


class MdsSource(Source):
    """A source of the images in an MDS data set, with a column of labels and one of captions.

    Samples are read one at a time by their offsets; columns that are not asked for are never decoded.

    Args:
        image, label, caption: names of columns; without `image`, the one that holds images.

    Raises:
        UserError: the index or a shard file is missing, damaged or compressed, or a column is missing or unfit.
    """

    def __init__(
        self, root: Path, image: str | None, label: str | None, caption: str | None, classes: Sequence[str] | None
    ) -> None:
        super().__init__()
        self.root = root
        self._shards = _shards(root)
        self._starts = np.array([0, *accumulate(shard.samples for shard in self._shards)], np.int64)
        names = list(self._shards[0].encodings)
        columns = TableColumns(str(root / INDEX), names, image or _image_column(root, self._shards[0]), label, caption)
        self._image = names[columns.image]
        self._label, self._caption = (None if at is None else names[at] for at in (columns.label, columns.caption))
        for shard in self._shards:
            self._check(shard)
        labels = Labels()
        if self._label is None:
            labels.extend_without(len(self))
        else:
            for i in range(len(self)):
                labels.append(self._text(i, self._label))
        self.classes, self._labels = labels.finish(classes)
        self.notes += [*filter(None, [columns.label_unused(label)]), *labels.notes]
        digest = hashlib.sha256(repr((self._image, self._label, self._caption, self.classes)).encode())
        digest.update((root / INDEX).read_bytes())
        self._digest = digest.digest()

    def _check(self, shard: Shard) -> None:
        """Raise UserError for a shard without the chosen columns, or with unfit ones."""
        fit: dict[str | None, tuple[str, ...]] = {self._image: (*FILES, PIXELS), self._label: (*NUMBERS, *TEXTS)}
        fit[self._caption] = ("str",)
        for column, encodings in fit.items():
            if column is None:
                continue
            if column not in shard.encodings:
                raise UserError(f"{self.root / shard.path}: has no column {column}, but {self._shards[0].path} has one")
            if shard.encodings[column].partition(":")[0] not in encodings:
                raise UserError(
                    f"{self.root / shard.path}: column {column} holds {shard.encodings[column]}, but "
                    f"{', '.join(encodings[:4])} or the like is needed"
                )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        """Return the shard's file without ending, and the sample's number in it: `shard.00000/000017`."""
        shard, at = self._place(i)
        return f"{shard.path.removesuffix('.mds')}/{at:06d}"

    def read(self, i: int) -> Item:
        """Read a sample. Raises BadImage or OSError."""
        shard, _ = self._place(i)
        data = self._value(i, self._image)
        if shard.encodings[self._image] == PIXELS:
            data = _as_png(data)
        extras = {} if self._caption is None else {"txt": self._value(i, self._caption)}
        return Item(data, labelled(self, self._labels, i), extras)

    def size(self, i: int) -> int:
        """Return the size of the sample in bytes, nearly all of which is the image; 0 if it cannot be read."""
        try:
            shard, at = self._place(i)
            with (self.root / shard.path).open("rb") as file:
                begin, end = _bounds(file.fileno(), at)
            return max(end - begin, 0)
        except (OSError, BadImage):
            return 0

    def fingerprint(self) -> bytes:
        """Return a hash of the index, the columns and the classes."""
        return self._digest

    def _place(self, i: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shards[number], i - int(self._starts[number])

    def _value(self, i: int, column: str) -> bytes:
        """Return the bytes of a column's value. Raises BadImage or OSError."""
        shard, at = self._place(i)
        with (self.root / shard.path).open("rb") as file:
            begin, end = _bounds(file.fileno(), at)
            head = os.pread(file.fileno(), 4 * shard.sizes.count(None), begin)
            if len(head) < 4 * shard.sizes.count(None):
                raise BadImage("its sample lies behind the end of the shard file")
            varying = iter(struct.unpack(f"<{len(head) // 4}I", head))
            sizes = [next(varying) if size is None else size for size in shard.sizes]
            number = list(shard.encodings).index(column)
            offset, size = begin + len(head) + sum(sizes[:number]), sizes[number]
            if begin + len(head) + sum(sizes) != end or size > MAX_MEMBER:
                raise BadImage("the sizes of its columns do not fit its place in the shard file")
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise BadImage(f"{len(data)} of {size} bytes could be read")
        return data

    def _text(self, i: int, column: str) -> str:
        """Return the label of a sample as text. Raises UserError if it cannot be read."""
        try:
            data, encoding = self._value(i, column), self._place(i)[0].encodings[column]
            if encoding in TEXTS:
                return data.decode()
            value: int | float = np.frombuffer(data, NUMBERS[encoding])[0].item()
            return str(value)
        except (BadImage, OSError, ValueError, IndexError) as error:
            raise UserError(f"{self.root}: {self.name(i)}: its label cannot be read: {error}") from None


def _bounds(handle: int, at: int) -> tuple[int, int]:
    """Return the offsets at which a sample of a shard file begins and ends. Raises BadImage."""
    pair = os.pread(handle, 8, 4 * (1 + at))
    if len(pair) < 8:
        raise BadImage("the shard file is cut short")
    begin, end = struct.unpack("<II", pair)
    return begin, end


def _shards(root: Path) -> list[Shard]:
    """Return the shards of an index. Raises UserError as `MdsSource` does."""
    try:
        listed = json.loads((root / INDEX).read_bytes())["shards"]
        found = [_shard(root, one) for one in listed]
    except OSError as error:
        raise UserError(f"{root / INDEX}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{root / INDEX}: not the index of an MDS data set ({error})") from None
    if not sum(shard.samples for shard in found):
        raise UserError(f"{root / INDEX}: lists no samples")
    return found


def _shard(root: Path, one: dict[str, Any]) -> Shard:
    if one["format"] != "mds" or one["version"] != 2:
        raise UserError(
            f"{root / INDEX}: format {one['format']!r}, version {one['version']!r}; only mds, version 2, is read"
        )
    raw = one["raw_data"]
    path = Path(raw["basename"])
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{root / INDEX}: {printable(str(path))} does not lie below it")
    if not (root / path).is_file():
        packed = (one.get("zip_data") or {}).get("basename")
        if packed and (root / packed).is_file():
            raise UserError(
                f"{root / packed}: is compressed ({one.get('compression')}) and cannot be read in random order; decompress "
                f"it to {path.name} first"
            )
        raise UserError(f"{root / path}: not there; the index lists it")
    if (size := (root / path).stat().st_size) != raw["bytes"]:
        raise UserError(f"{root / path}: {size} bytes; the index says {raw['bytes']}; copy it again")
    encodings = dict(zip(one["column_names"], one["column_encodings"], strict=True))
    samples, sizes = one["samples"], tuple(one["column_sizes"])
    if not all(isinstance(text, str) for pair in encodings.items() for text in pair):
        raise ValueError(f"{path}: its columns are no texts")
    if len(sizes) != len(encodings) or not all(value is None or _is_count(value) for value in sizes):
        raise ValueError(f"{path}: its column_sizes are not a number or null for each of its columns")
    if not _is_count(samples) or 4 * (samples + 2) > size:  # numbers before the first sample
        raise ValueError(f"{path}: has no room for {samples!r} samples")
    return Shard(path.as_posix(), samples, encodings, sizes)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _image_column(root: Path, shard: Shard) -> str:
    """Return the name of the one column that holds images. Raises UserError if there is none, or several."""
    for kinds in (("jpeg", "png", PIXELS), ("bytes",)):
        found = [name for name, encoding in shard.encodings.items() if encoding in kinds]
        if len(found) == 1:
            return found[0]
        if found:
            break
    columns = ", ".join(f"{printable(name)} ({encoding})" for name, encoding in shard.encodings.items())
    raise UserError(f"{root / INDEX}: name the column of images with --image-column; there are {columns}")


def _as_png(data: bytes) -> bytes:
    """Return a PNG of an image that is stored as pixels. Raises BadImage."""
    try:
        width, height, length = struct.unpack("<III", data[:12])
        mode = data[12 : 12 + length].decode("ascii")
        file = io.BytesIO()
        Image.frombytes(mode, (width, height), data[12 + length :]).save(file, "PNG")
    except (struct.error, ValueError, OSError, OverflowError, MemoryError) as error:
        raise BadImage(f"its pixels cannot be read: {error}") from None
    return file.getvalue()
