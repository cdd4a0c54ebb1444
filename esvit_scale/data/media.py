"""Decoding of recordings (soundfile), clips (PyAV, or numbered frames) and texts: no more of a file than one view needs.

Every limit is checked against what the file's header declares before anything is decoded, and again while it is decoded.
BadMember is raised, with the reason, for what cannot be used. An empty recording, clip or text is no error: it has length 0.
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esvit_scale.data.bad_image import BadMember, one_line
from esvit_scale.data.decode import decode
from esvit_scale.data.left_out import TOO_LARGE
from esvit_scale.data.signal_members import DEMUXERS
from esvit_scale.errors import UserError

MAX_BYTES = 256 << 20  # of a file of sound or video
MAX_TEXT = 1 << 20  # bytes of a text or JSON file
MAX_SECONDS = 1800.0  # of a recording
RATES = (1_000, 384_000)  # Hz: lowest and highest rate of a recording
MAX_SOUND_CHANNELS = 8
MAX_FRAMES = 100_000  # of a clip
MAX_DECODED = 10_000  # frames decoded for one view, from the key frame before it
MAX_FRAME_PIXELS = 1 << 24
SOUND_FORMATS = frozenset(["WAV", "WAVEX", "RF64", "FLAC", "OGG"])  # by libsndfile's names
ZEROS = 10  # zero crossings of the resampling filter on each side of its centre: resample_poly's default
BLOCK = 1 << 16  # samples that are decoded at a time on the way to a cut

Sound = NDArray[np.float32]
Frames = NDArray[np.uint8]  # [T, S, S, 3]


def sound_library() -> ModuleType:
    """Return the module soundfile. Raises UserError if it is not installed."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without its libsndfile
        raise UserError("data.audio: needs soundfile: pip install 'esvit-scale[modalities]'") from None
    return soundfile  # type: ignore[no-any-return]


def video_library() -> ModuleType:
    """Return the module av (PyAV). Raises UserError if it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError("data.video: needs PyAV: pip install 'esvit-scale[modalities]'") from None
    return av  # type: ignore[no-any-return]


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn whatever a decoder raises on damaged input into BadMember."""
    try:
        yield
    except (MemoryError, BadMember, UserError):
        raise
    except Exception as error:
        # Without the names that libsndfile and FFmpeg give to bytes in memory, such as an address
        plain = getattr(error, "error_string", None) or getattr(error, "strerror", None)
        raise BadMember(plain.rstrip(".") if isinstance(plain, str) else one_line(error)) from None


def start_of(place: float, held: int, wanted: int) -> int:
    """Return where a stretch of `wanted` of `held` things starts.

    Args:
        place: from 0 (the first possible start) to 1, not included; ½ is the centre.
    """
    return int(place * (held - wanted + 1)) if held > wanted else 0


# --- sound -----------------------------------------------------------------------------------------------------------


