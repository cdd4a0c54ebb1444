"""The two files that describe a shard set: manifest.json, and beside each tar an index of where its members lie.

docs/shard_format.md specifies both. Neither is trusted: names must be plain file names inside the set's folder, and
offsets are checked against the tar when it is read.
"""

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import lt
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from esvit_scale.data.left_out import LeftOut
from esvit_scale.data.pixel_format import RGB8, PixelFormat
from esvit_scale.data.raster import MAX_CHANNELS
from esvit_scale.data.shard_table import Shard, ShardTable
from esvit_scale.data.signal_members import plain_image
from esvit_scale.data.tar_names import split_name
from esvit_scale.data.tar_reader import Member, TarReader
from esvit_scale.errors import UserError, is_machine_fault

FORMAT_VERSION = 1
INDEX_VERSION = 2  # of indexes with checksums; sets of older versions have indexes of version 1, without them
MANIFEST = "manifest.json"
TAR_NAME = re.compile(r"(?!\.)[^/\\\0]*\.tar")
# Where the rows of the shards begin, divide and end in the layout of `dump`
FIRST_ROW, NEXT_ROW, LAST_ROW = b'\n "shards": [\n  {\n', b"\n  },\n  {\n", b"\n  }\n ]\n}\n"
STAT_THREADS, STATS = 16, 256  # threads that ask for the status of files, and files that one asks for in turn
PIECE = 1 << 18  # bytes of a manifest that are read at a time
REMOTE = ".remote.json"  # in a set's folder in the cache: the fields of Remote, and the folder's path


class Remote(NamedTuple):
    """The place of a set in an object store, whose shards are fetched into a cache when they are read (data/remote/)."""

    url: str  # of the set's folder
    options: dict[str, Any]  # data.storage_options
    limit: int | None  # bytes that the cache of a node may take; None: a share of its disk


@dataclass(frozen=True)
class Manifest:
    """The contents of a shard set: its shards, classes and pixel format."""

    root: Path  # the set's folder; of a remote set, its folder in the cache
    shards: ShardTable
    classes: tuple[str, ...] = ()  # names; empty when samples have no class
    source: str = ""  # fingerprint of the source and options that it was written from, see shard_plan.py
    left_out: Sequence[dict[str, Any]] = field(default=(), compare=False)  # rows of left_out.LeftOut
    channels: int = 3  # of every image; with 3 channels of 8 bits, files may have any colour mode and are used as RGB
    bits: int = 8  # per channel
    formats: Mapping[str, int] = field(
        default_factory=dict, compare=False
    )  # number of images by extension; empty: unknown
    modalities: Mapping[str, int] = field(
        default_factory=dict, compare=False
    )  # samples by what they have (image, audio, video, text), of a set that was written with more than images
    remote: Remote | None = field(default=None, compare=False)  # None: the shards lie in `root`

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return int(self.shards.samples.sum())

    @property
    def has_checksums(self) -> bool:
        """Return whether the indexes have a checksum of every member, so that single samples can be verified."""
        return not self.shards.index_sha256.has_empty


class Entry(NamedTuple):
    """The members of one sample in a tar."""

    key: str
    members: dict[str, tuple[int, int]]  # extension → (offset, size) of its bytes in the tar
    checksums: Mapping[str, int] = {}  # extension → CRC-32 of its bytes; empty in an index of version 1


def index_path(shard: Path) -> Path:
    """Return the path of the index file beside a tar."""
    return shard.with_suffix(".index.jsonl")


def is_shard_set(root: Path) -> bool:
    """Return whether a folder holds a finished shard set, by its manifest.json; a long pattern is no folder."""
    try:
        return (root / MANIFEST).is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def address(source: Path) -> str:
    """Return the lasting name of a data set: a remote set's URL, since its folder in the cache may be removed, or the path."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if remote := _remote(source):
            return remote.url
    return str(source)


def load(root: Path) -> Manifest:
    """Read the manifest of the set in `root`.

    Raises:
        UserError: the folder or its manifest.json is missing, of another format version, or not well formed.
    """
    root = Path(root)
    path = root / MANIFEST
    if not root.is_dir():
        raise UserError(f"{root}: no such shard folder{_nearest_set(root)}")
    if not path.is_file():
        tars = sum(1 for p in root.iterdir() if p.suffix == ".tar")
        what = f"{tars} tars but no {MANIFEST}" if tars else f"no {MANIFEST}"
        hint = _nearest_set(root / "x") or "; write a set with `esvit-scale shards create SRC DST`"
        raise UserError(f"{root}: not a finished shard set ({what}){hint}")
    try:
        return _by_pieces(root, path)
    except _OtherLayout:
        return _at_once(root, path)


def check_sizes(manifest: Manifest) -> None:
    """Compare the file size of every shard with the manifest's, without reading a shard.

    The shards of a remote set are compared when they are fetched.

    Raises:
        UserError: a shard is missing or has another size; the first is named and the others are counted.
        OSError: the storage does not answer.
    """
    first, count = "", 0
    for problem in () if manifest.remote else size_problems(manifest):
        first, count = first or problem, count + 1
    if count:
        _raise_machine_faults(manifest)
        more = f" (and {count - 1} more shards)" if count > 1 else ""
        raise UserError(f"{first}{more}; copy it again, or write the set again")


def _raise_machine_faults(manifest: Manifest) -> None:
    """Raise a shard's OSError if it means that the storage does not answer; ignore others, such as a missing file."""
    for _, status in stats(manifest):
        if isinstance(status, OSError) and is_machine_fault(status):
            raise status


