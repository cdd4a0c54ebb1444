"""The operations of photometric.py on one 8-bit crop, with OpenCV, in a loader process (`data.photometric: workers`).

Use it where there is no GPU; on a GPU, photometric.py is faster. Each operation rounds to 8 bits, as the official Pillow
pipeline does.
"""

import math

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.photometric import LUMA, ORDERS, AugmentationParams
from esvit_scale.data.picture import Pixels
from esvit_scale.errors import UserError

try:
    import cv2
except ImportError:
    cv2 = None  # type: ignore[assignment]

IDENTITY = AugmentationParams(
    -1, (1.0, 1.0, 1.0, 0.0), False, 0.0, False
)  # parameters with which photometric.apply only normalises a crop


def require() -> None:
    """Raise UserError when OpenCV is not installed."""
    if cv2 is None:
        raise UserError(
            "data.photometric: workers needs OpenCV: pip install 'esvit-scale[opencv]', or set data.photometric=device"
        )
    cv2.setNumThreads(0)  # one thread: a loader process is one of many


def apply(pixels: Pixels, draw: AugmentationParams) -> None:
    """Apply colour jitter, grayscale, blur and solarisation to a crop [S, S, 3], in place."""
    if draw.order >= 0:
        for operation in ORDERS[draw.order]:
            (_brightness, _contrast, _saturation, _hue)[operation](pixels, draw.factors[operation])
    if draw.grayscale:
        _saturation(pixels, 0.0)
    if draw.radius > 0:
        _blur(pixels, draw.radius)
    if draw.solarize:
        cv2.min(pixels, cv2.bitwise_not(pixels), dst=pixels)  # for x ≥ 128, 255 − x is the smaller


def _brightness(pixels: Pixels, factor: float) -> None:
    cv2.addWeighted(pixels, factor, pixels, 0, 0, dst=pixels)


def _contrast(pixels: Pixels, factor: float) -> None:
    mean = float(np.dot(cv2.mean(pixels)[:3], LUMA))
    cv2.addWeighted(pixels, factor, pixels, 0, round(mean) * (1 - factor), dst=pixels)


def _saturation(pixels: Pixels, factor: float) -> None:
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    cv2.addWeighted(pixels, factor, grey, 1 - factor, 0, dst=pixels)


def _hue(pixels: Pixels, shift: float) -> None:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(round(shift * 256) % 256)  # 256 steps a turn, and uint8 wraps as hues do
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=pixels)


def _blur(pixels: Pixels, radius: float) -> None:
    """Blur as Pillow's `GaussianBlur(radius)`: three box blurs of fractional width, each with edge replication.

    The blur is computed in float32 and rounded once, as on the device. Pillow rounds after every pass along an axis; the
    results differ by up to 3 levels, and by 0.3 on average.
    """
    taps = box_taps(radius)
    blurred = pixels.astype(np.float32)
    for _ in range(3):
        blurred = cv2.sepFilter2D(blurred, -1, taps, taps, borderType=cv2.BORDER_REPLICATE)
    cv2.convertScaleAbs(blurred, dst=pixels)


def box_taps(radius: float) -> NDArray[np.float32]:
    """Return the weights of `photometric.box_taps` for one radius, computed without the 0.1 ms that torch takes."""
    variance = radius**2 / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    taps = np.array([fraction, *[1.0] * (2 * whole + 1), fraction])
    return (taps / taps.sum()).astype(np.float32)