class Recording:
    """A file of sound whose header was read: WAV, FLAC, or Vorbis or Opus in Ogg.

    Raises:
        BadMember: it is no such file, or is beyond the limits above.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) > MAX_BYTES:
            raise BadMember(f"{len(data)} bytes: over the limit of {MAX_BYTES}", TOO_LARGE)
        self._data = data
        with _decoding(), self._open() as file:
            if file.format not in SOUND_FORMATS:
                raise BadMember(f"a {file.format} file; WAV, FLAC and Ogg are read")
            if not RATES[0] <= file.samplerate <= RATES[1] or not 1 <= file.channels <= MAX_SOUND_CHANNELS:
                raise BadMember(f"{file.channels} channels at {file.samplerate} Hz")
            if not 0 <= file.frames <= MAX_SECONDS * file.samplerate:
                raise BadMember(f"longer than {MAX_SECONDS:g} s, or of unknown length", TOO_LARGE)
            self.rate: int = file.samplerate
            self.samples: int = file.frames  # of one channel
            # In Vorbis, samples after a seek may be 32 places off; GSM cannot seek.
            self._seeks = file.format != "OGG" and file.seekable()

    def _open(self) -> Any:
        return sound_library().SoundFile(io.BytesIO(self._data))

    def cut(self, place: float, rate: int, samples: int) -> tuple[Sound, int]:
        """Return `samples` samples of the mean of all channels at `rate` Hz, and how many of them the recording has.

        Resampled by scipy's `resample_poly` with its default filter (a Kaiser window with β 5, ten zero crossings a side).
        The cut is made from the recording, with the filter's reach on both sides, and not from silence, so that it is the
        stretch of the whole recording resampled. Values are clipped to -1..1, and what is missing at the end is zero.

        Args:
            place: where the cut starts, as in `start_of`.
        """
        from scipy.signal import resample_poly  # importing it takes half a second

        common = math.gcd(rate, self.rate)
        up, down = rate // common, self.rate // common
        needed, held = -(-samples * down // up), -(-self.samples * up // down)
        start = start_of(place, self.samples, needed)
        if up == down:
            found = self._read(start, needed)
        else:
            reach = down * -(-(ZEROS * max(up, down) // up + 1) // down)  # whole output samples, too
            found = resample_poly(self._read(start - reach, needed + 2 * reach), up, down, window=_filter(up, down))
            found = found[reach * up // down :][:samples]
        length = min(held, samples)
        out = np.zeros(samples, np.float32)
        out[:length] = np.clip(found[:length], -1, 1)
        return out, length

    def _read(self, start: int, count: int) -> NDArray[np.float64]:
        """Return the mean of all channels of `count` samples from `start` on, which are zero outside of the recording."""
        first, last = min(max(start, 0), self.samples), min(max(start + count, 0), self.samples)
        out = np.zeros(count)
        with _decoding(), self._open() as file:
            if self._seeks:
                file.seek(first)
            for at in () if self._seeks else range(0, first, BLOCK):
                file.read(min(BLOCK, first - at))
            values = file.read(last - first, dtype="float64", always_2d=True)
        if len(values) < last - first:
            raise BadMember(f"cut short: {first + len(values)} of {self.samples} samples")
        if not np.isfinite(values).all():
            raise BadMember("samples that are no finite numbers")
        out[first - start : first - start + len(values)] = values.mean(1) if values.shape[1] > 1 else values[:, 0]
        return out

    def check(self) -> None:
        """Decode the whole recording, a block at a time. Raises BadMember."""
        done = 0
        with _decoding(), self._open() as file:
            while len(values := file.read(BLOCK, dtype="float32", always_2d=True)):
                done += len(values)
                if not np.isfinite(values).all():
                    raise BadMember("samples that are no finite numbers")
        if done < self.samples:
            raise BadMember(f"cut short: {done} of {self.samples} samples")


@lru_cache(maxsize=4)
def _filter(up: int, down: int) -> NDArray[np.float64]:
    """Return the filter that `resample_poly` makes by default, which takes it longer than to apply it."""
    from scipy.signal import firwin

    largest = max(up, down)
    taps: NDArray[np.float64] = firwin(2 * ZEROS * largest + 1, 1 / largest, window=("kaiser", 5.0))
    return taps


# --- video -----------------------------------------------------------------------------------------------------------


class Frameable(Protocol):
    """What has numbered frames."""

    count: int

    def at(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the frames of these ascending numbers."""


def cut_frames(clip: Frameable, place: float, frames: int, step: int, size: int) -> tuple[Frames, int]:
    """Return every `step`-th frame of a stretch of a clip, [frames, size, size, 3], and how many of them the clip has.

    A frame is its centre square, resized (bicubic, antialiased). What is missing at the end is zero.

    Args:
        place: where the stretch starts, as in `start_of`.
    """
    start = start_of(place, clip.count, (frames - 1) * step + 1)
    numbers = range(start, clip.count, step)[:frames]
    out, length = np.zeros((frames, size, size, 3), np.uint8), 0
    for image in clip.at(numbers):
        out[length], length = square(image, size), length + 1
    if length < len(numbers):
        raise BadMember(f"cut short: {length} of {len(numbers)} frames can be decoded")
    return out, length


def square(image: Image.Image, size: int) -> Frames:
    """Return the centre square of an RGB image, resized to [size, size, 3]."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC))


class NumberedFrames:
    """A clip of which every frame is an image file.

    Args:
        read: functions that return the files, in the order of their numbers.
    """

    def __init__(self, read: Sequence[Callable[[], bytes]]) -> None:
        self._read = read
        self.count = len(read)

    def at(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the frames of these numbers. Raises BadImage."""
        for number in numbers:
            yield decode(self._read[number]())


