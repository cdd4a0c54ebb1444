"""Samples of tars that are read from front to back, one tar after the other: files, `pipe:` commands and URLs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import webdataset as wds

from esvit_scale.data.decode import BadImage
from esvit_scale.data.hashing import hash64
from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import IMAGES, MEMBERS, NO_IMAGE, LeftOut
from esvit_scale.data.loader import reason
from esvit_scale.data.raster import ARRAY
from esvit_scale.data.reader import RETRY_DELAYS, RetryBudget
from esvit_scale.data.tar_names import chosen_images, companion, is_image, parts_of, sample_key, split_name
from esvit_scale.data.tar_reader import EMPTY, Forward, TarReader, decompressed

MOST_IMAGES = 64  # images of one key that are in memory together
MOST_KEYS = 1 << 17  # keys of a tar that are remembered to detect members that are not side by side
APART = (
    "apart from the image of their key, so that labels are lost: sort the tar (unpack it, `tar --sort=name -cf SORTED.tar "
    "-C FOLDER .`), or write a set with `esvit-scale shards create`, which joins members by key"
)


class Raw(NamedTuple):
    """A sample as it is stored in a tar, not yet decoded."""

    url: str  # of the tar
    key: str
    crop_key: str  # key from which its crops are drawn; differs when the set repeats within an epoch
    image: bytes
    label: bytes
    bad: list[dict[str, Any]]  # quarantine rows about what could not be read before this sample


class _Member(NamedTuple):
    name: str  # as the tar spells it
    content: bytes  # empty for a member that no sample needs


class TarSamples:
    """The samples of tars, in the order of their images in the tars.

    Members without an image are skipped and counted; they are reported once per tar in the life of this object. Images are
    not decoded here, so an image that cannot be decoded still is a sample.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._retries = RetryBudget(RETRY_DELAYS)

    def of(self, urls: Sequence[str], epoch: int, bad: list[dict[str, Any]]) -> Iterator[Raw]:
        """Yield the samples of tars; add a row to `bad` for each tar that cannot be read or that has unused members."""
        for url in urls:
            row = {"shard": url, "key": "", "epoch": epoch, "position": -1}
            left_out = LeftOut()
            try:
                yield from self._read_with_retries(url, left_out)
            except Exception as error:  # decompressors and tar headers raise almost anything
                what = reason(error) or type(error).__name__
                bad.append({**row, "reason": what, "io": isinstance(error, OSError)})
            if left_out and url not in self._told:
                self._told.add(url)
                bad.append({**row, "reason": f"left out {left_out.short()}", "used": True, "left_out": left_out.rows()})

    def _read_with_retries(self, url: str, left_out: LeftOut) -> Iterator[Raw]:
        """Yield the samples of one tar; retry with growing delays while the storage fails before the first sample."""
        while True:
            came = False
            try:
                with wds.gopen(url) as stream:
                    for raw in _samples(url, stream, left_out):
                        came = True
                        self._retries.reset()
                        yield raw
                return
            except OSError as error:
                if came or not self._retries.wait(url, error):
                    raise


def _samples(url: str, stream: Any, left_out: LeftOut) -> Iterator[Raw]:
    """Yield the samples of one tar.

    Raises:
        BadImage: the tar is cut short or damaged; the samples before the damage have been yielded.
    """
    reader = TarReader(tape := Forward(decompressed(stream)))  # type: ignore[arg-type]
    apart = _Apart()
    key, of, members = "", 0, dict[str, _Member]()
    error: Exception | None = None
    try:
        for name, offset, size, archive in reader:
            another, ext = split_name(name)
            full = sum(map(is_image, members)) >= MOST_IMAGES
            if members and ((another, archive) != (key, of) or ext in members or full):
                yield from _of_key(url, key, members, apart, left_out)
                members = {}
            key, of = another, archive
            wanted = is_image(ext) or ext.rpartition(".")[2] in ("cls", ARRAY)
            members[ext] = _Member(name, _content(tape, offset, size) if wanted else b"")
    except Exception as raised:  # decompressors raise almost anything; raised below, after the samples read before
        error = raised
    if members:
        yield from _of_key(url, key, members, apart, left_out)
    left_out.update(reader.left_out)
    left_out.add(MEMBERS, APART, printable(apart.first), apart.count)
    if error is not None:
        raise error
    if reader.damage:
        raise BadImage(EMPTY if reader.damage == EMPTY else f"{reader.damage}: the rest was not read")


def _content(tape: Forward, offset: int, size: int) -> bytes:
    tape.seek(offset)
    content = tape.read(size)
    if len(content) != size:
        raise BadImage("cut short in the middle of a member")
    return content


def _of_key(url: str, key: str, members: dict[str, _Member], apart: "_Apart", left_out: LeftOut) -> Iterator[Raw]:
    chosen = chosen_images(members)
    for image in chosen:
        label = companion(members, image, "cls")
        name = sample_key(key, image, chosen)
        yield Raw(url, name, name, members[image].content, members[label].content if label else b"", [])
    if apart.add(key, bool(chosen)):
        return
    for ext, member in members.items():
        why = NO_IMAGE if not chosen else f"image beside the one of its key (.{ext[:24]})"
        if not chosen or (is_image(ext) and ext not in chosen):
            what = IMAGES if chosen else MEMBERS
            left_out.add(what, printable(why), printable("/".join(parts_of(member.name))))


class _Apart:
    """A detector of keys whose members do not lie side by side in the tar, such as an image apart from its label."""

    def __init__(self) -> None:
        self._keys: dict[int, bool] = {}  # hash of a key → whether it came with an image
        self.first = ""
        self.count = 0

    def add(self, key: str, image: bool) -> bool:
        """Record a run of members of `key`; return True if the key's image and its other members lie apart."""
        hashed = hash64(key)
        before = self._keys.get(hashed)
        if len(self._keys) < MOST_KEYS:
            self._keys[hashed] = image or bool(before)
        if before is None or before == image:
            return False
        self.first = self.first or key
        self.count += 1
        return True
