"""Tars as a source, in the WebDataset convention or of plain images: one tar or a folder of them, not extracted."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data import left_out
from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import BadImage
from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import IMAGES, MEMBERS, LeftOut
from esvit_scale.data.manifest import Entry
from esvit_scale.data.signal_members import is_member, plain_image
from esvit_scale.data.sources.base import (
    EXTRAS,
    MAX_EXTRA,
    Item,
    Labels,
    Rows,
    Source,
    labelled,
    parent_label,
    visible_files,
)
from esvit_scale.data.sources.joined import joined
from esvit_scale.data.tar_names import (
    COMPRESSED_TARS,
    chosen_images,
    companion,
    is_image,
    parts_of,
    sample_key,
    split_name,
)
from esvit_scale.data.tar_reader import BLOCK, EMPTY, TarReader, compression
from esvit_scale.errors import UserError

HOW_LABELS = (None, "none", "parent", "archive")
MAX_LABEL = 256  # bytes of a `.cls` member


class TarSource(Source):
    """A source of all images in a list of tars, with their labels and their `.txt` and `.json` members.

    Members are grouped into samples by the rules of tar_names.py, and may lie anywhere in their tar. Members that
    belong to no sample are left out and counted by kind.

    Args:
        root: folder below which the tars lie; messages name them relative to it.
        label: where classes come from: None: the `.cls` member; `parent`: the folder in the tar; `archive`: the tar's
            name; `none`: no classes.
        names: for a shard set, the class names of the numbers in its `.cls` members.

    Raises:
        UserError: a tar cannot be read, or no tar holds an image.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        root: Path,
        label: str | None = None,
        classes: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        modal: bool = False,
    ) -> None:
        super().__init__()
        self.modal = modal
        if label not in HOW_LABELS:
            raise UserError(
                f"--label {label}: for tars it can be 'parent' (the folder is the class), 'archive' (the tar's name is) or "
                "'none'; without --label the class is the .cls member"
            )
        self.root, self._tars, self._how = root, list(tars), label
        self._names = names if classes is not None and list(names or ()) != list(classes) else None
        self._rows, self._digest = Rows(), hashlib.sha256(repr((label, classes or names)).encode())
        labels = Labels()
        self._has_cls = bytearray()  # of every sample, whether a `.cls` member goes with it
        self._several = Counter[str]()  # number of keys with several samples, by the samples' extensions
        for number, tar in enumerate(self._tars):
            try:
                self._add(number, tar, labels)
            except OSError as error:
                raise UserError(f"{tar}: {error.strerror or error}") from None
        self._rows.finish()
        for extensions, n in self._several.most_common(3):
            self.notes.append(f"{root}: {n} keys hold several images ({extensions}): each is a sample")
        if not len(self._rows):
            first = f" (first: {self.notes[0]})" if self.notes else ""
            first = f"{first}; they hold {self.left_out.short()}" if self.left_out else first
            raise UserError(f"{root}: no image in its {len(self._tars)} tars{first}")
        self.classes, self._labels = labels.finish(classes or names, by_number=bool(names) and self._names is None)
        self.notes += labels.notes

    def _add(self, number: int, tar: Path, labels: Labels) -> None:
        self._digest.update(b"\0%s\0%d" % (os.fsencode(self._tar_name(number)), tar.stat().st_size))
        with tar.open("rb") as file:
            for entry in self._entries(number, tar, file):
                used, samples = set(), list(_modal_samples(number, entry) if self.modal else _samples(number, entry))
                if len(samples) > 1:
                    self._several[", ".join(sorted(f".{row[2]}" for row, _ in samples)[:4])] += 1
                for row, members in samples:
                    self._rows.append(row)
                    self._digest.update(json.dumps(row).encode())
                    labels.append(self._label(file.fileno(), tar, entry, members.get("cls")))
                    self._has_cls.append("cls" in members)
                    used |= {row[2], *members.values()}
                for ext in (ext for ext in entry.members if ext not in used):
                    what, why = IMAGES if is_image(ext) else MEMBERS, printable(_why(ext, entry, bool(used)))
                    name = "" if (what, why) in self.left_out else _spelled(file.fileno(), entry, ext)
                    self.left_out.add(what, why, printable(f"{self._tar_name(number)}/{name}"))

    def _entries(self, number: int, tar: Path, file: BinaryIO) -> Iterator[Entry]:
        """Yield the entries from the index beside the tar if it fits the tar's size, else from the tar's headers."""
        with suppress(OSError, ValueError, TypeError, AttributeError):
            entries, end = list(manifests.read_side_car(tar)), tar.stat().st_size
            if all(offset + size <= end for entry in entries for offset, size in entry.members.values()):
                yield from entries
                return
        if kind := compression(os.pread(file.fileno(), 8, 0)):
            raise UserError(f"{tar}: is compressed with {kind} and cannot be read in random order; decompress it first")
        reader = TarReader(file, tar.stat().st_size, printable(self._tar_name(number)) + "/")
        yield from joined(manifests.numbered_runs(reader))
        self.left_out.update(reader.left_out)
        if reader.damage:
            before = "" if reader.damage == EMPTY else ": only the members before it can be used"
            self.notes.append(f"{tar}: {reader.damage}{before}")
            self.damaged.append((self._tar_name(number), reader.damage))

    def _label(self, handle: int, tar: Path, entry: Entry, cls: str | None) -> str | None:
        if self._how == "archive":
            return printable(tar.stem)
        if self._how == "parent":
            return printable(parent_label(entry.key) or "") or None
        if self._how is None and cls is not None:
            offset, size = entry.members[cls]
            text = os.pread(handle, min(size, MAX_LABEL), offset).decode("utf-8", "backslashreplace").strip()
            if self._names and text.isdecimal() and int(text) < len(self._names):
                return self._names[int(text)]  # the name, which is then looked up in the classes given
            return text
        return None

    def __len__(self) -> int:
        return len(self._rows)

    def _tar_name(self, number: int) -> str:
        tar = self._tars[number]
        return tar.relative_to(self.root).as_posix() if tar != self.root else tar.name

    def name(self, i: int) -> str:
        """Return the tar's name and the member's key and extension."""
        number, key, ext, *_ = self._rows[i]
        return f"{self._tar_name(number)}/{key}.{ext}" if ext else f"{self._tar_name(number)}/{key}"

    def path(self, i: int) -> str:
        """Return the sample's key with the last part of its extension: `a/x.png` for `a/x.seg.png`."""
        _, key, ext, _, _, _, *sample = self._rows[i]
        return f"{sample[0] if sample else key}.{ext.rpartition('.')[2]}" if ext else str(key)

    def read(self, i: int) -> Item:
        """Read the image and its `.txt` and `.json` members. Raises BadImage or OSError."""
        number, _, _, offset, size, extras, *_ = self._rows[i]
        with self._tars[number].open("rb") as file:
            data = _pread(file.fileno(), offset, size) if size else b""
            return Item(
                data,
                labelled(self, self._labels, i),
                {ext: _pread(file.fileno(), *at) for ext, at in extras.items()},
            )

    def labels(self) -> NDArray[np.int32]:
        """Return every sample's class number, negative without one."""
        return self._labels

    def beside(self, i: int) -> int:
        """Return the number of members that go with image i: label, caption, metadata."""
        return len(self._rows[i][5]) + self._has_cls[i]

    def size(self, i: int) -> int:
        """Return the size of the image in bytes."""
        return int(self._rows[i][4])

    def fingerprint(self) -> bytes:
        """Return a hash of the classes and of all samples."""
        return self._digest.digest()