def size_problems(manifest: Manifest) -> Iterator[str]:
    """Yield one line for each shard that is missing or has another size than the manifest says."""
    for number, status in stats(manifest):
        size = int(manifest.shards.bytes[number])
        if isinstance(status, OSError):
            yield f"{manifest.root / manifest.shards.names[number]}: {status.strerror}"
        elif status.st_size != size:
            kind = "truncated" if status.st_size < size else "too long"
            path = manifest.root / manifest.shards.names[number]
            yield f"{path}: {kind}: {status.st_size} bytes; the manifest says {size}"


def stats(manifest: Manifest) -> Iterator[tuple[int, os.stat_result | OSError]]:
    """Yield every shard's number and the status of its file, or the error of asking for it.

    Several threads ask, because each question costs a round trip on network storage.
    """

    def ask(numbers: range) -> list[os.stat_result | OSError]:
        found: list[os.stat_result | OSError] = []
        for number in numbers:
            try:
                found.append(os.stat(f"{manifest.root}/{manifest.shards.names[number]}"))  # noqa: PTH116 (five times as fast)
            except OSError as error:
                found.append(error)
        return found

    blocks = [range(n, min(n + STATS, len(manifest.shards))) for n in range(0, len(manifest.shards), STATS)]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for wave in (blocks[n : n + STAT_THREADS] for n in range(0, len(blocks), STAT_THREADS)):
            for numbers, found in zip(wave, pool.map(ask, wave), strict=True):
                yield from zip(numbers, found, strict=True)


def check_pixels(manifest: Manifest, pixels: PixelFormat) -> None:
    """Raise UserError when a set's images have other channels or bits than a config asks for."""
    held = PixelFormat(manifest.channels, manifest.bits)
    if (held.channels, held.bits) != (pixels.channels, pixels.bits):
        raise UserError(
            f"{manifest.root}: its images have {held}, but data.channels={pixels.channels} and data.bits={pixels.bits}; set "
            f"data.channels={held.channels} data.bits={held.bits}, or name another set"
        )


