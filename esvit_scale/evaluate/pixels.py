"""The baseline without a network: an image's pixels, at low resolution, as its features.

Trained features that do no better than these are not worth using.
"""

from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # pixels; 3 · 32² = 3,072 numbers an image, so that large sets fit into memory


def small_pixels(images: Tensor, side: int = SIDE) -> Tensor:
    """Return the pixels of images [N, channels, S, S] as features [N, channels · min(S, side)²].

    Larger images, and all that are not square, are brought to `side` × `side` by averaging areas.
    """
    height, width = images.shape[-2:]
    small = F.adaptive_avg_pool2d(images, side) if width > side or width != height else images
    return small.flatten(1)
