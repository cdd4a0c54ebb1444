"""Gram anchoring: keep the similarities between an image's regions as an earlier teacher had them (DINOv3).

L = mean over the global crops v of 1/T² ‖X_v X_vᵀ − Y_v Y_vᵀ‖²_F

X_v [T, C] are the student's region features of a global crop as unit rows, so that X_v X_vᵀ has the cosines between all
pairs of its regions; Y_v are those of the *Gram teacher*, an earlier teacher (parallel/gram.py). The features themselves
may turn, as long as the similarities stay. Siméoni et al. 2025 give the squared norm without the factor 1/T²; the mean
over pairs and crops is that of their code. A loss of this kind needs no head and fits every objective,
so that objective/network.py adds it to the objective's loss.
"""

from torch import Tensor

from esvit_scale.models.trunk import Grid
from esvit_scale.objective.objective import fixed_precision, unit


def gram_loss(student: Tensor, teacher: Tensor, globals_: Grid) -> Tensor:
    """Return the Gram loss of the global crops of a micro-batch, a scalar in fp32 (fp64 for fp64).

    A crop is compared with itself alone: the largest tensor is [2·B, T, T].

    Args:
        student: [ΣB·T, C] region features, those of the global crops first.
        teacher: [2·B·T, C] region features of the global crops by the Gram teacher, without gradient.
        globals_: (2·B, H, W), with T = H·W.
    """
    crops, h, w = globals_
    with fixed_precision(student.device):
        anchor = _cosines(teacher.view(crops, h * w, -1))
        return (_cosines(student[: len(teacher)].view(crops, h * w, -1)) - anchor).square().mean()


def _cosines(regions: Tensor) -> Tensor:
    """Return the cosines between the regions of each crop, [crops, T, T], of features [crops, T, C]."""
    rows = unit(regions)
    return rows @ rows.transpose(1, 2)


def kept_bytes(grid: tuple[int, int], dim: int, element: int) -> int:
    """Return the bytes per global crop that the loss keeps for its backward.

    Args:
        grid: (H, W) of the crop's regions, of width `dim` and `element` bytes per number.
    """
    tokens, wide = grid[0] * grid[1], 4
    rows = 1 if element == wide else 2  # the unit rows, and the features if they were cast
    return wide * tokens * (rows * dim + tokens + 2)  # the differences; a row's length before and after it is clamped


def flops(grid: tuple[int, int], dim: int) -> int:
    """Return the FLOPs per global crop: cosines of student and Gram teacher, and the two products of the backward."""
    return 4 * 2 * (grid[0] * grid[1]) ** 2 * dim
