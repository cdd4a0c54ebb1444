"""Samples of more than an image as a source: files of one name in a folder, or the columns of a table.

    folder   a/x.png a/x.ogg a/x.txt             --members audio,text    one sample, a/x
             a/x.0000.jpg a/x.0001.jpg …         --members video         its frames
    table    image,speech,film,caption,fr,en     --audio-column speech --video-column film --caption caption --fields fr,en

A sample may lack any of them. The path in a video column is a file or a folder of frames.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale import store_urls
from esvit_scale.data import left_out
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.data.image_folder import os_reason, printable, read_file, walk
from esvit_scale.data.left_out import FILES, NO_PATH, ROWS, LeftOut
from esvit_scale.data.remote import url_files
from esvit_scale.data.signal_members import AUDIO, MODALITIES, TEXT, VIDEO
from esvit_scale.data.sources.base import Item, Labels, Rows, Source, extension, labelled, parent_label
from esvit_scale.errors import UserError, nearest

NUMBERED = re.compile(r"(.+)\.(\d{3,9})")  # name of a frame without its ending: the clip's name, and the frame's number
IMAGE = "image"  # the member that is the sample's image, among the others by their extensions


class MemberRow(NamedTuple):
    """One sample as it is found: where its members lie."""

    name: str  # for messages and the sample's key, without an ending
    label: str | None
    files: Mapping[str, str]  # IMAGE or extension → path, relative to the source's root, or URL
    texts: Mapping[str, str] = {}  # extension → text that the source itself holds


class MemberSource(Source):
    """A source of samples of several members, of which every one may be missing.

    Args:
        rows: the samples, in an order that depends on the source's content alone.
        root: folder or URL where relative paths start.
        classes: class names in the order of their numbers; None: from the labels.
    """

    modal = True

    def __init__(self, rows: Iterable[MemberRow], root: Path | str, classes: Sequence[str] | None) -> None:
        super().__init__()
        self._start = root
        self.root = root if isinstance(root, Path) else Path("/")
        self._rows, labels = Rows(), Labels()
        digest = hashlib.sha256(repr((str(root) if isinstance(root, str) else "", classes)).encode())
        for row in rows:
            sizes = {
                ext: _size(place) for ext, path in row.files.items() if isinstance(place := self._place(path), Path)
            }
            if problem := next(filter(None, map(store_urls.secret_in_url, row.files.values())), ""):
                raise UserError(f"{printable(row.name)}: {problem}")
            digest.update(repr((row, sizes)).encode("utf-8", "surrogatepass"))
            self._rows.append([row.name, dict(row.files), dict(row.texts), sum(sizes.values())])
            labels.append(row.label)
        self._rows.finish()
        self._digest = digest.digest()
        self.classes, self._labels = labels.finish(classes)
        self.notes += labels.notes

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, i: int) -> str:
        """Return the sample's name."""
        name: str = self._rows[i][0]
        return name

    def path(self, i: int) -> str:
        """Return the name as a relative path, with the image's ending if there is an image."""
        name, files, *_ = self._rows[i]
        if store_urls.protocol(name):
            name = name.partition("://")[2].partition("?")[0]
        name = "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
        ending = extension(files.get(IMAGE, "").partition("?")[0])
        return f"{name}.{ending}" if ending in EXTENSIONS else name

    def _place(self, path: str) -> Path | str:
        if store_urls.protocol(path):
            return path
        return store_urls.join(self._start, path) if isinstance(self._start, str) else self._start / path

    def read(self, i: int) -> Item:
        """Read the members. One that cannot be read is named in the item; raises BadImage if none can be."""
        _, files, texts, _ = self._rows[i]
        found = {ext: text.encode("utf-8", "backslashreplace") for ext, text in texts.items()}
        missing: dict[str, tuple[str, str]] = {}
        for ext, path in files.items():
            place = self._place(path)
            try:
                found[ext] = url_files.read(place) if isinstance(place, str) else read_file(place)
            except BadImage as error:
                missing[ext] = str(error), error.kind
            except OSError as error:
                if not os.path.exists(self.root):  # noqa: PTH110 (the whole source is gone: the caller waits for it)
                    raise
                missing[ext] = os_reason(error)
        if not found:
            raise BadImage(*(next(iter(missing.values())) if missing else ("no member", left_out.EMPTY)))
        return Item(found.pop(IMAGE, b""), labelled(self, self._labels, i), found, missing)

    def labels(self) -> NDArray[np.int32]:
        """Return every sample's class number, negative without one."""
        return self._labels

    def size(self, i: int) -> int:
        """Return the size of all members in bytes, as far as they are files."""
        return int(self._rows[i][3])

    def fingerprint(self) -> bytes:
        """Return a hash of all rows, with the sizes of their files."""
        return self._digest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --- folders ---------------------------------------------------------------------------------------------------------


