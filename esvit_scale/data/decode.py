"""Image file bytes → an upright 8-bit RGB picture. Good files of any colour mode decode; bad ones name their reason."""

import io
import warnings

import numpy as np
from PIL import Image, ImageFile

MIN_SIDE = 4  # pixels; a smaller picture holds nothing to crop
MAX_PIXELS = 178_956_970  # a larger picture is taken for a decompression bomb (Pillow's own hard limit)
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

ImageFile.LOAD_TRUNCATED_IMAGES = False
warnings.filterwarnings("ignore", module=r"PIL\.")  # of files: `decode` raises what matters, sizes included

_UPRIGHT = {  # EXIF orientation → the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """The bytes are no usable picture; the message is a short reason on one line."""


def decode(data: bytes) -> Image.Image:
    """The picture in `data` as an RGB image, EXIF orientation undone, first frame.

    Palette, CMYK and other colour modes are converted, 16-bit grey is scaled (not clipped) to 8 bits, and transparent
    pixels are laid over white, since the colour stored under transparency is often arbitrary.

    Raises:
        BadImage: empty, not an image, truncated or corrupt, shorter side < 4 px, or more than MAX_PIXELS pixels.
    """
    image = open_header(data)
    check_size(*image.size)
    pixels = load(image)
    orientation = exif_orientation(image)  # after the pixels: a PNG's may stand behind them
    return pixels if orientation == 1 else pixels.transpose(_UPRIGHT[orientation])


def open_header(data: bytes) -> Image.Image:
    """The file opened, no pixel decoded. Raises BadImage."""
    if not data:
        raise BadImage("empty file")
    try:
        return Image.open(io.BytesIO(data))
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage("not an image, or its header is corrupt") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS} pixels (decompression bomb?)") from None
    except Exception as error:  # decoders raise almost anything on corrupt input
        raise BadImage(_reason(error)) from None


def check_size(width: int, height: int) -> None:
    """Raises BadImage for pictures too small to crop or too large to decode."""
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width}x{height} pixels: the shorter side is under {MIN_SIDE}")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels: over the limit of {MAX_PIXELS} (decompression bomb?)")


def load(image: Image.Image) -> Image.Image:
    """The pixels of an opened file as RGB, as stored (not turned upright). Raises BadImage."""
    try:
        image.load()
        return _rgb(image)
    except (MemoryError, BadImage):
        raise
    except Exception as error:
        raise BadImage(_reason(error)) from None


def exif_orientation(image: Image.Image) -> int:
    """1 (upright) to 8."""
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
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: "np.ndarray") -> "np.ndarray":
    """16-bit grey [H, W] → uint8. Pillow holds it as 16- or 32-bit integers, by format."""
    grey = grey.astype(np.int64)
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise BadImage("32-bit integer pixels have no agreed range")
    return ((grey + 128) // 257).astype(np.uint8)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
