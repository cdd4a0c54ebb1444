"""A folder of images as a list of files with labels."""

import os
import stat
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from esvit_scale.data.decode import EXTENSIONS, BadImage
from esvit_scale.data.manifest import MAX_MEMBER
from esvit_scale.errors import UserError


class ImageFile(NamedTuple):
    path: str  # relative to the folder, may hold undecodable bytes as surrogates (os.fsencode)
    label: int  # index of its class; -1 when the folder is flat


@dataclass(frozen=True)
class ImageFolder:
    root: Path
    files: list[ImageFile]  # sorted by path
    classes: tuple[str, ...]
    ignored: dict[str, int]  # files left out: extension → how many


def printable(path: str) -> str:
    """A path as one line of text that any terminal and any UTF-8 file can take."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def list_images(root: Path) -> ImageFolder:
    """Every image file under `root`, by its extension; hidden files and folders are left out, links are followed for
    files only.

    The class of an image is its first-level subfolder. When any image lies directly in `root`, the folder is flat:
    there are no classes.

    Raises:
        UserError: the folder is missing or holds no image file; a subfolder cannot be listed.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}{_nearest(root)}")
    paths: list[str] = []
    ignored: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            ext = name.rpartition(".")[2].lower() if "." in name else ""
            if ext in EXTENSIONS and not name.startswith("."):
                paths.append(os.path.relpath(os.path.join(folder, name), root))  # noqa: PTH118
            else:
                ignored[printable("." + ext) if ext else "no extension"] += 1
    if not paths:
        held = ", ".join(f"{n} {ext}" for ext, n in ignored.most_common(5)) or "nothing"
        raise UserError(f"{root}: no image files; it holds {held}, and images end in {', '.join(sorted(EXTENSIONS))}")
    paths.sort(key=os.fsencode)
    flat = any("/" not in path for path in paths)
    names = [] if flat else sorted({path.split("/", 1)[0] for path in paths}, key=os.fsencode)
    labels = {name: i for i, name in enumerate(names)}
    files = [ImageFile(path, -1 if flat else labels[path.split("/", 1)[0]]) for path in paths]
    return ImageFolder(root, files, tuple(printable(name) for name in names), dict(ignored))


def read_file(path: Path) -> bytes:
    """The bytes of an image file. Raises BadImage (a pipe, a device, too large) or OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not a regular file")
    if status.st_size > MAX_MEMBER:
        raise BadImage(f"{status.st_size} bytes: over the limit of {MAX_MEMBER}")
    return path.read_bytes()


def _refuse(error: OSError) -> None:
    """A subfolder that cannot be listed is not the same as an empty one."""
    raise UserError(f"{printable(str(error.filename))}: {error.strerror}")


def _nearest(path: Path) -> str:
    """What exists of a path that does not."""
    if path.exists():
        return f"; nearest: {path.parent}"
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    close = get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1) if parent == path.parent else []
    return f"; did you mean {parent / close[0]}?" if close else f"; the nearest folder that exists is {parent}"