def tar_source(where: Path, label: str | None, classes: Sequence[str] | None, modal: bool = False) -> TarSource:
    """Return a tar, or the tars of a folder in the order of their names, as a source.

    For a shard set, the shards and classes are those of its manifest; a folder of shard sets gives the shards of all.

    Args:
        modal: keep sound and video, and samples without an image, as for a set whose manifest counts modalities.

    Raises:
        UserError: there is no tar, a tar is compressed, or `TarSource` raises it.
    """
    if where.is_file():
        return TarSource([where], where, label, classes, modal=modal)
    if manifests.is_shard_set(where):
        manifest = manifests.load(where)
        manifests.check_sizes(manifest)
        shards = [where / shard.name for shard in manifest.shards]
        modal = modal or bool(manifest.modalities)
        if label is None:
            return TarSource(shards, where, label, classes, manifest.classes or None, modal)
        return TarSource(shards, where, label, classes or manifest.classes or None, modal=modal)
    left = LeftOut()
    tars = visible_files(where, (".tar", *COMPRESSED_TARS), left)
    if compressed := [tar for tar in tars if tar.name.lower().endswith(COMPRESSED_TARS)]:
        raise UserError(f"{compressed[0]}: compressed tars cannot be read in random order; decompress them first")
    if not tars:
        raise UserError(f"{where}: holds no .tar files")
    names = _classes_of_sets(where, {tar.parent for tar in tars}) if label is None else None
    source = TarSource(tars, where, label, classes, names, modal)
    source.left_out.update(left)
    return source


