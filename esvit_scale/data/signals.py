"""Signals: what a sample has beside its image, as fixed-size tensors (`data.audio`, `data.video`, `data.text`).

    member (signal_members.py) ─ media.py ─► views, drawn from the key ─ worker_batch.py ─► batch ─ stream.py ─► Signal

A view is drawn from (seed, epoch, sample key, modality, view), so it is the same whichever process reads the sample, and
does not change when another modality is read too. A signal's views are stacked like crops: view v of the b-th of B samples
is row v · B + b.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.data import media, photometric
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.crops import generator_of
from esvit_scale.data.pixel_format import RGB8, PixelFormat, pixel_format
from esvit_scale.data.signal_members import FRAME, MODALITIES, frames_of, member_of
from esvit_scale.run_keys import Data

GAIN_DB = 6.0  # the loudness of a cut changes by up to so many decibels in either direction

Read = Callable[[str], bytes]  # returns the bytes of the member of an extension


class Signal(NamedTuple):
    """One modality of one micro-batch; a sample without it has zeros of length 0."""

    values: Tensor  # audio: float32 [V·B, samples] in -1..1; video: float32 [V·B, 3, T, S, S], normalised as images;
    # text: int64 [V·B, L], byte + 1, 0 past the end
    lengths: Tensor  # int64 [V·B]: samples, frames or tokens that the sample has; 0: it lacks the modality


class Views(NamedTuple):
    """The views of one modality of one sample, or of a batch of them."""

    values: NDArray[Any]  # [V, …] as `shape_of`
    lengths: NDArray[np.int64]  # [V]


def wanted(data: Data) -> tuple[str, ...]:
    """Return the modalities that a config reads beside images."""
    return tuple(name for name in MODALITIES if getattr(data, name).views)


def require(data: Data) -> None:
    """Raise UserError if a library is missing for a modality that a config reads."""
    if data.audio.views:
        media.sound_library()
    if data.video.views:
        media.video_library()


def shape_of(data: Data, modality: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the type and shape of one view as loader processes send it."""
    if modality == "audio":
        return torch.float32, (round(data.audio.rate * data.audio.seconds),)
    if modality == "video":
        return torch.uint8, (data.video.frames, data.video.size, data.video.size, 3)
    return torch.int16, (data.text.length,)


# --- views -----------------------------------------------------------------------------------------------------------


class Draw(NamedTuple):
    """The random choices for one view: numbers from 0 to 1, not included."""

    place: float  # where a cut starts
    loudness: float
    field: float  # which of several texts


CENTRE = Draw(0.5, 0.5, 0.0)


def draw(seed: int, epoch: int, key: str, modality: str, view: int) -> Draw:
    """Draw a view of a sample."""
    rng = generator_of(f"{seed}/{epoch}/{modality} {view}/{key}")
    return Draw(rng.random(), rng.random(), rng.random())


def views_of(data: Data, modality: str, extensions: Sequence[str], read: Read, draws: Sequence[Draw]) -> Views | None:
    """Return the views of a modality of a sample; None for a sample that lacks it, or has an empty one.

    Raises:
        BadImage: the member is damaged or beyond the limits of media.py.
    """
    cut = _cutter(data, modality, extensions, read)
    if cut is None:
        return None
    values, lengths = zip(*(cut(each) for each in draws), strict=True)
    return Views(np.stack(values), np.array(lengths, np.int64)) if lengths[0] else None


Cut = Callable[[Draw], tuple[NDArray[Any], int]]


def _cutter(data: Data, modality: str, extensions: Sequence[str], read: Read) -> Cut | None:
    """Read a member and return the function that makes a view of it; None where a sample has none."""
    if modality == "text":
        return _text_cutter(data, extensions, read)
    member = member_of(extensions, modality)
    if member is None:
        return None
    if modality == "audio":
        recording, rate = media.Recording(read(member)), data.audio.rate
        return partial(_sound, recording, rate, round(rate * data.audio.seconds)) if recording.samples else None
    clip: media.Frameable
    if FRAME.fullmatch(member):
        clip = media.NumberedFrames([partial(read, extension) for extension in frames_of(extensions)])
    else:
        clip = media.Clip(read(member), member.rpartition(".")[2])
    video = data.video
    return (lambda d: media.cut_frames(clip, d.place, video.frames, video.step, video.size)) if clip.count else None


