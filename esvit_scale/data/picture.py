"""Decoding of image files in two steps: first the size, by which crops are placed, then the pixels that they need.

libjpeg scales by ½, ¼ or ⅛ inside the inverse DCT, so a JPEG is decoded no larger than its crops need. Files of other
formats are decoded whole in the first step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.decode import (
    BadImage,
    check_scans,
    check_size,
    decode,
    decode_as_stored,
    exif_orientation,
    jpeg_markers,
    load,
    open_checked,
    open_header,
)
from esvit_scale.data.pixel_format import RGB8, PixelFormat

try:
    import simplejpeg
except ImportError:  # not installed (no wheel for this platform): Pillow gives the same pixels, more slowly
    simplejpeg = None

Pixels = NDArray[Any]  # [H, W, C], uint8 or uint16

EXIF = 0xE1  # the JPEG marker APP1, whose segment holds Exif data
LOSSLESS = 0xC3  # the JPEG marker SOF3: ITU-T T.81 process 14
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF orientation → the function that undoes it
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
    """An upright image of known `width` × `height`, which the method `pixels` decodes.

    `turned` says that the file stores it mirrored or turned. A reduction that does not divide a side of such an image may
    put the partial row or column, which libjpeg fills up at the end of the stored image, at the beginning of this one.
    """

    def __init__(
        self, width: int, height: int, decoded: Callable[[int], tuple[Pixels, int]], turned: bool = False
    ) -> None:
        self.width, self.height, self.turned = width, height, turned
        self._decoded = decoded

    def pixels(self, reduction: int = 1) -> tuple[Pixels, int]:
        """Decode the image and return its pixels [H, W, C] and their reduction.

        Args:
            reduction: 1, 2, 4 or 8: decode at 1/reduction of the size, rounded up. A format that cannot be scaled while it is
                decoded is returned at a smaller reduction.

        Raises:
            BadImage: the file is truncated or corrupt.
        """
        return self._decoded(reduction)


def open_picture(data: bytes, pixel_format: PixelFormat = RGB8) -> Picture:
    """Open an image file: read the header of a JPEG, and decode a file of any other format at once.

    JPEGs whose colours libjpeg-turbo does not convert to RGB (CMYK) are decoded at once, too.

    Raises:
        BadImage: as for `decode`, or, for a pixel format other than 8-bit RGB, as for `decode_as_stored`.
    """
    if not pixel_format.is_rgb8:
        stored = decode_as_stored(data, pixel_format.channels, pixel_format.bits)
        return Picture(stored.shape[1], stored.shape[0], lambda reduction: (stored, 1))
    if data[:2] == b"\xff\xd8" and (header := _jpeg_header(data)) is not None:
        width, height = header
        check_size(width, height)
        markers = jpeg_markers(data)
        check_scans(data, markers)
        orientation = exif_orientation(open_checked(data)) if EXIF in markers else 1
        if orientation > 4:
            width, height = height, width
        decoded = partial(_jpeg_pixels, data, orientation, LOSSLESS not in markers)
        return Picture(width, height, decoded, turned=orientation != 1)
    pixels = np.array(decode(data))
    return Picture(pixels.shape[1], pixels.shape[0], lambda reduction: (pixels, 1))


def check_decodes(data: bytes, pixel_format: PixelFormat = RGB8) -> None:
    """Decode a file at its full size and drop the pixels. Raises BadImage for a file that training cannot use."""
    open_picture(data, pixel_format).pixels(1)


def _jpeg_header(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG as stored, or None for a file that Pillow should decode."""
    if simplejpeg is None:
        image = open_header(data)
        return image.size if image.format == "JPEG" and image.mode in ("RGB", "L") else None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "Gray") else None


def _jpeg_pixels(data: bytes, orientation: int, has_dct: bool, reduction: int) -> tuple[Pixels, int]:
    """Return the upright pixels of a JPEG and their reduction, which is 1 if the file decodes only at its full size.

    A lossless JPEG has no DCT that could be scaled, and simplejpeg 1.7.3 kills the process when it is asked to.
    """
    reduction = reduction if has_dct else 1
    try:
        pixels = _turbo(data, reduction)
    except BadImage:
        if reduction == 1:
            raise
        pixels, reduction = _turbo(data, 1), 1
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)), reduction


def _turbo(data: bytes, reduction: int) -> Pixels:
    """Return the pixels [H, W, 3] of a JPEG at 1/`reduction` of its size, not turned upright. Raises BadImage.

    A file that makes libjpeg-turbo warn (junk before a marker) is decoded by Pillow, which tells truncated files from
    harmless ones.
    """
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
