"""Detecting the format of a weight file (safetensors or torch.save) from its first bytes.

The file's name is not trusted: behind the name of a weight file may be a web page, a Git LFS pointer or an incomplete
download. The error message then says in one line what the file really is.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Literal

from esvit_scale.errors import UserError

FileFormat = Literal["safetensors", "torch"]

HEAD_BYTES = 4096  # how many bytes of a file are looked at
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
DOWNLOAD_AGAIN = "download or copy it again"
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of files by torch before 1.6
_MAGIC_NUMBERS = (
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, MATLAB)"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"PAR1", "a Parquet table"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program or library (ELF)"),
)
_MARKUP = (
    (re.compile(rb"<html|<!doctype html|<head[\s>]|<body[\s>]", re.IGNORECASE), "an HTML page"),
    (re.compile(rb"^<\?xml|^<error", re.IGNORECASE), "an XML document"),
)


def detect_format(path: Path) -> FileFormat:
    """Return whether `path` is a safetensors file or was written by torch.save ("torch"); no code in the file is run.

    Raises:
        UserError: the file does not exist, is truncated, or holds no weights; the message says what it is instead.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file of weights")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= LARGEST_HEADER:
        _check_safetensors(path, header, size)
        return "safetensors"
    if head.startswith(b"PK"):
        _check_zip(path, head, size)
        return "torch"
    if head[:1] == b"\x80" and _LEGACY_MAGIC[1:] in head[:64]:
        return "torch"
    raise UserError(f"{path}: not weights but {_describe_content(head, size)}")


def _check_safetensors(path: Path, header: int, size: int) -> None:
    """Raise UserError if a safetensors file is shorter than its header says, or the header is damaged.

    Args:
        header: bytes of the header.
        size: bytes of the file.
    """
    if 8 + header > size:
        raise UserError(f"{path}: a safetensors file cut short: {size} bytes are there; {DOWNLOAD_AGAIN}")
    with path.open("rb") as file:
        file.seek(8)
        try:
            tensors = json.loads(file.read(header))
            end = max((t["data_offsets"][1] for n, t in tensors.items() if n != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise UserError(
                f"{path}: a damaged safetensors file (its header is no list of tensors); {DOWNLOAD_AGAIN}"
            ) from None
    if 8 + header + end > size:
        raise UserError(
            f"{path}: a safetensors file cut short: {size} of {8 + header + end} bytes are there; {DOWNLOAD_AGAIN}"
        )


def _check_zip(path: Path, head: bytes, size: int) -> None:
    """Raise UserError unless a zip archive is complete and was written by torch.save."""
    of_torch = b"/data.pkl" in head[:256]
    if not zipfile.is_zipfile(path):
        what = "a torch checkpoint" if of_torch else "a zip archive"
        raise UserError(f"{path}: {what} cut short: {size} bytes are there, its end is missing; {DOWNLOAD_AGAIN}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path}: a damaged zip archive: {error}; {DOWNLOAD_AGAIN}") from None
    folders = {name.rpartition("/")[0] for name in names if name.endswith("/data.pkl")}
    if any(f"{folder}/constants.pkl" in names for folder in folders):
        raise UserError(f"{path}: not weights but a TorchScript program; save the module's state_dict() from it")
    if not folders:
        of_numpy = bool(names) and all(name.endswith(".npy") for name in names)
        held = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        what = "NumPy arrays (.npz)" if of_numpy else f"a zip archive of {held or 'nothing'}; unpack it first"
        raise UserError(f"{path}: not weights but {what}")


def _describe_content(head: bytes, size: int) -> str:
    """Return a description of a file that holds no weights, from its first bytes and its size."""
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return f"zeros{' at its beginning' if size > HEAD_BYTES else ''} (an unfinished download?)"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return "a Python pickle but no checkpoint of torch.save; it was not opened, since pickles can run code"
    found = next((what for magic, what in _MAGIC_NUMBERS if head.startswith(magic)), None)
    return found or _describe_text(head) or f"an unknown file (it begins with {head[:8]!r})"


def _describe_text(head: bytes) -> str | None:
    """Return a description of a text file, from its first bytes; None if the bytes are not text."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16
        head = head.decode("utf-16", "ignore").encode()
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        stands_for = re.search(rb"\nsize (\d+)", head)
        of = f" for {int(stands_for[1])} bytes" if stands_for else ""
        return f"a Git LFS pointer{of} (`git lfs pull` fetches the file itself)"
    if head.startswith(b"/annex/objects/"):
        return "a git-annex pointer (`git annex get` fetches the file itself)"
    if markup := next((what for pattern, what in _MARKUP if head[:1] == b"<" and pattern.search(head)), None):
        title = re.search(rb"<(title|code)>\s*([^<]{1,80})", head, re.IGNORECASE)
        said = f" ({' '.join(title[2].decode('utf-8', 'replace').split())!r})" if title else ""
        return f"{markup}{said}, a server's answer in place of the file"
    if any(byte < 32 and byte not in b"\t\n\r\f" for byte in head) or not head:
        return None
    try:
        text = head.decode("utf-8", "ignore" if len(head) > HEAD_BYTES - 16 else "strict")
    except UnicodeDecodeError:
        return None
    line = " ".join(text[:200].split())[:60]
    return f"{'JSON' if text[:1] in '{[' else 'a text file'} ({line!r})"
