"""The pixel format of a data set: number of channels, bits of each, and the statistics that normalise them."""

from typing import Any, NamedTuple

import numpy as np

from esvit_scale.config import Data
from esvit_scale.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, with pixel values in 0..1
STD = (0.229, 0.224, 0.225)


class PixelFormat(NamedTuple):
    """Channels, bits, mean and standard deviation of images.

    The default is the 8-bit RGB of photographs, to which every colour mode is converted; pixels of any other format are
    taken as their files store them.
    """

    channels: int = 3
    bits: int = 8  # 8 or 16, unsigned
    mean: tuple[float, ...] = MEAN  # per channel, with pixel values scaled to 0..1
    std: tuple[float, ...] = STD

    @property
    def is_rgb8(self) -> bool:
        """Return whether this is 8-bit RGB."""
        return (self.channels, self.bits) == (3, 8)

    @property
    def dtype(self) -> Any:
        """Return the NumPy type of a pixel value."""
        return np.uint8 if self.bits == 8 else np.uint16

    @property
    def largest(self) -> int:
        """Return the largest value that a pixel can have."""
        return (1 << self.bits) - 1

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {self.bits} bits"


RGB8 = PixelFormat()


def pixel_format(data: Data) -> PixelFormat:
    """Return the pixel format that the `data` section of a run's config describes.

    Raises:
        UserError: `data.mean` and `data.std` are not set, and the images are not 8-bit RGB.
    """
    found = PixelFormat(data.channels, data.bits)
    if data.mean and data.std:
        return found._replace(mean=tuple(data.mean), std=tuple(data.std))
    if not found.is_rgb8:
        raise UserError(
            f"data.mean, data.std: not set, and there are no usual values for {found}; `esvit-scale shards stats SET` prints "
            "those of your set"
        )
    return found