def dump(
    shards: Sequence[Shard],
    classes: Sequence[str],
    source: str,
    tool: str,
    options: dict[str, Any] | None = None,
    left_out: Sequence[dict[str, Any]] = (),
    formats: Mapping[str, int] | None = None,
    modalities: Mapping[str, int] | None = None,
) -> bytes:
    """Return the bytes of a manifest.json, always the same for the same set."""
    recipe = (options or {}).get("recipe", {})  # records channels and bits unless they are those of 8-bit RGB
    content = {
        "format_version": FORMAT_VERSION,
        "tool": tool,
        "samples": sum(s.samples for s in shards),
        "bytes": sum(s.bytes for s in shards),
        "source": source,
        "options": options or {},
        **{key: recipe[key] for key in ("channels", "bits") if key in recipe},
        "formats": dict(sorted((formats or {}).items())),
        **({"modalities": dict(sorted(modalities.items()))} if modalities else {}),
        "left_out": list(left_out),
        "classes": list(classes),
        **({"index_version": INDEX_VERSION} if all(s.index_sha256 for s in shards) else {}),
        "shards": [{key: value for key, value in s._asdict().items() if value != ""} for s in shards],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


class _OtherLayout(Exception):
    """Error for a manifest that is not laid out as `dump` writes it, or is no JSON: it has to be parsed at once."""


def _by_pieces(root: Path, path: Path) -> Manifest:
    """Read a manifest as `dump` lays it out, a few thousand shards at a time: whole, 500,000 of them take over 400 MB.

    Raises:
        UserError: as `load`.
        _OtherLayout: the file is laid out in another way.
    """
    with path.open("rb") as file:
        head = b""
        while FIRST_ROW not in head:
            if not (piece := file.read(PIECE)):
                raise _OtherLayout
            head += piece
        head, _, rest = head.partition(FIRST_ROW)
        return _checked(root, path, _loads(head + b' "shards": []}'), _row_blocks(file, rest))


def _row_blocks(file: BinaryIO, rest: bytes) -> Iterator[list[Any]]:
    """Yield the rows of the shards, some thousands at a time; strings in JSON hold no line ends, so these divide rows.

    Args:
        rest: what was read of the first rows; `file` has what follows.
    """
    while piece := file.read(PIECE):
        rest += piece
        rows, between, rest_of_it = rest.rpartition(NEXT_ROW)
        if between:
            yield _loads(b"[{" + rows + b"}]")
            rest = rest_of_it
    if not rest.endswith(LAST_ROW):
        raise _OtherLayout
    yield _loads(b"[{" + rest[: -len(LAST_ROW)] + b"}]")


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _OtherLayout from None


def _at_once(root: Path, path: Path) -> Manifest:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON; copy the file again, or write the set again") from None
    return _checked(root, path, content)


def _checked(root: Path, path: Path, raw: Any, blocks: Iterable[list[Any]] | None = None) -> Manifest:
    """Return the manifest with the content `raw`.

    Args:
        blocks: the rows of its shards; None: they are in `raw`.
    """
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: this version of esvit-scale reads format_version {FORMAT_VERSION}, not {version!r}")
    try:
        return replace(_parse(root, raw, [raw["shards"]] if blocks is None else blocks), remote=_remote(root))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path}: not a well-formed manifest ({error})") from None


def _parse(root: Path, raw: dict[str, Any], blocks: Iterable[list[Any]]) -> Manifest:
    checked = raw.get("index_version") == INDEX_VERSION  # others have no checksums that this version can read
    shards, in_order, last = ShardTable(), True, ""
    for rows in blocks:
        names = [_file_name(row["name"]) for row in rows]
        in_order, last = in_order and all(map(lt, [last, *names], names)), names[-1] if names else last
        _append(shards, names, rows, checked)
    if not in_order and len(set(shards.names)) != len(shards):
        raise ValueError("a shard is listed twice")
    left_out = LeftOut(raw.get("left_out", ())).rows()
    formats = {str(ext): _count(number) for ext, number in raw.get("formats", {}).items()}
    channels, bits = raw.get("channels", RGB8.channels), raw.get("bits", RGB8.bits)
    if channels not in range(1, MAX_CHANNELS + 1) or bits not in (8, 16):
        raise ValueError(f"channels {channels!r} of {bits!r} bits")
    classes, source = tuple(str(c) for c in raw["classes"]), str(raw.get("source", ""))
    modalities = {str(name): _count(number) for name, number in raw.get("modalities", {}).items()}
    return Manifest(root, shards, classes, source, left_out, int(channels), int(bits), formats, modalities)


def _append(table: ShardTable, names: list[str], rows: list[Any], checked: bool) -> None:
    """Append the shards of a manifest's rows to a table."""
    table.extend(
        names=names,
        samples=[_count(row["samples"]) for row in rows],
        bytes=[_count(row["bytes"]) for row in rows],
        sha256=[str(row["sha256"]) for row in rows],
        index_sha256=[str(row.get("index_sha256", "")) if checked else "" for row in rows],
    )


def _remote(root: Path) -> Remote | None:
    """Return where the shards of a set's folder in the cache come from; None for a set whose shards lie in the folder.

    A copy of a cache's folder in another place counts as a local set: no shard is fetched to it or removed from it.
    """
    if not (root / REMOTE).is_file():
        return None
    raw = json.loads((root / REMOTE).read_bytes())
    if raw.get("folder", os.path.realpath(root)) != os.path.realpath(root):
        return None
    return Remote(str(raw["url"]), dict(raw["options"]), raw["limit"])


def _file_name(name: Any) -> str:
    if not isinstance(name, str) or not TAR_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a tar in this folder")
    return name


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _nearest_set(path: Path) -> str:
    """Return a hint that names the shard sets beside `path`; empty when there are none."""
    try:
        sets = sorted(p.name for p in path.parent.iterdir() if p.is_dir() and is_shard_set(p))
    except OSError:
        return ""
    return f"; shard sets in {path.parent}: {', '.join(sets[:5])}" if sets else ""


