"""Which members of a sample hold its sound, video and text.

x.jpg, x.png, …                                  the image
x.wav, x.flac, x.ogg                             audio
x.mp4, x.webm, x.avi, or x.frame-0000.jpg, …     video
x.txt, x.json                                    text
"""

import re
from collections.abc import Iterable

from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.data.tar_names import chosen_images

MODALITIES = ("audio", "video", "text")  # the sections of `data` of the same names, in this order
IMAGE = "image"
AUDIO = ("wav", "flac", "ogg")  # extensions
DEMUXERS = {"mp4": "mp4", "webm": "matroska", "avi": "avi"}  # FFmpeg's reader by extension: contents choose no reader,
# because playlists and the like make FFmpeg open files that they name
VIDEO = tuple(DEMUXERS)
TEXT = ("txt", "json")
FRAME = re.compile(r"frame-(\d{1,9})\.(\w+)")  # extension of a member that is one frame of a clip


def is_member(extension: str) -> bool:
    """Return whether members of this extension are sound, video or a frame of a clip."""
    return extension.rpartition(".")[2] in (*AUDIO, *VIDEO) or bool(frames_of([extension]))


def frames_of(extensions: Iterable[str]) -> list[str]:
    """Return the extensions that are numbered frames of a clip, by their numbers."""
    found = [(int(match[1]), e) for e in extensions if (match := FRAME.fullmatch(e)) and match[2] in EXTENSIONS]
    return [extension for _, extension in sorted(found)]


def member_of(extensions: Iterable[str], modality: str) -> str | None:
    """Return the extension of a sample's member that holds a modality, or of its first frame; None for a sample without.

    A plain extension (`ogg`) comes before longer ones (`fr.ogg`).
    """
    extensions = list(extensions)
    if modality == "text":
        return next((extension for extension in TEXT if extension in extensions), None)
    found = [e for e in extensions if e.rpartition(".")[2] in (AUDIO if modality == "audio" else VIDEO)]
    if modality == "video" and not found:
        found = frames_of(extensions)[:1]
    return next((e for e in found if "." not in e), found[0] if found else None)


def plain_image(extensions: Iterable[str]) -> str | None:
    """Return the extension of a sample's image; None for a sample without one, whose frames are no images of their own."""
    extensions = list(extensions)
    frames = set(frames_of(extensions))
    return next(iter(chosen_images(e for e in extensions if e not in frames)), None)


def members_of(extensions: Iterable[str], modality: str) -> list[str]:
    """Return the extensions of all members that training reads of a modality of a sample."""
    extensions = list(extensions)
    if modality == "text":
        return [extension for extension in TEXT if extension in extensions]
    first = member_of(extensions, modality)
    return [] if first is None else frames_of(extensions) if FRAME.fullmatch(first) else [first]
