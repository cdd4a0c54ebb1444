"""The check of a sample's members beside the image: each is decoded whole, as training would decode a part of it."""

from collections.abc import Mapping

from esvit_scale.data import media
from esvit_scale.data.bad_image import BadImage, BadMember
from esvit_scale.data.decode import decode
from esvit_scale.data.signal_members import AUDIO, FRAME, TEXT, VIDEO
from esvit_scale.data.sources.base import Item


def check(extension: str, data: bytes) -> None:
    """Raise BadImage for a member that training could not use; members of other kinds are not looked at."""
    ending = extension.rpartition(".")[2]
    if ending in AUDIO:
        media.Recording(data).check()
    elif ending in VIDEO:
        media.Clip(data, ending).check()
    elif FRAME.fullmatch(extension):
        decode(data)
    elif extension in TEXT:
        media.text_of(data) if ending == "txt" else media.texts_of(data, [])


def checked_members(item: Item) -> tuple[dict[str, bytes], dict[str, BadImage]]:
    """Return the members of a sample that can be used, and the errors of the others, by extension.

    Empty files are left out without an error, and of numbered frames all are left out if one is bad.
    """
    good: dict[str, bytes] = {}
    bad: dict[str, BadImage] = {
        extension: BadMember(reason, kind) for extension, (reason, kind) in item.missing.items()
    }
    for extension, data in item.extras.items():
        try:
            if data:
                check(extension, data)
                good[extension] = data
        except BadImage as error:
            bad[extension] = error
    if any(FRAME.fullmatch(extension) for extension in bad):
        good = {extension: data for extension, data in good.items() if not FRAME.fullmatch(extension)}
    return good, bad


def problems(members: Mapping[str, bytes]) -> list[str]:
    """Return one line about each member that cannot be used."""
    found = checked_members(Item(b"", None, members))[1]
    return [f".{extension}: {error}" for extension, error in found.items()]
