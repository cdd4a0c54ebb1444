"""Tars in the WebDataset convention, and plain tars of images: one tar or a folder of them. Nothing is extracted."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from esvit_scale.data import left_out
from esvit_scale.data import manifest as manifests
from esvit_scale.data.decode import EXTENSIONS, BadImage
from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import MEMBERS
from esvit_scale.data.manifest import Entry
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
from esvit_scale.errors import UserError

HOW_LABELS = (None, "none", "parent", "archive")
MAX_LABEL = 256  # bytes of a `.cls` member


class TarSource(Source):
    """Every sample that has an image; `.txt` and `.json` members go with it, others are left out and counted.

    Args:
        root: names of tars in messages start here.
        label: None: the `.cls` member; `parent`: the folder in the tar; `archive`: the tar's name; `none`.

    Raises:
        UserError: a tar cannot be read, or no tar holds an image.
    """

    def __init__(
        self, tars: Sequence[Path], root: Path, label: str | None = None, classes: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if label not in HOW_LABELS:
            raise UserError(
                f"--label {label}: of tars the class can be 'parent' (folder), 'archive' (the tar's name) or 'none'; "
                "by default it is the .cls member"
            )
        self.root, self._tars, self._how = root, list(tars), label
        self._rows, self._digest = Rows(), hashlib.sha256(repr((label, classes)).encode())
        labels = Labels()
        for number, tar in enumerate(self._tars):
            try:
                self._add(number, tar, labels)
            except OSError as error:
                raise UserError(f"{tar}: {error.strerror or error}") from None
        self._rows.finish()
        if not len(self._rows):
            first = f" (first: {self.notes[0]})" if self.notes else ""
            first = f"{first}; they hold {self.left_out.short()}" if self.left_out else first
            raise UserError(f"{root}: no image in its {len(self._tars)} tars{first}")
        self.classes, self._labels = labels.finish(classes)

    def _add(self, number: int, tar: Path, labels: Labels) -> None:
        entries, damage = _entries(tar)
        if damage:
            self.notes.append(f"{tar}: {damage}: only what stands before can be used")
            self.damaged.append((self._tar_name(number), damage))
        self._digest.update(b"\0%s\0%d" % (os.fsencode(self._tar_name(number)), tar.stat().st_size))
        with tar.open("rb") as file:
            for entry in entries:
                place = manifests.image_member(entry)
                self._count_others(number, entry)
                if place is None:
                    continue
                ext = next(ext for ext in entry.members if ext in EXTENSIONS)
                extras = {e: at for e, at in entry.members.items() if e in EXTRAS and at[1] <= MAX_EXTRA}
                row = [number, entry.key, ext, *place, extras]
                self._rows.append(row)
                self._digest.update(json.dumps(row).encode())
                labels.append(self._label(file.fileno(), tar, entry))

    def _count_others(self, number: int, entry: Entry) -> None:
        """Count the members of a group that are not used."""
        has_image = manifests.image_member(entry) is not None
        for ext in entry.members:
            name = printable(f"{self._tar_name(number)}/{entry.key}.{ext}")
            if ext not in EXTENSIONS and ext not in (*EXTRAS, "cls"):
                self.left_out.add(MEMBERS, left_out.not_an_image(printable(ext)), name)
            elif not has_image:
                self.left_out.add(MEMBERS, left_out.NO_IMAGE, name)

    def _label(self, handle: int, tar: Path, entry: Entry) -> str | None:
        if self._how == "archive":
            return printable(tar.stem)
        if self._how == "parent":
            return printable(parent_label(entry.key) or "") or None
        if self._how is None and "cls" in entry.members:
            offset, size = entry.members["cls"]
            return os.pread(handle, min(size, MAX_LABEL), offset).decode("utf-8", "backslashreplace")
        return None

    def __len__(self) -> int:
        return len(self._rows)

    def _tar_name(self, number: int) -> str:
        tar = self._tars[number]
        return tar.relative_to(self.root).as_posix() if tar != self.root else tar.name

    def name(self, i: int) -> str:
        number, key, ext, *_ = self._rows[i]
        return f"{self._tar_name(number)}/{key}.{ext}"

    def path(self, i: int) -> str:
        _, key, ext, *_ = self._rows[i]
        return f"{key}.{ext}"

    def read(self, i: int) -> Item:
        number, _, _, offset, size, extras = self._rows[i]
        with self._tars[number].open("rb") as file:
            data = _pread(file.fileno(), offset, size)
            return Item(
                data,
                labelled(self, self._labels, i),
                {ext: _pread(file.fileno(), *at) for ext, at in extras.items()},
            )

    def size(self, i: int) -> int:
        return int(self._rows[i][4])

    def fingerprint(self) -> bytes:
        return self._digest.digest()


def tar_source(where: Path, label: str | None, classes: Sequence[str] | None) -> TarSource:
    """A tar, or the tars of a folder in the order of their names; of a shard set, the manifest's shards and classes; of
    a folder of shard sets, all of theirs.

    Raises:
        UserError: no tar there, a compressed one, and as TarSource.
    """
    if where.is_file():
        return TarSource([where], where, label, classes)
    compressed = sorted(p.name for p in where.glob("*.tar.*")) + sorted(p.name for p in where.glob("*.tgz"))
    if compressed:
        raise UserError(f"{where / compressed[0]}: compressed tars cannot be read at random; decompress them first")
    if manifests.is_shard_set(where):
        manifest = manifests.load(where)
        manifests.check_sizes(manifest)
        named = classes or manifest.classes or None
        return TarSource([where / shard.name for shard in manifest.shards], where, label, named)
    tars = visible_files(where, ".tar")
    if not tars:
        raise UserError(f"{where}: no .tar files in it")
    if label is None and classes is None:
        classes = _classes_of_sets(where, {tar.parent for tar in tars})
    return TarSource(tars, where, label, classes)


def _classes_of_sets(where: Path, folders: set[Path]) -> Sequence[str] | None:
    """The class names of a folder of shard sets; None when the tars are not all from sets."""
    if not all(manifests.is_shard_set(folder) for folder in folders):
        return None
    found: dict[tuple[str, ...], Path] = {}
    for folder in sorted(folders):
        found.setdefault(manifests.load(folder).classes, folder)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise UserError(
            f"{where}: the sets {one.name} and {other.name} in it have different classes, whose numbers would be mixed up; "
            "give --label none, or make both with the same --classes FILE"
        )
    return next(iter(found)) or None


def _entries(tar: Path) -> tuple[Sequence[Entry], str]:
    """By the index beside the tar, where there is one that can be true, else by the tar's headers."""
    try:
        entries, end = list(manifests.read_side_car(tar)), tar.stat().st_size
        if all(offset + size <= end for entry in entries for offset, size in entry.members.values()):
            return entries, ""
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    return manifests.scan_and_judge(tar)


def _pread(handle: int, offset: int, size: int) -> bytes:
    data = os.pread(handle, size, offset)
    if len(data) != size:
        raise BadImage(f"{len(data)} of {size} bytes could be read")
    return data
