"""The error for unusable image files and the limits on image size, shared by all decoders."""

from esvit_scale.data.left_out import DAMAGED, TOO_LARGE, TOO_SMALL

MIN_SIDE = 4  # pixels; a smaller image has nothing to crop
MAX_PIXELS = 178_956_970  # a larger image is taken for a decompression bomb (Pillow's own hard limit)


class BadImage(Exception):
    """Error for bytes that are not a usable image; its message is a short reason on one line.

    Args:
        kind: one of the reasons in left_out.py, by which such images are counted.
    """

    def __init__(self, reason: str, kind: str = DAMAGED) -> None:
        super().__init__(reason)
        self.kind = kind


class BadMember(BadImage):
    """Error for bytes that are not a usable recording, clip or text; a sample may do without."""


def check_size(width: int, height: int) -> None:
    """Raise BadImage for an image too small to crop or too large to decode."""
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width}x{height} pixels: the shorter side is under {MIN_SIDE}", TOO_SMALL)
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels: over the limit of {MAX_PIXELS} (decompression bomb?)", TOO_LARGE)


def one_line(error: Exception) -> str:
    """Return a decoder's error message as one line of at most 200 characters, or the error's type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
