"""Writing of one shard of a plan in a worker process: read, check, re-encode if the recipe asks for it, write."""

import errno
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from esvit_scale.data import raster
from esvit_scale.data.decode import EXTENSIONS, BadImage, decode, decode_as_stored
from esvit_scale.data.image_folder import os_reason, printable
from esvit_scale.data.left_out import EMPTY, MEMBERS, UNDER_MIN_SIDE
from esvit_scale.data.member_check import checked_members
from esvit_scale.data.noted_orientation import noted, oriented
from esvit_scale.data.shard_file import Sample, counted, write_shard
from esvit_scale.data.shard_plan import ShardPlan
from esvit_scale.data.shard_table import Shard
from esvit_scale.data.sources.base import Item, Source, extension
from esvit_scale.errors import RestartCanHelp, UserError

# Errors of the file system rather than of one file
TRANSIENT_ERRNOS = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENFILE,
    errno.EMFILE,
}
RETRY_DELAYS = (0.5, 2.0, 8.0)  # seconds before another try
MISSING_IN_A_ROW = 100  # files that cannot be opened, one after the other, before the source as a whole is blamed

Bad = dict[str, Any]  # a row of the quarantine: file, reason, kind; `beside`: number of members left out with it


class Written(NamedTuple):
    """The result of writing one shard."""

    shard: Shard | None  # None: all of its samples were bad
    bad: list[Bad]
    formats: Mapping[str, int] = MappingProxyType({})  # number of images by extension
    turned: int = 0  # images that got the orientation which their json records
    modalities: Mapping[str, int] = MappingProxyType({})  # samples by what they have, of a source of more than images


def write_planned(plan: ShardPlan, folder: Path, number: int, tick: Callable[[], None]) -> Written:
    """Write shard `number` of a plan into a folder; call `tick` once per sample.

    Raises:
        UserError: MISSING_IN_A_ROW files in a row cannot be opened.
        RestartCanHelp: the source's file system does not answer.
        OSError: the shard cannot be written.
    """
    bad: list[Bad] = []
    turned: list[int] = []
    samples = _samples(plan, number, bad, turned, tick)
    first = next(samples, None)
    if first is None:
        return Written(None, bad)

    formats, modalities = Counter[str](), Counter[str]()

    def with_formats() -> Iterator[Sample]:
        for sample in chain([first], samples):
            formats.update([sample.ext] if sample.ext else [])
            yield sample

    shard = write_shard(folder / shard_name(number), counted(with_formats(), modalities), set())
    return Written(shard, bad, dict(formats), len(turned), dict(modalities) if plan.source.modal else {})


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"


def _samples(
    plan: ShardPlan, number: int, bad: list[Bad], turned: list[int], tick: Callable[[], None]
) -> Iterator[Sample]:
    """Yield the valid samples of a shard; add rows about others to `bad`, and numbers of turned images to `turned`."""
    missing = 0
    for i, read in _readers(plan.source, plan.members(number)):
        tick()
        try:
            item = read()
            missing = 0
            upright = item.data
            if plan.recipe.rotate_as_noted and (orientation := noted(item.extras.get("json"))) != 1:
                upright = oriented(item.data, orientation)
            data, ext, extras = _checked(plan, i, item._replace(data=upright), bad)
        except (BadImage, OSError) as error:
            missing = missing + 1 if isinstance(error, OSError) else 0
            reason, kind = os_reason(error) if isinstance(error, OSError) else (str(error), error.kind)
            if missing >= MISSING_IN_A_ROW:
                ask = f"is {plan.source.root} the folder that the paths start at, and is its file system mounted?"
                if plan.source.together > 1:
                    ask = "do these URLs begin where the files are, and may these credentials read them?"
                raise UserError(
                    f"{printable(plan.source.name(i))}: {reason}, like the {missing - 1} files before it; {ask}"
                ) from None
            row: Bad = {"file": printable(plan.source.name(i)), "reason": reason, "kind": kind}
            bad.append(row | {"beside": count} if (count := plan.source.beside(i)) else row)
            continue
        if upright is not item.data:
            turned.append(i)
        yield Sample(plan.keys[i], item.label, ext, data, extras)


