"""An image file whose size is known before its pixels are: so that crops can be placed first, and a JPEG decoded no
larger than they need (libjpeg scales by ½, ¼ or ⅛ inside the inverse DCT)."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.decode import BadImage, check_size, decode, exif_orientation, load, open_header

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: Pillow gives the same pixels, more slowly
    simplejpeg = None

Pixels = NDArray[np.uint8]  # [H, W, 3]

SCAN, EXIF, PROGRESSIVE = 0xDA, 0xE1, {0xC2, 0xC6, 0xCA, 0xCE}  # JPEG markers; Exif data is in an APP1 segment
MAX_SCANS = 200  # of a progressive JPEG; each costs a pass over all pixels, so that small files could take hours
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF orientation → what undoes it
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


class Picture:
    """An upright RGB picture of `width` × `height` pixels, decoded by `pixels`."""

    def __init__(self, width: int, height: int, decoded: Callable[[int], tuple[Pixels, int]]) -> None:
        self.width, self.height = width, height
        self._decoded = decoded

    def pixels(self, reduction: int = 1) -> tuple[Pixels, int]:
        """The picture at 1/`reduction` (1, 2, 4 or 8) of its size, rounded up, or at a larger one where its format
        cannot be scaled while it is decoded; and the reduction that it has.

        Raises:
            BadImage: truncated or corrupt.
        """
        return self._decoded(reduction)


def open_picture(data: bytes) -> Picture:
    """Reads the header of a JPEG; other formats, and JPEGs that libjpeg-turbo's RGB conversion does not cover (CMYK),
    are decoded at once.

    Raises:
        BadImage: as `decode`.
    """
    if data[:2] == b"\xff\xd8" and (header := _jpeg_header(data)) is not None:
        width, height = header
        check_size(width, height)
        segments = dict(_segments(data))
        if segments.keys() & PROGRESSIVE and data.count(b"\xff\xda") > MAX_SCANS:
            raise BadImage(f"a JPEG of more than {MAX_SCANS} scans (decompression bomb?)")
        orientation = exif_orientation(open_header(data)) if EXIF in segments else 1
        if orientation > 4:
            width, height = height, width
        return Picture(width, height, partial(_jpeg_pixels, data, orientation))
    pixels = np.array(decode(data))
    return Picture(pixels.shape[1], pixels.shape[0], lambda reduction: (pixels, 1))


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, place of its content) of a JPEG's segments before the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        yield data[at + 1], at + 4
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)


def _jpeg_header(data: bytes) -> tuple[int, int] | None:
    """(width, height) as stored; None where Pillow should look at the file."""
    if simplejpeg is None:
        image = open_header(data)
        return image.size if image.format == "JPEG" and image.mode in ("RGB", "L") else None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "Gray") else None


def _jpeg_pixels(data: bytes, orientation: int, reduction: int) -> tuple[Pixels, int]:
    upright = _UPRIGHT[orientation](_turbo(data, reduction))
    return np.ascontiguousarray(upright), reduction


def _turbo(data: bytes, reduction: int) -> Pixels:
    """What libjpeg-turbo only warns of (junk before a marker) is Pillow's to judge: it tells truncated files from
    harmless ones."""
    if simplejpeg is not None:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(
                data, "RGB", min_height=-(-height // reduction), min_width=-(-width // reduction)
            )
            return pixels
        except ValueError:
            pass
    image = open_header(data)
    image.draft("RGB", (image.width // reduction, image.height // reduction))
    return np.array(load(image))
