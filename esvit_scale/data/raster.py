"""Decoding of TIFF files and `.npy` arrays with any number of channels to uint8 or uint16 pixels [H, W, C] as stored.

Pillow reads colour images of 8 bits; this module reads what satellites, microscopes and sensors write. tifffile decodes
TIFF: strips and tiles, contiguous and planar bands, and one-band pages of equal size, which count as bands. Without
imagecodecs it reads uncompressed and deflate-compressed files. Nothing is unpickled, and sizes are checked before memory
is taken.
"""

import io
import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.bad_image import MAX_PIXELS, BadImage, check_size, one_line

try:
    import tifffile
except ImportError:  # an optional dependency
    tifffile = None  # type: ignore[assignment, unused-ignore]
else:
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # `read` raises what matters

Array = NDArray[Any]  # [H, W, C] of uint8 or uint16

ARRAY = "npy"  # extension of arrays, which count as images where no image file lies beside them
MAX_CHANNELS = 16
MAX_BYTES = 3 * MAX_PIXELS  # of decoded pixels: those of the largest 8-bit RGB image
NPY = b"\x93NUMPY"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # classic and BigTIFF, both byte orders
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_MINISWHITE, _PALETTE, _YCBCR = 0, 3, 6  # values of TIFF's PhotometricInterpretation
_REDUCED, _MASK = 1, 4  # bits of TIFF's NewSubfileType: an overview, a transparency mask
_ORIENTATION = 274  # TIFF tag
UPRIGHT = {  # EXIF orientation → (transpose, flip rows, flip columns), in this order
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def is_raster(data: bytes) -> bool:
    """Return whether the bytes are those of a TIFF or a `.npy` file, by the first few."""
    return data.startswith((NPY, *TIFF))


def read(data: bytes, channels: int | None = None) -> Array:
    """Return the upright pixels [H, W, C] of a TIFF or a `.npy` file.

    Args:
        channels: expected number of channels, to find the channel axis of a three-dimensional array: the last axis if
            it has this length, else the first if it has. If neither has, or with None, it is the last axis if that has
            at most MAX_CHANNELS, else the first.

    Raises:
        BadImage: the file is neither of the two, is damaged, too large, of a type other than unsigned 8 or 16 bits, or
            has more than MAX_CHANNELS channels.
    """
    try:
        return _read_npy(data, channels) if data.startswith(NPY) else _read_tiff(data)
    except (MemoryError, BadImage):
        raise
    except Exception as error:  # parsers raise almost anything on corrupt input
        reason = one_line(error)
        hint = "; pip install 'esvit-scale[tiff]'" if "imagecodecs" in reason else ""
        raise BadImage(reason + hint) from None


def mismatch(pixels: Array, channels: int, bits: int) -> str:
    """Return the message about an image of other channels or bits than asked for, with options that would fit it."""
    found, depth = pixels.shape[2], 8 * pixels.itemsize
    return f"{found} channels of {depth} bits, not {channels} of {bits} (channels {found} and bits {depth} would fit)"


def upright(pixels: Array, orientation: int) -> Array:
    """Return a view of pixels [H, W, …] with an EXIF orientation (1 to 8) undone."""
    transpose, rows, columns = UPRIGHT[orientation]
    pixels = pixels.swapaxes(0, 1) if transpose else pixels
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def _read_npy(data: bytes, channels: int | None) -> Array:
    """Decode a `.npy` file; the header is checked before memory is taken. Raises BadImage or ValueError."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise BadImage(f".npy format {version[0]}.{version[1]}: formats 1.0 and 2.0 are read")
    shape, fortran, dtype = _NPY_HEADERS[version](file)
    axis = _channel_axis(shape, channels)
    _check_kind(dtype, str(dtype))
    rest = tuple(n for i, n in enumerate(shape) if i != axis)
    _check(rest[1], rest[0], shape[axis] if axis is not None else 1, dtype.itemsize)
    size = math.prod(shape) * dtype.itemsize
    stored = data[file.tell() : file.tell() + size]
    if len(stored) < size:
        raise BadImage(f"truncated: {len(stored)} of {size} bytes of pixels")
    array = np.frombuffer(stored, dtype).reshape(shape, order="F" if fortran else "C")
    array = array[:, :, None] if axis is None else np.moveaxis(array, axis, 2)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))


def _channel_axis(shape: tuple[int, ...], channels: int | None) -> int | None:
    """Return the axis that holds the channels, preferably one of length `channels`; None if the shape is [H, W]."""
    if len(shape) == 2:
        return None
    if len(shape) != 3:
        raise BadImage(f"an array of shape {list(shape)}, not [H, W], [H, W, C] or [C, H, W]")
    for axis in (2, 0):
        if shape[axis] == channels:
            return axis
    for axis in (2, 0):
        if 1 <= shape[axis] <= MAX_CHANNELS:
            return axis
    raise BadImage(
        f"an array of shape {list(shape)}: neither its last nor its first axis is 1 to {MAX_CHANNELS} channels"
    )


def _read_tiff(data: bytes) -> Array:
    if tifffile is None:
        raise BadImage("a TIFF that needs tifffile: pip install 'esvit-scale[tiff]'")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        pages = _bands(file) if page.samplesperpixel == 1 else [page]
        photometric = int(page.photometric)
        if photometric == _PALETTE:
            raise BadImage("a TIFF with a palette: its values are colour numbers, not measured values")
        if page.dtype is None or page.imagedepth > 1 or page.axes not in ("YX", "YXS", "SYX"):
            raise BadImage(f"a TIFF of {page.bitspersample} bits with axes {page.axes}; 8 or 16 bits are read")
        _check_kind(page.dtype, f"{page.bitspersample}-bit {page.dtype}")
        channels = page.samplesperpixel if len(pages) == 1 else len(pages)
        _check(page.imagewidth, page.imagelength, channels, page.dtype.itemsize)
        bands = [_pixels(p) for p in pages]
        pixels = bands[0] if len(pages) == 1 else np.stack(bands, 2)
        if page.axes == "SYX":
            pixels = np.moveaxis(pixels, 0, 2)
        if photometric == _MINISWHITE:
            pixels = ((1 << page.bitspersample) - 1) - pixels
        tag = page.tags.get(_ORIENTATION)
        orientation = tag.value if tag is not None and tag.value in UPRIGHT else 1
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(upright(pixels, int(orientation)))


def _pixels(page: Any) -> Array:
    """Return the pixels of a TIFF page whose size has been checked.

    Raises:
        BadImage: damaged compressed data makes its decoder ask for more memory than there is.
    """
    try:
        return page.asarray()  # type: ignore[no-any-return]
    except MemoryError:
        raise BadImage("damaged: its compressed data does not fit its size") from None


def _bands(file: Any) -> list[Any]:
    """Return the pages that are the bands of a TIFF: those like the first page, without overviews and masks."""
    first = file.pages.first
    if len(file.pages) > 4 * MAX_CHANNELS:
        raise BadImage(f"a stack of {len(file.pages)} pages, not an image of 1 to {MAX_CHANNELS} channels")
    whole = [p for p in file.pages if not int(p.subfiletype) & (_REDUCED | _MASK)]
    same = [p for p in whole if (p.shape, p.dtype) == (first.shape, first.dtype)]
    return same or [first]


def _check_kind(dtype: Any, name: str) -> None:
    if np.dtype(dtype).kind != "u" or np.dtype(dtype).itemsize > 2:
        raise BadImage(f"{name} pixels: unsigned 8 or 16 bits are read (uint8, uint16); scale them once to these")


def _check(width: int, height: int, channels: int, itemsize: int) -> None:
    check_size(width, height)
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadImage(f"{channels} channels; 1 to {MAX_CHANNELS} are read")
    if width * height * channels * itemsize > MAX_BYTES:
        raise BadImage(f"{width}x{height} pixels of {channels * itemsize} bytes: over the limit of {MAX_BYTES} bytes")