def _readers(source: Source, members: list[int]) -> Iterator[tuple[int, Callable[[], Item]]]:
    """Yield each sample's number and a function that returns it or raises its error, in order.

    Of a source with `together` above 1, so many samples are read ahead by threads.
    """
    if source.together <= 1:
        yield from ((i, partial(load, source, i)) for i in members)
        return
    with ThreadPoolExecutor(source.together) as pool:
        waiting = deque[tuple[int, Future[Item]]]()
        try:
            for i in members:
                waiting.append((i, pool.submit(load, source, i)))
                if len(waiting) > source.together:
                    at, job = waiting.popleft()
                    yield at, job.result
            for at, job in waiting:
                yield at, job.result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _checked(plan: ShardPlan, i: int, item: Item, bad: list[Bad]) -> tuple[bytes, str, Mapping[str, bytes]]:
    """Return a sample's image, with its extension, and its further members, as they are written. Raises BadImage.

    Of a source of more than images, members that cannot be used are left out, with a row each in `bad`, and a sample is
    bad if nothing is left of it.
    """
    if not plan.source.modal:
        return *_checked_image(plan, i, item.data), item.extras
    extras, problems = checked_members(item)
    image = b"", ""
    if item.data:
        try:
            image = _checked_image(plan, i, item.data)
        except BadImage as error:
            problems = {"image": error} | problems
    if not image[0] and not extras:
        kind = next((error.kind for error in problems.values()), EMPTY)
        raise BadImage("; ".join(f"{what}: {error}" for what, error in problems.items()) or "no member", kind)
    name = printable(plan.source.name(i))
    bad += [
        {"file": f"{name} ({what})", "reason": str(error), "kind": error.kind, "what": MEMBERS}
        for what, error in problems.items()
    ]
    return *image, extras


def _checked_image(plan: ShardPlan, i: int, data: bytes) -> tuple[bytes, str]:
    recipe = plan.recipe
    image = decode(data) if recipe.pixels.is_rgb8 else None
    height, width = decode_as_stored(data, *recipe.pixels[:2]).shape[:2] if image is None else image.size[::-1]
    if min(width, height) < recipe.min_side:
        raise BadImage(
            f"{width}x{height} pixels: the shorter side is under --min-side {recipe.min_side}", UNDER_MIN_SIDE
        )
    ext = extension(plan.source.path(i))
    ext = ext if ext in EXTENSIONS else _sniffed(data)
    return (data, ext) if image is None else recipe.reencode.apply(image, data, ext)


def _sniffed(data: bytes) -> str:
    """Return the extension that fits the first bytes of an image file; `jpg` if they are unknown."""
    kinds = {
        b"\xff\xd8": "jpg",
        b"\x89PNG": "png",
        b"GIF8": "gif",
        b"BM": "bmp",
        b"II": "tif",
        b"MM": "tif",
        raster.NPY: raster.ARRAY,
    }
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((ext for magic, ext in kinds.items() if data.startswith(magic)), "jpg")


def load(source: Source, i: int) -> Item:
    """Read sample i of a source; try again after growing delays while the file system does not answer.

    Raises:
        BadImage, OSError: this sample cannot be read.
        RestartCanHelp: the whole source cannot be read.
    """
    for wait in (*RETRY_DELAYS, None):
        try:
            return source.read(i)
        except OSError as error:
            gone = not os.path.exists(source.root)  # noqa: PTH110 (False for every error, where Path.exists raises)
            if not gone and error.errno not in TRANSIENT_ERRNOS:
                raise
            if wait is None:
                if gone:
                    raise RestartCanHelp(
                        f"{source.root}: can no longer be read ({error.strerror}); run the same command again to continue"
                    ) from None
                raise
            time.sleep(wait)
    raise AssertionError
