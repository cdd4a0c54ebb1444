"""Where a crop lies, and its pixels. Every draw comes from (seed, epoch, sample key, crop), so a sample's crops are the
same whoever reads it and whatever else is in its batch."""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RATIO = (3 / 4, 4 / 3)  # width / height
TRIES = 10


def keyed_generator(seed: int, epoch: int, key: str, crop: int) -> np.random.Generator:
    """The random source of one crop of one sample. Use only `random()`: the stream behind it is stable."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{crop}/{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def crop_box(
    rng: np.random.Generator, width: int, height: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random resized crop, in pixels; the distribution of torchvision's
    `RandomResizedCrop.get_params`: area uniform in `scale` of the picture's, log-uniform aspect, ten tries, else the
    largest centred box whose aspect is allowed."""
    log_low, log_high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(TRIES):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            return left, top, left + w, top + h
    if width / height < RATIO[0]:
        w, h = width, round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w, h = round(height * RATIO[1]), height
    else:
        w, h = width, height
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_crop(
    rng: np.random.Generator,
    image: Image.Image,
    scale: tuple[float, float],
    out: NDArray[np.uint8],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> None:
    """Crop, resize (antialiased, bicubic unless said otherwise) and flip (p ½) the RGB `image` into `out` [3, S, S].

    Cropped before it is resized, as torchvision does: the resize's filter must not see beyond the crop.
    """
    size = out.shape[-1]
    box = crop_box(rng, *image.size, scale)
    pixels = np.asarray(image.crop(box).resize((size, size), resample)).transpose(2, 0, 1)
    out[:] = pixels[:, :, ::-1] if rng.random() < 0.5 else pixels