def _classes_of_sets(where: Path, folders: set[Path]) -> Sequence[str] | None:
    """Return the class names that all sets in a folder of shard sets have in common; None when they have none, or when
    not all tars belong to sets. Raise UserError when sets have different classes."""
    if not all(manifests.is_shard_set(folder) for folder in folders):
        return None
    found: dict[tuple[str, ...], Path] = {}
    for folder in sorted(folders):
        found.setdefault(manifests.load(folder).classes, folder)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(
            f"{where}: its sets {one.name} and {other.name} have different classes, whose numbers would be mixed up; "
            "give --label none, or write both sets with the same --classes FILE"
        )
    return next(iter(found)) or None


def _samples(number: int, entry: Entry) -> Iterator[tuple[list[Any], dict[str, str]]]:
    """Yield (row, members) for each sample among the members of one key.

    The row is [number of the tar, key of the members, extension, offset and size of the image, extras]; if the sample's
    key differs from that of the members, it follows as the last value. `members` maps `cls`, `json` and `txt`, where
    the sample has them, to the extensions of these members.
    """
    chosen = chosen_images(entry.members)
    for image in chosen:
        found = {kind: companion(entry.members, image, kind) for kind in ("cls", *EXTRAS)}
        members = {kind: ext for kind, ext in found.items() if ext is not None and not _too_large(ext, entry)}
        extras = {kind: entry.members[ext] for kind, ext in members.items() if kind in EXTRAS}
        key = sample_key(entry.key, image, chosen)
        yield [number, entry.key, image, *entry.members[image], extras, *([key] if key != entry.key else [])], members


def _modal_samples(number: int, entry: Entry) -> Iterator[tuple[list[Any], dict[str, str]]]:
    """Yield the one sample of a key, as `_samples`, with its sound, video and text; the image's extension may be empty."""
    image = plain_image(entry.members)
    texts = [ext for ext in EXTRAS if ext in entry.members and not _too_large(ext, entry)]
    extras = [*(ext for ext in entry.members if is_member(ext)), *texts]
    if image is None and not extras:
        return
    members = {ext: ext for ext in [*extras, "cls"] if ext in entry.members}
    place = entry.members[image] if image else (0, 0)
    yield [number, entry.key, image or "", *place, {ext: entry.members[ext] for ext in extras}], members


def _too_large(extension: str, entry: Entry) -> bool:
    return extension.rpartition(".")[2] in EXTRAS and entry.members[extension][1] > MAX_EXTRA


def _why(extension: str, entry: Entry, has_sample: bool) -> str:
    """Return the reason for which a member belongs to no sample."""
    if is_image(extension):
        return f"image beside the one of its key (.{extension[:24]})"
    if extension.rpartition(".")[2] not in (*EXTRAS, "cls"):
        return left_out.not_an_image(extension)
    if not has_sample:
        return left_out.NO_IMAGE
    if _too_large(extension, entry):
        return left_out.EXTRA_TOO_LARGE
    kind = extension.rpartition(".")[2]
    others = set(filter(is_image, entry.members)).difference(chosen_images(entry.members))
    if any(companion(entry.members, image, kind) == extension for image in others):
        return left_out.WENT_WITH
    return f"beside another .{kind} of its key"


def _spelled(handle: int, entry: Entry, extension: str) -> str:
    """Return the name of a member as its header spells it if the block before its bytes holds the whole name, else its
    key and extension."""
    start = entry.members[extension][0] - BLOCK
    written = os.pread(handle, 100, start) if start >= 0 else b""
    name = written.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return "/".join(parts_of(name)) if split_name(name) == (entry.key, extension) else f"{entry.key}.{extension}"


def _pread(handle: int, offset: int, size: int) -> bytes:
    data = os.pread(handle, size, offset)
    if len(data) != size:
        raise BadImage(f"{len(data)} of {size} bytes could be read")
    return data