def parse_members(text: str) -> tuple[str, ...]:
    """Return the modalities of `--members audio,video,text`. Raises UserError for an unknown one."""
    found = tuple(filter(None, (word.strip() for word in text.split(","))))
    if unknown := next((word for word in found if word not in MODALITIES), None):
        raise UserError(f"--members {unknown}: expected some of {', '.join(MODALITIES)}{nearest(unknown, MODALITIES)}")
    return found


def member_folder(root: Path, members: Sequence[str], label: str | None, classes: Sequence[str] | None) -> MemberSource:
    """Return the files below a folder as a source: those of one name are one sample.

    Args:
        members: of MODALITIES, what belongs to a sample beside its image; other files are counted as left out.
        label: `parent`: the class is the folder that holds the files; None or `none`: no classes.

    Raises:
        UserError: no file belongs to a sample, or a folder cannot be listed.
    """
    left = LeftOut()
    endings = [*EXTENSIONS, *(ext for name in members for ext in {"audio": AUDIO, "video": VIDEO, "text": TEXT}[name])]
    groups: dict[str, dict[str, str]] = {}
    for path in sorted(walk(root, left), key=os.fsencode):
        ending = extension(path)
        if ending not in endings:
            left.add(FILES, left_out.not_an_image(printable(ending)), printable(path))
            continue
        stem = path.rpartition(".")[0]
        frame = NUMBERED.fullmatch(stem) if "video" in members and ending in EXTENSIONS else None
        what = f"frame-{int(frame[2]):06d}.{ending}" if frame else IMAGE if ending in EXTENSIONS else ending
        own = groups.setdefault(frame[1] if frame else stem, {})
        if what in own:
            left.add(FILES, f"beside another {what} of its name", printable(path))
        else:
            own[what] = path
    labels = (lambda name: parent_label(f"{name}.x")) if label == "parent" else (lambda name: None)
    ordered = sorted(groups.items(), key=lambda item: os.fsencode(item[0]))
    source = MemberSource((MemberRow(name, labels(name), files) for name, files in ordered), root, classes)
    if not len(source):
        raise UserError(
            f"{root}: holds no image and none of {', '.join(members)}; it holds {left.short() or 'nothing'}"
        )
    source.left_out = left
    return source


# --- tables ----------------------------------------------------------------------------------------------------------


class MemberColumns(NamedTuple):
    """The columns of a table of several members; None for one that is not used."""

    image: int | None
    audio: int | None
    video: int | None
    label: int | None
    caption: int | None
    fields: Mapping[str, int]  # names of fields of the sample's .json


def member_rows(
    lines: Iterable[tuple[int, list[str]]], columns: MemberColumns, root: Path | str, left: LeftOut
) -> Iterator[MemberRow]:
    """Yield the samples of a table's rows; rows without any member, and files of unknown kinds, are counted in `left`."""
    for line, row in lines:
        cell = {name: row[at].strip() for name, at in columns._asdict().items() if isinstance(at, int)}
        files = {IMAGE: cell["image"]} if cell.get("image") else {}
        for name, endings in (("audio", AUDIO), ("video", VIDEO)):
            if not (path := cell.get(name)):
                continue
            if (ending := extension(path.partition("?")[0])) in endings:
                files[ending] = path
            elif name == "video" and isinstance(root, Path) and (root / path).is_dir():
                files |= {f"frame-{n:06d}.{extension(p)}": p for n, p in enumerate(_frames(root, path))}
            else:
                left.add(left_out.MEMBERS, f"no {name} by its name (.{printable(ending)[:12]})", f"line {line}")
        texts = {"txt": cell["caption"]} if cell.get("caption") else {}
        if own := {name: row[at].strip() for name, at in columns.fields.items() if row[at].strip()}:
            texts["json"] = json.dumps(own, ensure_ascii=False)
        if not files and not texts:
            left.add(ROWS, NO_PATH, f"line {line}")
            continue
        place = next((cell[name] for name in ("image", "audio", "video") if cell.get(name)), "") if files else ""
        name = _without_ending(place) if place else f"row-{line}"
        yield MemberRow(name, cell.get("label"), files, texts)


def _without_ending(path: str) -> str:
    plain = path if store_urls.protocol(path) else path.rstrip("/")
    stem = plain.partition("?")[0]
    return stem.rpartition(".")[0] if extension(stem) in (*EXTENSIONS, *AUDIO, *VIDEO) else stem


def _frames(root: Path, folder: str) -> list[str]:
    """Return the paths of the images in a folder, in the order of their names."""
    names = sorted(path.name for path in (root / folder).iterdir() if extension(path.name) in EXTENSIONS)
    return [f"{folder.rstrip('/')}/{name}" for name in names]
