"""RGB pictures of images that are not 8-bit RGB: three bands become red, green and blue, or one becomes grey."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from esvit_scale.errors import UserError

STRETCH = (2, 98)  # percentiles that become black and white, because 16-bit sensors use a small part of their range


def composite(pixels: NDArray[np.generic], bands: Sequence[int] | None = None, stretch: bool = True) -> Image.Image:
    """Return an image [H, W, C] as an RGB picture.

    Args:
        bands: one or three bands, counted from 1; None takes the first three, or the first if there are fewer than three.
        stretch: scale each band between its 2nd and 98th percentile; otherwise between 0 and the largest value of its
            type (1 for floats).

    Raises:
        UserError: the image does not have one of the bands.
    """
    channels = pixels.shape[2]
    chosen = tuple(bands or ((1, 2, 3) if channels >= 3 else (1,)))
    missing = [band for band in chosen if band > channels]
    if missing:
        raise UserError(f"--bands: there is no band {missing[0]}; the images have {channels} channels")
    out = np.stack([_eight_bits(pixels[:, :, band - 1], stretch) for band in chosen], 2)
    return Image.fromarray(np.broadcast_to(out, (*out.shape[:2], 3)).copy())


def _eight_bits(band: NDArray[np.generic], stretch: bool) -> NDArray[np.uint8]:
    values = band.astype(np.float64)
    if stretch:
        low, high = np.percentile(values, STRETCH)
    else:
        low, high = (
            0.0,
            float(np.iinfo(np.dtype(band.dtype).name).max) if np.issubdtype(band.dtype, np.integer) else 1.0,
        )
    return ((values - low) / max(high - low, 1e-9) * 255).round().clip(0, 255).astype(np.uint8)
