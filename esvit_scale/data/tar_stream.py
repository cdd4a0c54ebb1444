"""Samples of tars that are read from front to back, one tar after the other: files, `pipe:` commands and URLs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import webdataset as wds

from esvit_scale.data import media
from esvit_scale.data.bad_image import BadMember
from esvit_scale.data.decode import BadImage
from esvit_scale.data.hashing import hash64
from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import IMAGES, MEMBERS, NO_IMAGE, NOT_READ, TOO_LARGE, LeftOut
from esvit_scale.data.loader import reason
from esvit_scale.data.raster import ARRAY
from esvit_scale.data.reader import RETRY_DELAYS, RetryBudget
from esvit_scale.data.signal_members import frames_of, members_of, plain_image
from esvit_scale.data.tar_names import chosen_images, companion, is_image, parts_of, sample_key, split_name
from esvit_scale.data.tar_reader import EMPTY, Forward, TarReader, decompressed

MOST_IMAGES = 64  # images of one key that are in memory together
MOST_KEYS = 1 << 17  # keys of a tar that are remembered to detect members that are not side by side
APART = (
    "apart from the image of their key, so that labels are lost: sort the tar (unpack it, `tar --sort=name -cf SORTED.tar "
    "-C FOLDER .`), or write a set with `esvit-scale shards create`, which joins members by key"
)


APART_MODAL = (
    "apart from the other members of their key, so that they are no part of one sample: sort the tar (unpack it, `tar "
    "--sort=name -cf SORTED.tar -C FOLDER .`), or write a set with `esvit-scale shards create --members …`, which joins "
    "members by key"
)


class Raw(NamedTuple):
    """A sample as it is stored in a tar, not yet decoded."""

    url: str  # of the tar
    key: str
    crop_key: str  # key from which its crops are drawn; differs when the set repeats within an epoch
    image: bytes
    label: bytes
    bad: list[dict[str, Any]]  # quarantine rows about what could not be read before this sample
    members: Mapping[str, bytes | None] = {}  # by extension, image included, where modalities are read; None: too large

    def member(self, extension: str) -> bytes:
        """Return the bytes of a member. Raises BadMember for one that is too large."""
        content = self.members[extension]
        if content is None:
            raise BadMember(f"over the limit of {media.MAX_BYTES} bytes", TOO_LARGE)
        return content


class _Member(NamedTuple):
    name: str  # as the tar spells it
    content: bytes | None  # empty for a member that no sample needs, None for one that is too large


class TarSamples:
    """The samples of tars, in the order of their images in the tars.

    Members without an image are skipped and counted; they are reported once per tar in the life of this object. Images are
    not decoded here, so an image that cannot be decoded still is a sample.

    Args:
        modalities: what is read beside images (data/signal_members.MODALITIES). If there are any, a key is one sample, and
            one without an image is a sample, too, if it has members of these.
    """

    def __init__(self, modalities: Sequence[str] = ()) -> None:
        self._modalities = tuple(modalities)
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
                    for raw in _samples(url, stream, left_out, self._modalities):
                        came = True
                        self._retries.reset()
                        yield raw
                return
            except OSError as error:
                if came or not self._retries.wait(url, error):
                    raise


def _samples(url: str, stream: Any, left_out: LeftOut, modalities: Sequence[str] = ()) -> Iterator[Raw]:
    """Yield the samples of one tar; `modalities` as for TarSamples.

    Raises:
        BadImage: the tar is cut short or damaged; the samples before the damage have been yielded.
    """
    reader = TarReader(tape := Forward(decompressed(stream)))  # type: ignore[arg-type]
    apart = _Apart()
    key, of, members = "", 0, dict[str, _Member]()
    taken = 0  # bytes of these members in memory
    error: Exception | None = None

    def of_key(members: dict[str, _Member]) -> Iterator[Raw]:
        if modalities:
            return _modal_sample(url, key, members, apart, left_out, modalities)
        return _images_of_key(url, key, members, apart, left_out)

    try:
        for name, offset, size, archive in reader:
            another, ext = split_name(name)
            full = not modalities and sum(map(is_image, members)) >= MOST_IMAGES
            if members and ((another, archive) != (key, of) or ext in members or full):
                yield from of_key(members)
                members, taken = {}, 0
            key, of = another, archive
            content: bytes | None = b""
            if _is_read(ext, modalities):
                fits = not modalities or taken + size <= media.MAX_BYTES
                content = _content(tape, offset, size) if fits else None
                taken += size if fits else 0
            members[ext] = _Member(name, content)
    except Exception as raised:  # decompressors raise almost anything; raised below, after the samples read before
        error = raised
    if members:
        yield from of_key(members)
    left_out.update(reader.left_out)
    left_out.add(MEMBERS, APART_MODAL if modalities else APART, printable(apart.first), apart.count)
    if error is not None:
        raise error
    if reader.damage:
        raise BadImage(EMPTY if reader.damage == EMPTY else f"{reader.damage}: the rest was not read")


def _is_read(ext: str, modalities: Sequence[str]) -> bool:
    """Return whether the bytes of members of an extension are read: images, labels, and what belongs to `modalities`."""
    if modalities and frames_of([ext]):
        return "video" in modalities
    plain = is_image(ext) or ext.rpartition(".")[2] in ("cls", ARRAY)
    return plain or any(members_of([ext], modality) for modality in modalities)


def _content(tape: Forward, offset: int, size: int) -> bytes:
    tape.seek(offset)
    content = tape.read(size)
    if len(content) != size:
        raise BadImage("cut short in the middle of a member")
    return content


def _images_of_key(
    url: str, key: str, members: dict[str, _Member], apart: "_Apart", left_out: LeftOut
) -> Iterator[Raw]:
    """Yield a sample for each image of a key."""
    chosen = chosen_images(members)
    for image in chosen:
        label = companion(members, image, "cls")
        name = sample_key(key, image, chosen)
        content = members[image].content or b""
        yield Raw(url, name, name, content, (members[label].content or b"") if label else b"", [])
    if apart.add(key, bool(chosen)):
        return
    for ext, member in members.items():
        why = NO_IMAGE if not chosen else f"image beside the one of its key (.{ext[:24]})"
        if not chosen or (is_image(ext) and ext not in chosen):
            what = IMAGES if chosen else MEMBERS
            left_out.add(what, printable(why), printable("/".join(parts_of(member.name))))


def _modal_sample(
    url: str,
    key: str,
    members: dict[str, _Member],
    apart: "_Apart",
    left_out: LeftOut,
    modalities: Sequence[str],
) -> Iterator[Raw]:
    """Yield the one sample of a key, if it has an image or anything that is read beside images."""
    image = plain_image(members)
    parts = [[image] if image else [], *(members_of(members, modality) for modality in modalities)]
    read = [ext for part in parts for ext in part]
    if read:
        label = members["cls"].content if "cls" in members else b""
        yield Raw(url, key, key, b"", label or b"", [], {ext: members[ext].content for ext in read})
    if apart.add(key, sum(1 << n for n, part in enumerate(parts) if part)):
        return
    for ext, member in members.items():
        if not read or (is_image(ext) and ext not in read and not frames_of([ext])):
            why = f"image beside the one of its key (.{ext[:24]})" if read else NOT_READ
            left_out.add(IMAGES if read else MEMBERS, printable(why), printable("/".join(parts_of(member.name))))


class _Apart:
    """A detector of keys whose members do not lie side by side in the tar, such as an image apart from its label."""

    def __init__(self) -> None:
        self._keys: dict[int, int] = {}  # hash of a key → what it came with, as bits
        self.first = ""
        self.count = 0

    def add(self, key: str, held: int) -> bool:
        """Record a run of members of `key`; return True if it lies apart from others of the key.

        Args:
            held: what the run has, as bits: the image, and modalities.
        """
        hashed = hash64(key)
        before = self._keys.get(hashed)
        if len(self._keys) < MOST_KEYS:
            self._keys[hashed] = held | (before or 0)
        if before is None or before == held or before & held:
            return False
        self.first = self.first or key
        self.count += 1
        return True
