"""Resizing position tables to another window or resolution, so that pretraining can continue at another image size.

Position tables are learned position embeddings and relative position biases.

As in Swin's code for fine-tuning (microsoft/Swin-Transformer, `load_pretrained`), the relative position bias table of a
window of side w is treated as an image of (2w − 1) × (2w − 1) offsets with one channel for each head, and is
interpolated bicubically to the new side.

| table | shape | trunks |
|---|---|---|
| `…relative_position_bias_table` | [side², heads] | Swin, ViL, the innermost window of Focal |
| `…pos_embed` | [1, prefix + side², C] | timm's models; the prefix (class token, registers) is copied unchanged |

Two trunks need no resizing: Swin V2 computes its bias from coordinates, and our DeiT resizes its 14×14 position
embeddings to the image's map in every forward pass.
"""

import math
from collections import Counter

from torch import Tensor, cat
from torch.nn import functional as F

from esvit_scale.checkpoint.weights import Shapes, check_shapes
from esvit_scale.errors import UserError

_RELATIVE, _ABSOLUTE = "relative_position_bias_table", "pos_embed"
_OF_POSITIONS = ("relative_position", "pos_embed", "rel_pos")  # the name of every position table contains one of these
_MOST_PREFIX = 16  # largest number of class tokens and registers that is tried


def resize_to_fit(where: object, tensors: dict[str, Tensor], wanted: Shapes) -> tuple[dict[str, Tensor], str]:
    """Return `tensors` with every position table resized to its shape in `wanted`, and a note of what was resized.

    The note is "" when nothing was resized.

    Args:
        where: the source of the tensors, for messages.

    Raises:
        UserError: a position table cannot be resized to the wanted shape, or other tensors do not fit `wanted`.
    """
    fitted, sides = dict(tensors), Counter[tuple[int, int]]()
    for name, shape in wanted.items():
        if name not in tensors or list(tensors[name].shape) == shape:
            continue
        if (resized := _resize_table(name, tensors[name], shape)) is not None:
            fitted[name], old, new = resized
            sides[old, new] += 1
    shapes = {name: list(tensor.shape) for name, tensor in fitted.items()}
    different = [n for n in {*shapes, *wanted} if shapes.get(n) != wanted.get(n)]
    if different and all(any(part in name for part in _OF_POSITIONS) for name in different):
        first = min(different)
        raise UserError(
            f"{where}: weights of another resolution or window, and {len(different)} position tables cannot be resized, "
            f"{first}: {shapes.get(first, 'absent')} in the source, {wanted.get(first, 'absent')} in the model; set "
            "data.global_crops.size and model.window to the source's values"
        )
    check_shapes(where, shapes, wanted)
    words = [f"{n} of {old}×{old} to {new}×{new}" for (old, new), n in sorted(sides.items())]
    return fitted, f"position tables resized: {', '.join(words)}" if words else ""


def bicubic(maps: Tensor, side: int) -> Tensor:
    """Resize maps [C, s, s] to [C, side, side] bicubically (align_corners=False, no antialiasing)."""
    resized: Tensor = F.interpolate(maps[None].float(), (side, side), mode="bicubic", align_corners=False)[0]
    return resized


def _resize_table(name: str, table: Tensor, shape: list[int]) -> tuple[Tensor, int, int] | None:
    """Return a position table resized to `shape`, and its side before and after.

    Return None if the tensor is no position table of a square map, or differs in more than the map's side.
    """
    if name.endswith(_RELATIVE) and table.ndim == len(shape) == 2 and table.shape[1] == shape[1]:
        old, new = _side(len(table)), _side(shape[0])
        if old and new:
            return bicubic(table.T.unflatten(1, (old, old)), new).flatten(1).T.contiguous(), old, new
    if name.endswith(_ABSOLUTE) and table.ndim == len(shape) == 3 and table.shape[2] == shape[2]:
        for prefix in range(_MOST_PREFIX + 1):
            old, new = _side(table.shape[1] - prefix), _side(shape[1] - prefix)
            if old and new:
                cells = bicubic(table[0, prefix:].T.unflatten(1, (old, old)), new).flatten(1).T
                return cat([table[0, :prefix], cells])[None], old, new
    return None


def _side(cells: int) -> int:
    """Return the side of a square map of `cells` cells; 0 if `cells` is not a positive square number."""
    side = math.isqrt(max(cells, 0))
    return side if side**2 == cells else 0