def _sound(recording: media.Recording, rate: int, samples: int, drawn: Draw) -> tuple[NDArray[np.float32], int]:
    sound, length = recording.cut(drawn.place, rate, samples)
    gain = 10 ** (GAIN_DB * (2 * drawn.loudness - 1) / 20)
    return (sound if gain == 1 else np.clip(sound * np.float32(gain), -1, 1)), length


def _text_cutter(data: Data, extensions: Sequence[str], read: Read) -> Cut | None:
    fields = data.text.fields
    if fields:
        texts = media.texts_of(read("json"), fields) if "json" in extensions else []
    else:
        texts = [media.text_of(read("txt"))] if "txt" in extensions else []
    if not any(texts):
        return None
    return lambda d: media.tokens(texts[int(d.field * len(texts))], data.text.length)


def read_all(
    config: Config, epoch: int | None, key: str, extensions: Sequence[str], read: Read
) -> tuple[dict[str, Views], list[str]]:
    """Return the views of every modality that a sample has, and one line about each member that cannot be used.

    Args:
        epoch: None: one view of each for evaluation, from the centre, of the first field, as loud as it is.
        read: raises BadImage for a member that cannot be read.
    """
    found, problems = {}, []
    for modality in wanted(config.data):
        count = getattr(config.data, modality).views
        draws = [CENTRE] if epoch is None else [draw(config.seed, epoch, key, modality, v) for v in range(count)]
        try:
            views = views_of(config.data, modality, extensions, read, draws)
        except BadImage as error:
            problems.append(f"{modality}: {error}")
            continue
        if views is not None:
            found[modality] = views
    return found, problems


# --- batches ---------------------------------------------------------------------------------------------------------


def finish(modality: str, values: Tensor, lengths: Tensor, pixels: PixelFormat) -> Signal:
    """Return the signal of a micro-batch from what loader processes sent: values [V, B, …] and lengths [V, B]."""
    values, lengths = values.flatten(0, 1), lengths.flatten(0, 1)
    if modality == "text":
        return Signal(values.to(torch.int64), lengths)
    if modality == "audio":
        return Signal(values, lengths)
    rows, frames = values.shape[:2]
    colours = photometric.unit(values.flatten(0, 1).permute(0, 3, 1, 2), RGB8)
    colours = photometric.normalize_(colours, pixels).unflatten(0, (rows, frames))
    there = torch.arange(frames, device=lengths.device) < lengths[:, None]  # [V·B, T]
    return Signal(colours.mul_(there[..., None, None, None]).transpose(1, 2).contiguous(), lengths)


def video_pixels(data: Data) -> PixelFormat:
    """Return the format by which frames are normalised: that of the images, if these are 8-bit RGB."""
    pixels = pixel_format(data)
    return pixels if pixels.is_rgb8 else RGB8


Arrays = dict[str, tuple[NDArray[Any], NDArray[np.int64]]]  # by modality: values [V, B, …], lengths [V, B]


def arrays(data: Data, size: int, views: int) -> Arrays:
    """Return arrays of zeros for the modalities that a config reads of `size` samples, of `views` views each."""
    found: Arrays = {}
    for modality in wanted(data):
        dtype, shape = shape_of(data, modality)
        zeros = torch.zeros((views, size, *shape), dtype=dtype).numpy()
        found[modality] = zeros, np.zeros((views, size), np.int64)
    return found


def fill(views: Mapping[str, Views], into: Arrays, b: int) -> None:
    """Write the views of sample `b` of a batch into arrays [V, B, …] and [V, B]; zeros for what it lacks."""
    for modality, (values, lengths) in into.items():
        if (own := views.get(modality)) is None:
            values[:, b], lengths[:, b] = 0, 0
        else:
            values[:, b], lengths[:, b] = own
