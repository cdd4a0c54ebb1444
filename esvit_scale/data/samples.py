"""A small classification task for the demo that needs no download.

Its images are patches of the photographs that come with scikit-image and scikit-learn. The class of a patch is the
photograph that it is cut from; train and test patches come from disjoint halves of the photograph.
"""

import io

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from esvit_scale.data.crops import keyed_generator
from esvit_scale.data.shard_writer import Sample
from esvit_scale.errors import UserError

# The photographs that come inside the scikit-image package
PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "camera",
    "cell",
    "chelsea",
    "clock",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "page",
    "retina",
    "rocket",
    "stereo_motorcycle",
    "text",
)
SKLEARN_PHOTOGRAPHS = ("china", "flower")
CLASSES = (*PHOTOGRAPHS, *SKLEARN_PHOTOGRAPHS)


def demo_samples(size: int = 64, train: int = 100, test: int = 30, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """Return train and test patches for `write_samples`, with CLASSES as their classes.

    Args:
        size: pixels on a side of a patch.
        train, test: patches per photograph. Train patches lie in one half of it and test patches in the other (halves
            of the longer side), so that no pixel is in both.

    Returns:
        Train and test samples (PNG) with alternating classes; the same arguments give the same bytes.

    Raises:
        UserError: patches larger than half a photograph.
    """
    parts: tuple[list[list[Sample]], list[list[Sample]]] = ([], [])
    for label, name in enumerate(CLASSES):
        for half, (pixels, count) in enumerate(zip(_halves(photograph(name)), (train, test), strict=True)):
            parts[half].append(_patches(pixels, name, label, ("train", "test")[half], size, count, seed))
    return _take_turns(parts[0]), _take_turns(parts[1])


def photograph(name: str) -> NDArray[np.uint8]:
    """Return the photograph [H, W, 3] with this name, which is one of CLASSES."""
    loaded = load_sample_image(f"{name}.jpg") if name in SKLEARN_PHOTOGRAPHS else getattr(skimage.data, name)()
    pixels = loaded[0] if isinstance(loaded, tuple) else loaded  # a stereo pair: the left picture
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def _halves(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    height, width, _ = pixels.shape
    if width >= height:
        return pixels[:, : width // 2], pixels[:, width // 2 :]
    return pixels[: height // 2], pixels[height // 2 :]


def _patches(
    pixels: NDArray[np.uint8], name: str, label: int, split: str, size: int, count: int, seed: int
) -> list[Sample]:
    height, width, _ = pixels.shape
    if min(height, width) < size:
        raise UserError(
            f"patches of {size} pixels do not fit: half of {name} has {width}x{height} pixels; use {min(height, width)} or "
            "less"
        )
    rng = keyed_generator(seed, 0, f"{split}/{name}", 0)
    samples = []
    for i in range(count):
        top, left = int(rng.random() * (height - size + 1)), int(rng.random() * (width - size + 1))
        png = io.BytesIO()
        Image.fromarray(pixels[top : top + size, left : left + size]).save(png, "PNG")
        samples.append(Sample(f"{name}/{split}-{i:05d}", label, "png", png.getvalue()))
    return samples


def _take_turns(by_class: list[list[Sample]]) -> list[Sample]:
    return [sample for turn in zip(*by_class, strict=True) for sample in turn]


def stereo_pair() -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float32]]:
    """Return a stereo pair of a motorcycle, [500, 741, 3] each, and its true disparity [500, 741] (Middlebury 2014).

    Pixel (y, x) of the left image is at (y, x − disparity) in the right one; the disparity is infinite where it is unknown.
    """
    return skimage.data.stereo_motorcycle()