class Clip:
    """A file of video whose frames were counted, by reading its packets without decoding them.

    The frames are those of its first video stream, in the order of their times.

    Args:
        ending: extension of the file, one of DEMUXERS.

    Raises:
        BadMember: it is no such file, or is beyond the limits above.
    """

    def __init__(self, data: bytes, ending: str) -> None:
        if len(data) > MAX_BYTES:
            raise BadMember(f"{len(data)} bytes: over the limit of {MAX_BYTES}", TOO_LARGE)
        self._data, self._demuxer = data, DEMUXERS[ending]
        times: list[int | None] = []
        reordered = False
        with _decoding(), self._open() as (container, stream):
            for packet in container.demux(stream):
                if packet.size:
                    times.append(packet.pts)
                    reordered = reordered or packet.pts != packet.dts
                if len(times) > MAX_FRAMES:
                    raise BadMember(f"more than {MAX_FRAMES} frames", TOO_LARGE)
        self.count = len(times)
        known = sorted({time for time in times if time is not None})
        # None: some have no time; or they are in an AVI and are shown in another order than they are stored in: AVI has no
        # times of its own, and those that FFmpeg guesses there are wrong, and others after a seek.
        guessed = reordered and self._demuxer == DEMUXERS["avi"]
        self._times = known if len(known) == len(times) and not guessed else None

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        av = video_library()
        # No protocol at all: a file may name others, which FFmpeg would open.
        options = {"protocol_whitelist": "none"}
        with av.open(
            io.BytesIO(self._data), format=self._demuxer, options=options, metadata_errors="replace"
        ) as container:
            if not container.streams.video:
                raise BadMember("no video in it")
            stream = container.streams.video[0]
            _check_frame(stream.codec_context.width, stream.codec_context.height)
            stream.thread_type = "NONE"  # a loader process has one core
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            yield container, stream

    def at(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the upright frames of these ascending numbers, decoded from the key frame before the first, or, without
        times, from the beginning.

        Fewer are yielded of a file that is cut short. Raises BadMember.
        """
        if not numbers:
            return
        wanted = set(numbers) if self._times is None else {self._times[number] for number in numbers}
        with _decoding(), self._open() as (container, stream):
            if self._times is not None:
                container.seek(self._times[numbers[0]], stream=stream)
            for number, frame in enumerate(container.decode(stream)):
                if number >= MAX_DECODED:
                    raise BadMember(
                        f"more than {MAX_DECODED} frames from a key frame to the last one wanted", TOO_LARGE
                    )
                place = number if self._times is None else frame.pts
                if place in wanted:
                    wanted.remove(place)
                    yield _upright(frame)
                if not wanted:
                    return

    def check(self) -> None:
        """Decode the whole clip. Raises BadMember."""
        done = 0
        with _decoding(), self._open() as (container, stream):
            for frame in container.decode(stream):
                _check_frame(frame.width, frame.height)
                done += 1
        if done < self.count:
            raise BadMember(f"cut short: {done} of {self.count} frames can be decoded")


def _check_frame(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadMember(f"frames of {width}x{height} pixels")
    if width * height > MAX_FRAME_PIXELS:
        raise BadMember(f"frames of {width}x{height} pixels: over the limit of {MAX_FRAME_PIXELS}", TOO_LARGE)


def _upright(frame: Any) -> Image.Image:
    """Return a decoded frame as RGB, turned as its display matrix says: telephones store videos turned."""
    _check_frame(frame.width, frame.height)
    pixels = frame.to_ndarray(format="rgb24")
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))


# --- text ------------------------------------------------------------------------------------------------------------


def text_of(data: bytes) -> str:
    """Return the text of a .txt file, without white space around it. Raises BadMember for other text than UTF-8."""
    _check_text(data)
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadMember(f"not UTF-8 at byte {error.start}") from None


def texts_of(data: bytes, fields: Sequence[str]) -> list[str]:
    """Return the texts that a .json file has in these fields, in their order, without empty and missing ones.

    Raises:
        BadMember: the file is no JSON object.
    """
    _check_text(data)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadMember(f"no JSON: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise BadMember("no JSON object")
    found = (content.get(field) for field in fields)
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]


def tokens(text: str, length: int) -> tuple[NDArray[np.int16], int]:
    """Return the bytes of a text in UTF-8, plus one, and how many there are; the rest of `length` is zero.

    A text that is too long ends with a whole character.
    """
    cut = text.encode("utf-8", "replace")[:length].decode("utf-8", "ignore").encode()
    out = np.zeros(length, np.int16)
    out[: len(cut)] = np.frombuffer(cut, np.uint8).astype(np.int16) + 1
    return out, len(cut)


def _check_text(data: bytes) -> None:
    if len(data) > MAX_TEXT:
        raise BadMember(f"{len(data)} bytes of text: over the limit of {MAX_TEXT}", TOO_LARGE)
