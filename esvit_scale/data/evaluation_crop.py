"""The evaluation crop: the short side resized to size·256/224, then the centre cut out.

`centre_crop` is torchvision's `Resize` and `CenterCrop`, to the last bit. `decode_centre_crop` gives the same crop of an
image file up to rounding and the JPEG decoder's own scaling, several times as fast; the evaluations use it.
`decode_whole` resizes the whole picture instead, for pictures that fill their frame.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from esvit_scale.data.crops import REDUCTIONS, resized
from esvit_scale.data.decode import decode, decode_as_stored
from esvit_scale.data.picture import Picture, open_picture
from esvit_scale.data.pixel_format import PixelFormat

LONG_SIDE = 8192  # pixels; of an image that resizing would make longer, only the middle is resized
# Smallest number of pixels of a reduced JPEG per pixel of the resized image, along each axis. With 2, crops of reduced
# images differ from exact ones as little as those of whole images do (docs/evaluation.md).
SPARE = 2.0
BICUBIC_SUPPORT = 2  # pixels on each side of the filter's centre


def evaluation_side(size: int) -> int:
    """Return the length in pixels to which evaluation resizes the short side before it crops `size` × `size` pixels."""
    return round(size * 256 / 224)


def opened(data: bytes, pixels: PixelFormat) -> Image.Image | NDArray[Any]:
    """Return the upright image in `data`: a Pillow RGB image, or an array [H, W, C] of any other format. Raises BadImage."""
    return decode(data) if pixels.is_rgb8 else decode_as_stored(data, pixels.channels, pixels.bits)


def decode_centre_crop(data: bytes, size: int, pixels: PixelFormat) -> NDArray[Any]:
    """Decode an image file and return its evaluation crop [S, S, C], close to `centre_crop` of the whole image.

    A JPEG is decoded at the largest reduction that keeps SPARE pixels per resized pixel, and 8-bit RGB is resized by
    torch's vectorised kernel, which computes no row or column past the crop.

    Raises:
        BadImage: the file holds no usable image.
    """
    if not pixels.is_rgb8:
        return centre_crop(opened(data, pixels), size).transpose(1, 2, 0)
    picture, short = open_picture(data), evaluation_side(size)
    width, height = _resized_size(picture.width, picture.height, short)
    if max(width, height) > LONG_SIDE:
        return centre_crop(Image.fromarray(picture.pixels()[0]), size).transpose(1, 2, 0)
    source, reduction = picture.pixels(max(r for r in REDUCTIONS if r == 1 or _may_reduce(picture, r, short)))
    scale = height * reduction / picture.height, width * reduction / picture.width  # resized pixels per source pixel
    left, top = round((width - size) / 2), round((height - size) / 2)
    lines = math.ceil((top + size) / scale[0] + BICUBIC_SUPPORT * max(1 / scale[0], 1)) + 1  # that the crop depends on
    x = torch.from_numpy(source[:lines]).permute(2, 0, 1)[None]
    shape = _computed(top + size, x.shape[2], height), _computed(left + size, x.shape[3], width)
    y = torch.empty(1, 3, *shape, dtype=torch.uint8, memory_format=torch.channels_last)
    torch.ops.aten._upsample_bicubic2d_aa.out(x, shape, False, *scale, out=y)
    return y[0, :, top : top + size, left : left + size].permute(1, 2, 0).numpy()


def whole_image(image: Image.Image | NDArray[Any], size: int) -> NDArray[Any]:
    """Return the whole image as [C, S, S], resized (bicubic) to a square; it is distorted unless it is square itself."""
    if isinstance(image, Image.Image):
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return resized(image, size, size).transpose(2, 0, 1)


def decode_whole(data: bytes, size: int, pixels: PixelFormat) -> NDArray[Any]:
    """Decode an image file and return the whole image [S, S, C], close to `whole_image` of it.

    A JPEG is decoded at the largest reduction that keeps SPARE pixels per resized pixel.

    Raises:
        BadImage: the file holds no usable image.
    """
    if not pixels.is_rgb8:
        return whole_image(opened(data, pixels), size).transpose(1, 2, 0)
    picture = open_picture(data)
    source, reduction = picture.pixels(max(r for r in REDUCTIONS if r == 1 or _may_reduce(picture, r, size)))
    box = (0, 0, picture.width / reduction, picture.height / reduction)  # a reduced image's last pixels may be partial
    return np.asarray(Image.fromarray(source).resize((size, size), Image.Resampling.BICUBIC, box=box))


def _may_reduce(picture: Picture, reduction: int, short: int) -> bool:
    """Return whether the crop may be cut from the image at 1/`reduction` of its size: sharp enough, and not shifted.

    Pixel 0 of a reduced image must cover `reduction` whole pixels. In an image that EXIF turns this holds only if
    `reduction` divides both sides.
    """
    whole = not picture.turned or picture.width % reduction == picture.height % reduction == 0
    return whole and min(picture.width, picture.height) >= SPARE * reduction * short


def _computed(end: int, source: int, whole: int) -> int:
    """Return how many lines of a resized image to compute along an axis, of which the first `end` are needed.

    One more where the source has just as many lines: torch's kernel takes equal lengths for "nothing to resize".
    """
    return end + 1 if end == source and end < whole else end


def centre_crop(image: Image.Image | NDArray[Any], size: int) -> NDArray[Any]:
    """Return the centre of an image as [C, S, S]: the short side resized to size·256/224 (bicubic), then cropped.

    This is torchvision's `Resize` and `CenterCrop`. If the resized image would be more than LONG_SIDE pixels long, only
    its central square is computed, so that memory stays in proportion to the output: an image of 65000x8 pixels would
    be 2.1 million pixels long at a short side of 256. The result then differs from a crop of the whole resized image
    only because Pillow chooses the order of its two passes by size: by less than 0.5/255 on average, and by up to
    25/255 in single pixels of pure noise.
    """
    short = evaluation_side(size)
    if not isinstance(image, Image.Image):
        return _centre_crop_of_array(image, size, short)
    width, height = image.size
    whole = _resized_size(width, height, short)
    left, top = round((whole[0] - size) / 2), round((whole[1] - size) / 2)
    if max(whole) > LONG_SIDE:
        x, y = width / whole[0], height / whole[1]
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    else:
        square = image.resize(whole, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(square).transpose(2, 0, 1)


def _centre_crop_of_array(pixels: NDArray[Any], size: int, short: int) -> NDArray[Any]:
    """Return the `centre_crop` of an array [H, W, C]; a very long one is first cut to its middle, at whole pixels."""
    most = max(LONG_SIDE // short, 2) * min(pixels.shape[:2])
    for axis in (0, 1):
        if (over := pixels.shape[axis] - most) > 0:
            pixels = pixels.take(range(over // 2, over // 2 + most), axis)
    height, width = pixels.shape[:2]
    whole = _resized_size(width, height, short)[::-1]
    pixels = pixels if whole == (height, width) else resized(pixels, *whole)
    top, left = round((whole[0] - size) / 2), round((whole[1] - size) / 2)
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


def _resized_size(width: int, height: int, short: int) -> tuple[int, int]:
    """Return (width, height) of an image after its short side is resized to `short` pixels, as torchvision rounds it."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
