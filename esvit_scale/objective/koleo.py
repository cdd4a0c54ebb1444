"""KoLeo: keep the view features of different images apart (Sablayrolles et al. 2019, as in DINOv2, Oquab et al. 2023).

    L = Σ over the two global crops of −1/n Σ_i log max(d_i, 1e-6),   d_i = min over j ≠ i of ‖f_i − f_j‖

f are the student's view features as unit vectors, of one crop of n images. −L estimates the entropy of their
distribution (Kozachenko and Leonenko 1987): it is largest when they are spread evenly over the sphere. A loss of this
kind needs no head and fits every objective, so that objective/network.py adds it to the objective's loss.
"""

import torch
from torch import Tensor

from esvit_scale.objective.objective import fixed_precision, unit
from esvit_scale.parallel import collectives

CROPS = 2  # the globals
# Rows of unit norm that are nearer than this are the same point in fp32. They have a finite loss and no gradient, which
# would otherwise be the direction of a rounding error times 10⁶ or more.
SMALLEST_DISTANCE = 1e-6


def koleo(view: Tensor, images: int, across_ranks: bool) -> Tensor:
    """Return the KoLeo loss of the global crops of a micro-batch, a scalar in fp32 (fp64 for fp64).

    Gradients flow to an image and to its nearest neighbour. The loss is 0 where an image has no other to be compared
    with.

    Args:
        view: [V·B, C] view features, crop 0 of all images, crop 1 of all images, …
        images: B.
        across_ranks: compare with the images of all ranks, which must then all call it; else with this rank's alone.
    """
    with fixed_precision(view.device):
        terms = [_of_crop(unit(crop), across_ranks) for crop in view[: CROPS * images].split(images)]
    return torch.stack(terms).sum()


def _of_crop(features: Tensor, across_ranks: bool) -> Tensor:
    """Return −1/n Σ_i log max(d_i, SMALLEST_DISTANCE) of unit rows [n, C]."""
    others = collectives.gather_rows(features) if across_ranks else features  # [N, C]
    if len(others) == 1:
        return features.new_zeros(())
    with torch.no_grad():
        own = torch.arange(len(features), device=features.device)
        cosines = features @ others.t()  # [n, N]
        cosines[own, own + (collectives.rank() * len(features) if across_ranks else 0)] = -torch.inf
        nearest = cosines.argmax(1)
    # From the difference and not from the cosine, whose rounding error would be that of the small distances.
    squares = (features - others[nearest]).square().sum(1)
    return -0.5 * squares.clamp_min(SMALLEST_DISTANCE**2).log().mean()


def kept_bytes(dim: int, element: int) -> int:
    """Return the bytes per image that the loss keeps for its backward, for features of width `dim` and `element` bytes."""
    wide = torch.float32.itemsize
    rows = 1 if element == wide else 2  # the difference to the neighbour, and the features if they were cast
    return CROPS * (rows * dim + 4) * wide  # 4: a row's length and distance, each before and after it is clamped
