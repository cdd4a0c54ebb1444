"""Decoding of image files to upright 8-bit RGB images, or to the channels and values that the files store.

BadImage is raised, with the reason, for a file that cannot be decoded or whose pixel values have no agreed range.
"""

import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFile

from esvit_scale.data import raster
from esvit_scale.data.bad_image import MAX_PIXELS, MIN_SIDE, BadImage, check_size, one_line
from esvit_scale.data.left_out import EMPTY, OTHER_PIXELS, TOO_LARGE

__all__ = ["EXTENSIONS", "MAX_PIXELS", "MIN_SIDE", "BadImage", "check_size", "decode"]

EXTENSIONS = frozenset(
    [
        "jpg",
        "jpeg",
        "jpe",
        "jfif",
        "png",
        "webp",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "jp2",
        "j2k",
        "avif",
        "tga",
    ]
)

SCAN = 0xDA  # the JPEG marker that begins a scan
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}  # JPEG frame markers
MAX_SCANS = 200  # of a progressive JPEG; each scan is a pass over all pixels, so a small file could take hours
TIFF_BITS, TIFF_COMPRESSION, TIFF_PHOTOMETRIC, TIFF_SAMPLES, TIFF_PLANAR = 258, 259, 262, 277, 284  # tags
WHITE_IS_ZERO, RGB_PHOTOMETRIC = 0, 2  # values of TIFF_PHOTOMETRIC: a negative; red, green and blue
NO_COMPRESSION, PLANES = 1, 2  # values of TIFF_COMPRESSION, and of TIFF_PLANAR: bands one after the other

ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("ignore", module=r"PIL\.")  # warnings about files: `decode` raises what matters, sizes included

