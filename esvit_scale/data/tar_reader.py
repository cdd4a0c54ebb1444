"""A reader of the members of a tar, of several tars joined in one file, and of a damaged tar up to the damage.

Tars joined with `cat` have an end marker (blocks of zeros) in the middle. Python's tarfile stops there; with its
`ignore_zeros` it would also continue after damage, at anything that looks like a header. This reader continues after an
end marker only if the next block that is not all zeros is a valid header.
"""

import bz2
import gzip
import io
import lzma
import tarfile
from array import array
from collections.abc import Generator, Iterator
from importlib import import_module
from typing import IO, Any, NamedTuple, cast

from esvit_scale.data import left_out, tar_names
from esvit_scale.data.decode import BadImage
from esvit_scale.data.hashing import hash64
from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import IMAGES, MEMBERS, LeftOut
from esvit_scale.data.tar_names import MAX_MEMBER

BLOCK = tarfile.BLOCKSIZE
MAGICS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
DAMAGED = "cut short, or a header in it is damaged"
EMPTY = "empty file"


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its bytes in the (decompressed) tar
    size: int  # bytes
    archive: int = 0  # number of the member's tar among those that are joined in one file


class TarReader:
    """An iterator over the regular files of a tar that may belong to a sample, in the order of the tar.

    If `size` is given, the file must allow random access, and a hard link to an earlier member counts as a member with
    the same bytes.

    Attributes:
        damage: the damage of the tar in a few words, set during the iteration; empty when the tar is whole to its end.
        left_out: counts of the members that are left out; folders are not counted.

    Args:
        file: needs to be readable forward only, except for a step of one block back (`Forward`).
        size: bytes of the file, if known; no member may reach beyond them.
        prefix: put before the names of members in `left_out`.
    """

    def __init__(self, file: IO[bytes], size: int | None = None, prefix: str = "") -> None:
        self._file, self._size, self._prefix = file, size, prefix
        self.damage = ""
        self.left_out = LeftOut()
        self._number = 0  # number of the current archive
        self._places = _Places()  # of the members of the current archive

    def __iter__(self) -> Iterator[Member]:
        while True:
            end = yield from self._archive()
            if end is None or not self._find_next(end):
                return
            self._number += 1

    def _archive(self) -> Generator[Member, None, int | None]:
        """Yield the members of one tar; return the offset at which its end marker should begin, or None after damage."""
        end = self._file.tell()
        self._places = _Places()
        try:
            with tarfile.open(fileobj=self._file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    if info.size < 0 or info.offset_data < end:
                        self.damage = "a forged header leads back into the file"
                        return None
                    end = info.offset_data
                    if (place := self._usable(info)) is not None:
                        yield Member(info.name, *place, self._number)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
                return tar.offset  # tarfile ends silently at a header that it cannot read
        except (tarfile.TarError, EOFError, ValueError, RecursionError, OverflowError):
            self.damage = DAMAGED if self._file.tell() else EMPTY
            return None

    def _usable(self, info: tarfile.TarInfo) -> tuple[int, int] | None:
        """Return (offset, size) of the bytes of a member that may belong to a sample; count others and return None."""
        if info.isdir():
            return None
        kind, place = tar_names.no_sample(info.name), (info.offset_data, info.size)
        if info.isreg() and not info.issparse():
            beyond = self._size is not None and sum(place) > self._size
            if not kind and (beyond or info.size > MAX_MEMBER):
                self.damage = "a member is cut off, or over the size limit"
                return None
            if self._size is not None and not beyond and info.size <= MAX_MEMBER:
                self._places.add(info.name, place)
        elif info.islnk() and (target := self._places.of(info.linkname)):
            place = target
            self._places.add(info.name, place)
        else:
            link = info.issym() or info.islnk()
            lost = link and not kind and tar_names.is_image(tar_names.split_name(info.name)[1])
            why = left_out.LINK if link else left_out.SPECIAL
            self.left_out.add(IMAGES if lost else MEMBERS, why, self._prefix + printable(info.name))
            return None
        if kind:
            self.left_out.add(MEMBERS, kind, self._prefix + printable(info.name))
            return None
        return place

    def _find_next(self, end: int) -> bool:
        """Seek to the next tar in the file; return False when there is none."""
        self._file.seek(end)
        if (block := self._file.read(BLOCK)) != bytes(BLOCK):
            self.damage = self.damage or DAMAGED
            return False
        while block.count(0) == len(block) == BLOCK:
            block = self._file.read(BLOCK)
        if not block.strip(b"\0"):
            return False
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            self.damage = self.damage or "the bytes after its end marker are not a tar"
            return False
        self._file.seek(self._file.tell() - BLOCK)
        return True


class _Places:
    """Offsets and sizes of a tar's members, for hard links; each takes 24 bytes, about 200 after the first look-up."""

    def __init__(self) -> None:
        self._new = array("Q")  # hash of the name, offset, size
        self._found: dict[int, tuple[int, int]] = {}

    def add(self, name: str, place: tuple[int, int]) -> None:
        """Add a member by its name and its place (offset, size)."""
        self._new.extend((self._hash(name), *place))

    def of(self, name: str) -> tuple[int, int] | None:
        """Return (offset, size) of the last member of this name; None when there is none."""
        new, self._new = self._new, array("Q")
        for i in range(0, len(new), 3):
            self._found[new[i]] = (new[i + 1], new[i + 2])
        return self._found.get(self._hash(name))

    @staticmethod
    def _hash(name: str) -> int:
        return hash64("/".join(tar_names.parts_of(name)))


class Forward(io.RawIOBase):
    """A file object over a forward-only stream, with `tell`, and with `seek` forward or back by at most one block."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._at = stream, 0  # `_at`: the caller's offset
        self._kept = b""  # the last bytes that were read from the stream
        self._ahead = 0  # number of bytes of `_kept` that the caller has yet to read again after a seek back

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True: seeking forward, and back by a block, is possible."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte that `read` returns."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return exactly `size` bytes, fewer only at the end of the stream."""
        again = self._kept[len(self._kept) - self._ahead :][: None if size < 0 else size]
        self._ahead -= len(again)
        pieces, missing = [again], size - len(again) if size >= 0 else -1
        while missing and (piece := self._stream.read(missing if missing > 0 else 1 << 20)):
            pieces.append(piece)
            missing -= len(piece) if missing > 0 else 0
            self._kept = (self._kept + piece)[-2 * BLOCK :]
        data = b"".join(pieces)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go forward to an absolute offset, or back within the last block; raise UnsupportedOperation for other seeks."""
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("seek")
        back = self._at - offset
        if back > 0:
            if back + self._ahead > len(self._kept):
                raise io.UnsupportedOperation("seek back in a stream")
            self._ahead, self._at = self._ahead + back, offset
        while self._at < offset and self.read(min(offset - self._at, 1 << 20)):
            pass
        return self._at


def compression(head: bytes) -> str:
    """Return the compression format of a file that begins with `head`; empty when it is none of the known ones."""
    return next((name for magic, name in MAGICS.items() if head.startswith(magic)), "")


def decompressed(stream: Any) -> Any:
    """Return the stream, decompressed if it begins like a known compressed format; joined files are all decompressed.

    Raises:
        BadImage: the installed packages cannot decompress the format.
    """
    head = stream.read(6)
    whole = cast("IO[bytes]", _Joined(head, stream))
    kind = compression(head)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=whole)
    if kind == "bzip2":
        return bz2.BZ2File(whole)
    if kind == "xz":
        return lzma.LZMAFile(whole)
    if kind == "zstd":
        opened = open_zstd(whole)
        if opened is None:
            raise BadImage(f"is compressed with zstd; {NO_ZSTD}")
        return opened
    return whole


NO_ZSTD = "to read it, use Python 3.14 or `pip install zstandard`, or decompress it first (`unzstd FILE`)"


def open_zstd(stream: Any) -> Any:
    """Return a decompressed zstd stream; None when neither Python nor an installed package can decompress it."""
    try:
        return import_module("compression.zstd").ZstdFile(stream)
    except ImportError:
        pass
    try:
        return import_module("zstandard").ZstdDecompressor().stream_reader(stream, read_across_frames=True)
    except ImportError:
        return None


class _Joined:
    """A readable object that first returns bytes which were already read from a stream, then the rest of the stream."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int = -1) -> bytes:
        """Return at most `size` bytes, or all that are left if it is negative; fewer do not mean the end of the stream."""
        if not self._head:
            return bytes(self._rest.read(size))
        head, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
        return head + bytes(self._rest.read()) if size < 0 else head
