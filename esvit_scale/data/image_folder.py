"""The listing of a folder of images: files with labels. Links are followed, and everything left out is counted."""

import errno
import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from esvit_scale.data import left_out
from esvit_scale.data.class_names import numbered, remark
from esvit_scale.data.decode import EXTENSIONS, BadImage
from esvit_scale.data.left_out import FILES, FOLDERS, IMAGES, LeftOut
from esvit_scale.data.raster import ARRAY
from esvit_scale.data.tar_names import MAX_MEMBER
from esvit_scale.errors import UserError

# Names of the splits of data sets: train, test_images, val-00, seg_train
SPLIT = re.compile(r"(?:seg_)?(train(?:ing)?|test(?:ing)?|val(?:id|idation)?|dev|eval|holdout)(?![a-z])", re.IGNORECASE)


class ImageFile(NamedTuple):
    """An image file of a folder, and its class."""

    path: str  # relative to the folder; may contain undecodable bytes as surrogates (os.fsencode)
    label: int  # class number; -1 without one


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images and everything that its listing found."""

    root: Path
    files: list[ImageFile]  # sorted by path
    classes: tuple[str, ...]
    left_out: LeftOut  # counts of everything else in the folder
    beside: list[str]  # paths of files with the further endings asked for (captions, metadata)
    notes: list[str] = field(default_factory=list)  # lines to show to the user


def printable(path: str) -> str:
    """Return a path as one line of printable text that is valid UTF-8."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def list_images(
    root: Path,
    label: str | None = None,
    beside: Sequence[str] = (),
    keep_loose: bool = False,
    skip: Collection[str] = (),
) -> ImageFolder:
    """List every image file under `root` by its extension, following links; `.npy` arrays are the images if there are none.

    Hidden files, the contents of hidden folders, links that lead back to a folder above them, and files without the
    extension of an image are left out and counted.

    Args:
        label: None: the class of an image is its first-level subfolder; an image directly in `root` is left out and counted,
            but if at least half of the images lie there, there are no classes. `parent`: the class is the folder of the
            image. `none`: there are no classes.
        keep_loose: keep images that lie directly in `root` beside class folders, without a label.
        beside: further endings (`txt`); files with one of them are listed separately and not counted as left out.
        skip: as in `walk`.

    Raises:
        UserError: the folder is missing, holds no image file, or holds more arrays than image files; a subfolder cannot be
            listed; an image lies in no subfolder, with `parent`.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}{_nearest(root)}")
    left, paths, others = LeftOut(), [], []
    arrays: list[str] = []
    for path in walk(root, left, skip):
        if (ending := _ending(path)) in EXTENSIONS:
            paths.append(path)
        elif ending and ending in beside:
            others.append(path)
        elif ending == ARRAY:
            arrays.append(path)
        else:
            left.add(FILES, left_out.not_an_image(printable(ending)), printable(path))
    check_arrays(root, paths, arrays)
    if not paths:
        paths, arrays = arrays, []
    for path in arrays:
        left.add(IMAGES, left_out.BESIDE_IMAGES, printable(path))
    if not paths:
        held = left.short() or "nothing"
        raise UserError(f"{root}: no image files; it holds {held}; images end in {', '.join(sorted(EXTENSIONS))}")
    paths.sort(key=os.fsencode)
    return _labelled(root, paths, label, left, others, keep_loose)


def check_arrays(where: Path, images: Sequence[str], arrays: Sequence[str]) -> None:
    """Raise UserError when there are image files but more `.npy` arrays.

    The few image files (previews, plots) would be used in place of the arrays.
    """
    if images and len(arrays) > len(images):
        raise UserError(
            f"{where}: {len(arrays):,} .npy arrays (first: {printable(min(arrays))}) beside {len(images):,} image files "
            f"(first: {printable(min(images))}); only one of the two kinds can be the images: move the other away"
        )


def _labelled(
    root: Path, paths: list[str], label: str | None, left: LeftOut, others: list[str], keep_loose: bool
) -> ImageFolder:
    """Give the images in `paths` their classes by the rules of `list_images`, and return the listing."""
    notes: list[str] = []
    loose = [path for path in paths if "/" not in path]
    if label == "none" or (label is None and 2 * len(loose) >= len(paths)):
        if label is None and len(loose) < len(paths):
            notes.append(
                f"{root}: {len(loose)} of {len(paths)} images lie directly in it (first: {printable(loose[0])}): no classes"
            )
        return ImageFolder(root, [ImageFile(path, -1) for path in paths], (), left, others, notes)
    if loose and label == "parent":
        more = f" (and {len(loose) - 1} more)" if len(loose) > 1 else ""
        raise UserError(
            f"{root}: {printable(loose[0])} lies in no subfolder that could be its class{more}; move it into one, or leave "
            "--label parent out"
        )
    if loose and keep_loose:
        notes.append(
            f"{root}: {len(loose)} of {len(paths)} images lie beside the class folders and have no label (first: "
            f"{printable(loose[0])})"
        )
    elif loose:
        left.add(IMAGES, left_out.BESIDE_CLASSES, printable(loose[0]), len(loose))
        notes.append(
            f"{root}: {len(loose)} of {len(paths)} images beside the class folders are left out (first: "
            f"{printable(loose[0])}); --label none uses all images, without classes"
        )
        paths = [path for path in paths if "/" in path]
    of = (lambda path: path.split("/")[-2]) if label == "parent" else (lambda path: path.split("/", 1)[0])
    if label is None:
        notes += filter(None, [_splits_as_classes(root, paths)])
    names, number = numbered({of(path) for path in paths if "/" in path}, folders=True)
    if said := remark(number, names, folders=True):
        notes.append(f"{root}: {said}")
    if len(names) == 1 and label is None and any(path.count("/") > 1 for path in paths):
        notes.append(
            f"{root}: one class, {printable(names[0])}; --label parent makes the innermost folders the classes"
        )
    if label is None:
        _count_empty_classes(root, list(number), left)
    files = [ImageFile(path, number[of(path)] if "/" in path else -1) for path in paths]
    return ImageFolder(root, files, tuple(printable(name) for name in names), left, others, notes)


def _splits_as_classes(root: Path, paths: Sequence[str]) -> str:
    """Return a line for the user when all class folders are named like splits of a data set (`train`, `test`), else ""."""
    tops = {path.split("/", 1)[0] for path in paths if "/" in path}
    if len(tops) < 2 or not all(SPLIT.match(top) for top in tops):
        return ""
    deeper = any(path.count("/") > 1 for path in paths)
    other = "--label parent" if deeper else "--label none"
    return (
        f"{root}: its folders ({', '.join(sorted(map(printable, tops))[:4])}) are named like splits and became the classes; "
        f"give one split's folder, or {other}"
    )


def _count_empty_classes(root: Path, classes: Sequence[str], left: LeftOut) -> None:
    top = _place(root.stat())
    for entry in _entries(os.fspath(root)):
        place = _folder_place(entry)  # a link to the root itself is counted as a link loop
        if place not in (None, top) and not entry.name.startswith(".") and entry.name not in classes:
            left.add(FOLDERS, left_out.EMPTY_CLASS, printable(entry.name))


def walk(root: Path, left: LeftOut, skip: Collection[str] = ()) -> Iterator[str]:
    """Yield the paths of the files below a folder, relative to it, through links to folders.

    Hidden files, circular and dangling links and special files are counted in `left`. Dangling links and special files that
    are named like images are yielded, so that whoever reads them reports them.

    Args:
        skip: paths of files and folders, relative to `root`, that are skipped and not counted.

    Raises:
        UserError: a folder cannot be listed.
    """
    top = _place(os.stat(root))  # noqa: PTH116 (paths may be undecodable)
    waiting: list[tuple[str, tuple[tuple[int, int], ...], bool]] = [("", (top,), False)]
    while waiting:
        folder, above, hidden = waiting.pop()
        for entry in _entries(os.path.join(root, folder)):  # noqa: PTH118
            path = f"{folder}/{entry.name}" if folder else entry.name
            if path in skip:
                continue
            concealed = hidden or entry.name.startswith(".")
            inner = _folder_place(entry)
            if inner is not None and inner not in above:
                waiting.append((path, (*above, inner), concealed))
            elif inner is not None:
                left.add(FOLDERS, left_out.LINK_LOOP, printable(path))
            elif _usable(entry, path, concealed, left):
                yield path


def _entries(path: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:  # a subfolder that cannot be listed is not the same as an empty one
        raise UserError(f"{printable(str(error.filename))}: {error.strerror}") from None


def _place(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _folder_place(entry: "os.DirEntry[str]") -> tuple[int, int] | None:
    """Return (device, inode) of a folder, or of the folder that a link leads to; None for anything else."""
    try:
        return _place(entry.stat()) if entry.is_dir() else None
    except OSError:  # a link that leads nowhere
        return None


def _usable(entry: "os.DirEntry[str]", path: str, concealed: bool, left: LeftOut) -> bool:
    """Return whether `walk` lists an entry that is not a folder; if it does not, count the entry in `left`."""
    if concealed:
        left.add(FILES, left_out.HIDDEN, printable(path))
        return False
    if _ending(path) in EXTENSIONS:
        return True
    try:
        if entry.is_file():
            return True
        exists = Path(entry.path).exists()
    except OSError:  # a link to itself
        exists = False
    left.add(FILES, left_out.SPECIAL if exists else left_out.DANGLING, printable(path))
    return False


def _ending(path: str) -> str:
    """Return the ending of a path in lower case: `jpg` for `a/b.JPG`; empty when there is none."""
    base = path.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file. Raises BadImage for a pipe, a device or a file too large, or OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a regular file", left_out.SPECIAL)
    if status.st_size > MAX_MEMBER:
        raise BadImage(f"{status.st_size} bytes: over the limit of {MAX_MEMBER}", left_out.TOO_LARGE)
    return path.read_bytes()


def os_reason(error: OSError) -> tuple[str, str]:
    """Return why a file could not be read, as (message, reason of left_out.py by which to count it)."""
    words = error.strerror or str(error)
    if error.errno in (errno.ENOENT, errno.ELOOP):
        linked = error.filename is not None and os.path.islink(error.filename)  # noqa: PTH114 (may be bytes)
        return (f"dangling link: {words}", left_out.DANGLING) if linked else (words, left_out.MISSING)
    return words, left_out.UNREADABLE


def _nearest(path: Path) -> str:
    """Return a hint for a message about a path that is no folder: a similar name, or the nearest existing folder."""
    if path.exists():
        return f"; nearest: {path.parent}"
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    close = get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1) if parent == path.parent else []
    return f"; did you mean {parent / close[0]}?" if close else f"; the nearest folder that exists is {parent}"
