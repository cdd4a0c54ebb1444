"""The baseline without a network: an image's pixels, at low resolution, as its features.

Trained features that do no better than these are not worth using.
"""

from torch import Tensor
from torch.nn import functional as F

SIDE = 32  # pixels; 3 · 32² = 3,072 numbers an image, so that large sets fit into memory


def small_pixels(images: Tensor, side: int = SIDE) -> Tensor:
    """Return the pixels of images [N, channels, S, S] as features [N, channels · min(S, side)²].

    Larger images are reduced by averaging areas.
    """
    small = F.adaptive_avg_pool2d(images, side) if images.shape[-1] > side else images
    return small.flatten(1)