# --- the index of a tar ----------------------------------------------------------------------------------------------


class Index(Sequence[Entry]):
    """The index of a tar: a sequence of the entries of its samples, in order.

    It holds the bytes of the index file, about 100 bytes per sample, and parses a line when that is asked for, so that
    the indexes of many shards can stay in memory.
    """

    def __init__(self, lines: bytes) -> None:
        self._lines = lines
        self._ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))  # the first ends the header line

    def __len__(self) -> int:
        return max(len(self._ends) - 1, 0)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        key, members = json.loads(self._lines[self._ends[i] + 1 : self._ends[i + 1]])
        places = {str(ext): (_count(at), _count(size)) for ext, (at, size, *_) in members.items()}
        return Entry(
            str(key), places, {str(ext): _count(crc) for ext, (_, _, *rest) in members.items() for crc in rest}
        )

    @property
    def nbytes(self) -> int:
        """Return the memory that the index takes, in bytes."""
        return len(self._lines) + self._ends.nbytes


def read_index(shard: Path) -> Index:
    """Return the index of a tar: its index file, or a scan of the tar's headers when that file cannot be used.

    Raises:
        OSError: there is no usable index file, and the tar cannot be opened.
    """
    try:
        return read_side_car(shard)
    except (OSError, ValueError):
        return Index(dump_index(shard.name, scan(shard)))


def read_side_car(shard: Path) -> Index:
    """Read the index file beside a tar.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not an index of this tar, or is cut short.
    """
    return parse_index(index_path(shard).read_bytes(), shard.name)


def parse_index(lines: bytes, name: str) -> Index:
    """Return the index that the bytes of an index file hold.

    Args:
        name: of the tar.

    Raises:
        ValueError: it is not an index of this tar, or is cut short.
    """
    header = json.loads(lines[: lines.find(b"\n") + 1])
    if not isinstance(header, dict) or header.get("format_version") not in (FORMAT_VERSION, INDEX_VERSION):
        raise ValueError("not an index of this format version")
    if header.get("shard") != name or not lines.endswith(b"\n"):
        raise ValueError("of another shard, or cut short")
    return Index(lines)


def dump_index(name: str, entries: Iterable[Entry]) -> bytes:
    """Return the bytes of an index file: a header line, then one line per sample.

    Its version is INDEX_VERSION where every member has a checksum (checksums.py).
    """
    entries = list(entries)
    checked = all(entry.checksums.keys() == entry.members.keys() for entry in entries)
    lines = [json.dumps({"format_version": INDEX_VERSION if checked else FORMAT_VERSION, "shard": name})]
    for key, members, crcs in entries:
        row = {ext: [*place, crcs[ext]] for ext, place in members.items()} if checked else members
        lines.append(json.dumps([key, row], separators=(",", ":")))
    return "".join(line + "\n" for line in lines).encode("ascii")


def scan(shard: Path) -> list[Entry]:
    """Return the samples of any WebDataset tar, from its headers.

    A sample is a run of regular files of one key (tar_names.py) and hard links to them. Other links, devices, folders and
    hidden files are ignored, and a truncated tar ends at its last whole member.

    Raises:
        OSError: the file cannot be read.
    """
    return scan_and_judge(shard)[0]


def scan_and_judge(shard: Path) -> tuple[list[Entry], str]:
    """Return the samples, as `scan` does, and the tar's damage in a few words ("" if it is whole to its end marker)."""
    with shard.open("rb") as file:
        reader = TarReader(file, shard.stat().st_size)
        return list(runs(reader)), reader.damage


def runs(members: Iterable[Member]) -> Iterator[Entry]:
    """Yield the samples that members form: each is a run of consecutive members of one key in one archive.

    A repeated extension begins the next sample.
    """
    return (entry for _, entry in numbered_runs(members))


def numbered_runs(members: Iterable[Member]) -> Iterator[tuple[int, Entry]]:
    """Yield the same samples as `runs`, each with the number of its archive (`Member.archive`)."""
    entry, of = None, 0
    for name, offset, size, archive in members:
        key, ext = split_name(name)
        if entry is None or of != archive or entry.key != key or ext in entry.members:
            if entry is not None:
                yield of, entry
            entry, of = Entry(key, {}), archive
        entry.members[ext] = (offset, size)
    if entry is not None:
        yield of, entry


def image_member(entry: Entry) -> tuple[int, int] | None:
    """Return (offset, size) of a sample's image (`signal_members.plain_image`); None for a sample without one."""
    image = plain_image(entry.members)
    return None if image is None else entry.members[image]
