"""Names of tar members: the key of the sample that a member belongs to, its extension, or why it belongs to no sample.

A name is only text and is never used as a path. The rule extends WebDataset's so that file names may contain dots:

    photo.jpg, photo.cls              key photo       extensions jpg, cls
    pair.left.jpg, pair.right.jpg     key pair        extensions left.jpg, right.jpg
    22.07.png, 22.07.cls              key 22.07       extensions png, cls: a part that begins with a digit or contains
                                                      a space belongs to the key
    ./a/../b/x.jpg, /b/x.jpg          keys a/b/x, b/x

The last part of an extension decides whether a member is an image.
"""

import re
from collections.abc import Iterable

from esvit_scale.data import left_out
from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.data.raster import ARRAY

MAX_MEMBER = 1 << 30  # bytes; a larger member is no image
TAR = re.compile(r"\.tar(\.(gz|bz2|xz|zst))?$|\.tgz$", re.IGNORECASE)  # names of the tars that url_stream.py reads
COMPRESSED_TARS = (  # endings in lower case; `x.tar.md5` and `x.tar.json` do not count
    *(f".tar.{ending}" for ending in ("gz", "bz2", "xz", "zst", "zstd", "lz4", "lz", "lzma", "lzo", "z", "br")),
    *(".tgz", ".taz", ".tbz", ".tbz2", ".tz2", ".txz", ".tlz", ".tzst"),
)
MACOS = "twin made by macOS (._*, __MACOSX)"
SYSTEM = "system file (.DS_Store, Thumbs.db)"
PAX = "pax header stored as a file"
_EXTENSION_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}


def parts_of(name: str) -> list[str]:
    """Return the parts of a member's path (folders and file name), without `.`, `..` and empty parts."""
    return [part for part in name.split("/") if part not in ("", ".", "..")]


def split_name(name: str) -> tuple[str, str]:
    """Return the key of a member's sample and its extension in lower case: (`a/b`, `seg.png`) for `a/b.seg.png`.

    The key is empty for a hidden file, and the extension is empty for a name without a dot.
    """
    *folders, base = parts_of(name) or [""]
    parts = base.split(".")
    if not parts[0] or len(parts) == 1:
        return ("/".join([*folders, base]) if parts[0] else ""), ".".join(parts[1:]).lower()
    split = len(parts) - 1  # the parts from here on are the extension
    while split > 1 and _EXTENSION_PART.fullmatch(parts[split - 1]):
        split -= 1
    return "/".join([*folders, ".".join(parts[:split])]), ".".join(parts[split:]).lower()


def base_key(key: str) -> str:
    """Return the key up to the first dot of its last part, as in WebDataset: `x` for the keys `x`, `x.0` and `x.1`."""
    folder, slash, base = key.rpartition("/")
    return folder + slash + base.partition(".")[0]


def no_sample(name: str) -> str:
    """Return the reason, as in left_out.py, for which a regular file belongs to no sample; empty when it may belong to one."""
    parts = parts_of(name)
    if not parts:
        return left_out.not_an_image("")
    if "__MACOSX" in parts or parts[-1].startswith("._"):
        return MACOS
    if parts[-1] == ".DS_Store" or parts[-1].lower() in _SYSTEM_FILES:
        return SYSTEM
    if any(re.fullmatch(r"PaxHeaders?(\.\d+)?", part) for part in parts):
        return PAX
    if any(part.startswith(".") for part in parts):
        return left_out.HIDDEN
    return "" if parts[-1].rpartition(".")[0] and not parts[-1].endswith(".") else left_out.not_an_image("")


def is_image(extension: str) -> bool:
    """Return whether the last part of an extension is an image's: true for `jpg` and `seg.png`, false for `png.txt`."""
    return extension.rpartition(".")[2] in EXTENSIONS


def chosen_images(extensions: Iterable[str]) -> list[str]:
    """Return the extensions of those members of one key that become samples.

    An image with a plain extension (`jpg`) is the sample, and images with longer extensions (`seg.png`) are left out: they
    are masks, depth maps, thumbnails. If there is no plain one, each image is a sample (`left.jpg`, `right.jpg`). Of a key
    without an image, an `npy` array is the sample.
    """
    extensions = list(extensions)
    images = [extension for extension in extensions if is_image(extension)]
    if not images and ARRAY in extensions:
        return [ARRAY]
    return [extension for extension in images if "." not in extension] or images


def companion(extensions: Iterable[str], image: str, kind: str) -> str | None:
    """Return the extension of the member that holds an image's label or text; None if there is none or it is unclear.

    It is the member named after the image's whole extension (`jpg.cls` for `jpg`), else the one with the same prefix
    (`left.cls` for `left.jpg`), else the plain one (`cls`), else the only one of this kind, unless that is named after
    another image of the key.

    Args:
        extensions: of all members of the key.
        image: the image's extension.
        kind: last part of the extension to find: `cls`, `json` or `txt`.
    """
    extensions = list(extensions)
    found = [extension for extension in extensions if extension.rpartition(".")[2] == kind]
    middle = image.rpartition(".")[0]
    named = next((e for e in (f"{image}.{kind}", f"{middle}.{kind}", kind) if e in found), None)
    if named or len(found) != 1:
        return named
    stem = found[0].rpartition(".")[0]
    of_another = any(stem in (e, e.rpartition(".")[0]) for e in extensions if is_image(e))
    return None if of_another else found[0]


def sample_key(key: str, image: str, chosen: Iterable[str]) -> str:
    """Return the key of the sample made from an image: the members' key, with a suffix if several samples share it.

    The suffix is `.left` for `left.jpg`, and `.png` for a `png` that is not the first of the chosen images.
    """
    middle, others = image.rpartition(".")[0], list(chosen)
    if len(others) == 1 or (not middle and image == others[0]):
        return key
    return f"{key}.{middle or image}"


def parse_label(text: bytes) -> int:
    """Return the class number that a `.cls` member holds; -1 when it holds none."""
    try:
        return int(text[:20])
    except ValueError:
        return -1