_UPRIGHT = {  # EXIF orientation → the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes) -> Image.Image:
    """Return the first frame of an image file as an upright RGB image, its EXIF orientation undone.

    Palette, CMYK and other colour modes are converted, 12- and 16-bit grey is scaled (not clipped) to 8 bits, and
    transparent pixels are blended with white, since the colour stored under transparency is often arbitrary.

    Training can use exactly the files that this function accepts: `picture.open_picture` decodes the same files to the same
    pixels, so `shards create` and `shards verify` need no other check.

    Raises:
        BadImage: the file is empty, not an image, truncated or corrupt, has a shorter side under MIN_SIDE pixels or
            more than MAX_PIXELS pixels, or is a JPEG of more than MAX_SCANS scans.
    """
    if data.startswith(raster.NPY):
        return _rgb_of_raster(raster.read(data, 3))
    if data.startswith(raster.TIFF) and (pixels := _tiff_beyond_pillow(data)) is not None:
        return pixels
    image = open_header(data)
    check_size(*image.size)
    pixels = load(image)
    orientation = exif_orientation(image)  # read after the pixels, which it may follow in a PNG
    return pixels if orientation == 1 else pixels.transpose(_UPRIGHT[orientation])


def decode_as_stored(data: bytes, channels: int, bits: int) -> raster.Array:
    """Return the upright pixels [H, W, C] of an image file, with the channels and values that the file stores.

    TIFF and `.npy` files are read by raster.py, others by Pillow: grey has one channel, RGB and palette images have three,
    and an alpha channel counts as one more.

    Raises:
        BadImage: as for `decode`, or the file has other channels or bits than asked for.
    """
    if raster.is_raster(data):
        pixels = raster.read(data, channels)
    else:
        image = open_header(data)
        check_size(*image.size)
        pixels = raster.upright(_stored(image, data), exif_orientation(image))
    if (pixels.shape[2], 8 * pixels.itemsize) != (channels, bits):
        raise BadImage(raster.mismatch(pixels, channels, bits), OTHER_PIXELS)
    return np.ascontiguousarray(pixels)


def _stored(image: Image.Image, data: bytes) -> raster.Array:
    """Decode an image with Pillow and return its pixels [H, W, C] in the stored orientation. Raises BadImage."""
    if image.format == "PNG" and data[24] == 16 and image.mode in ("RGB", "RGBA", "LA"):
        raise BadImage(
            "a PNG of 16 bits and several channels, which Pillow reads with 8 bits; store it as TIFF or .npy"
        )
    try:
        image.load()
        if image.mode in ("1", "P"):
            image = image.convert("L" if image.mode == "1" else "RGB")
    except (MemoryError, BadImage):
        raise
    except Exception as error:
        raise BadImage(one_line(error)) from None
    pixels = np.asarray(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise BadImage("32-bit integer pixels: unsigned 8 or 16 bits are read")
        return pixels.astype(np.uint16)[:, :, None]
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        raise BadImage(f"{image.mode} pixels, whose channels are not stored as measured values")
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _tiff_beyond_pillow(data: bytes) -> Image.Image | None:
    """Return the RGB image of a TIFF that Pillow cannot read or decodes wrongly; None for one to be read by Pillow.

    Pillow cannot read TIFFs of two bands or of more than four, and big-endian 16-bit negatives. From uncompressed
    16-bit planes it reads half of each plane, and from other bands that are stored as planes only the first one, as
    grey.

    Raises:
        BadImage: the file does not have 1 or 3 channels, or as for `raster.read`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        tags = image.tag_v2  # type: ignore[attr-defined]
        bands, samples = len(image.getbands()), tags.get(TIFF_SAMPLES, 1)
        more = samples > bands and (tags.get(TIFF_PHOTOMETRIC), samples) != (RGB_PHOTOMETRIC, 4)
        planes = tags.get(TIFF_PLANAR) == PLANES and tags.get(TIFF_COMPRESSION, NO_COMPRESSION) == NO_COMPRESSION
        if not more and (not planes or max(tags.get(TIFF_BITS, (1,))) <= 8):
            return None
    except Image.UnidentifiedImageError:
        pass
    except Exception:
        return None
    return _rgb_of_raster(raster.read(data, 3))


def _rgb_of_raster(pixels: raster.Array) -> Image.Image:
    if pixels.shape[2] not in (1, 3):
        raise BadImage(raster.mismatch(pixels, 3, 8), OTHER_PIXELS)
    eight = pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(eight, (*eight.shape[:2], 3)).copy())


def open_header(data: bytes) -> Image.Image:
    """Open an image file without decoding a pixel. Raises BadImage."""
    if not data:
        raise BadImage("empty file", EMPTY)
    check_scans(data, jpeg_markers(data))
    return open_checked(data)


def open_checked(data: bytes) -> Image.Image:
    """Open an image file that `check_scans` has passed, without decoding a pixel. Raises BadImage."""
    try:
        return Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image, or its header is corrupt") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS} pixels (decompression bomb?)", TOO_LARGE) from None
    except Exception as error:  # decoders raise almost anything on corrupt input
        raise BadImage(one_line(error)) from None


def check_scans(data: bytes, markers: set[int]) -> None:
    """Raise BadImage for a progressive JPEG of more than MAX_SCANS scans; other files pass.

    Args:
        markers: the `jpeg_markers` of the file.
    """
    if PROGRESSIVE & markers and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadImage(f"a JPEG of more than {MAX_SCANS} scans (decompression bomb?)")


def jpeg_markers(data: bytes) -> set[int]:
    """Return the markers of a JPEG's segments before its first scan; none for a file of another format."""
    return {marker for marker, _ in jpeg_segments(data)} if data[:2] == b"\xff\xd8" else set()


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset of its content) for each segment of a JPEG before its first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != SCAN:
        if data[at + 1] == 0xFF:  # padding
            at += 1
            continue
        yield data[at + 1], at + 4
        at += 2 + max(int.from_bytes(data[at + 2 : at + 4], "big"), 2)


def load(image: Image.Image) -> Image.Image:
    """Return the pixels of an opened file as RGB, in the stored orientation. Raises BadImage."""
    try:
        image.load()
        return _rgb(image)
    except (MemoryError, BadImage):
        raise
    except Exception as error:
        raise BadImage(one_line(error)) from None


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an opened file: 1 (upright, or none recorded) to 8."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise BadImage("32-bit float pixels have no agreed range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> "np.ndarray":
    """Return a 16-bit grey image scaled to uint8 [H, W], with black as 0.

    Pillow holds such pixels as 16- or 32-bit integers, depending on the format. It returns the values of a TIFF as they are
    stored: 12-bit values unscaled, and 16-bit values not inverted where the photometric tag is WhiteIsZero.
    """
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise BadImage("32-bit integer pixels have no agreed range")
    largest = 0xFFFF
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        tags = image.tag_v2  # type: ignore[attr-defined]
        largest = (1 << max(int(tags.get(TIFF_BITS, (16,))[0]), 8)) - 1
        if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:
            grey = largest - grey
    return ((grey * 255 + largest // 2) // largest).clip(0, 255).astype(np.uint8)
