"""How the weights of a Swin are named in detection libraries, and how their checkpoint files are laid out.

| ours | mmdet (`backbone.` before all) | detectron2 | torchvision |
|---|---|---|---|
| `patch_embed.proj`, `.norm` | `patch_embed.projection`, `.norm` | the same | `features.0.0`, `features.0.2` |
| `layers.S.blocks.I` | `stages.S.blocks.I` | the same | `features.2S+1.I` |
| `layers.S.downsample` | `stages.S.downsample`, in another order | the same | `features.2S+2` |
| `….attn` | `….attn.w_msa` | the same | the same |
| `….mlp.fc1`, `.fc2` | `….ffn.layers.0.0`, `….ffn.layers.1` | the same | `….mlp.0`, `….mlp.3` |
| `norm` | `norm{last}` | `norm{last}` | the same |
| V2: `….attn.q_bias`, `.v_bias` | – | – | `….attn.qkv.bias`, zero for keys |

mmdet merges patches with an unfold, which has the four neighbours of one channel side by side, row by row; here, as in the
official code, the channels of one neighbour are side by side, column by column.

mmdet and detectron2 have a norm for the map of every stage. That of the last one is the trunk's final norm; the others are
new there. All three libraries pad windows before they shift them, as EsViT does, so that images may have any size.
"""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esvit_scale.errors import UserError
from esvit_scale.models.descriptions import DetectorForm, Tensors
from esvit_scale.models.swin_forms import refuse_extra_norms

if TYPE_CHECKING:
    from esvit_scale.models.swin import Swin
    from esvit_scale.models.swin_v2 import SwinV2

UNFOLDED = (0, 2, 1, 3)  # the official order of a merging's neighbours (below, then right) in the order of an unfold


def detector_v1(trunk: "Swin", library: str) -> DetectorForm:
    """Return how a Swin V1 is written for a detection library.

    Raises:
        UserError: a window is smaller than in other stages, or torchvision lacks the number of channels.
    """
    _refuse_other_windows(trunk, library)
    last = f"norm{len(trunk.depths) - 1}."
    if library == "mmdet":
        return DetectorForm(lambda tensors: _mmdet(tensors, last), lambda tensors: {"state_dict": tensors})
    if library == "detectron2":
        return DetectorForm(lambda tensors: _detectron2(tensors, last), _with_matching)
    return DetectorForm(_torchvision, lambda tensors: dict(tensors))


def detector_v2(trunk: "SwinV2", library: str) -> DetectorForm:
    """Return how a Swin V2 is written for torchvision.

    Raises:
        UserError: the library has no Swin V2, or as for V1.
    """
    if library != "torchvision":
        raise UserError(f"{library} has no Swin V2")
    refuse_extra_norms(trunk, library)
    _refuse_other_windows(trunk, library)
    if trunk.distance_windows != tuple(stage.window for stage in trunk.stages):
        raise UserError(f"{library}'s Swin V2 scales distances by its own windows, not by model.pretrained_windows")
    return DetectorForm(_torchvision, lambda tensors: dict(tensors))


def _with_matching(tensors: Tensors) -> dict[str, Any]:
    """Return the content of a file whose names detectron2 matches by their ends, wherever the Swin is in the model."""
    return {"model": tensors, "matching_heuristics": True, "__author__": "esvit-scale"}


def _mmdet(trunk: Tensors, last: str) -> Tensors:
    theirs: Tensors = {}
    for name, tensor in trunk.items():
        if ".downsample." in name:
            tensor = _unfolded(tensor)
        for pattern, replacement in (
            (r"^layers\.", "stages."),
            (r"^patch_embed\.proj\.", "patch_embed.projection."),
            (r"\.attn\.", ".attn.w_msa."),
            (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
            (r"\.mlp\.fc2\.", ".ffn.layers.1."),
            (r"^norm\.", last),
        ):
            name = re.sub(pattern, replacement, name)
        theirs[f"backbone.{name}"] = tensor
    return theirs


def _detectron2(trunk: Tensors, last: str) -> Tensors:
    return {re.sub(r"^norm\.", last, name): tensor for name, tensor in trunk.items()}


def _torchvision(trunk: Tensors) -> Tensors:
    theirs: Tensors = {}
    for name, tensor in trunk.items():
        if name.endswith(".v_bias"):
            continue
        if name.endswith(".q_bias"):
            prefix = name.removesuffix("q_bias")
            tensor = torch.cat([tensor, torch.zeros_like(tensor), trunk[prefix + "v_bias"]])
            name = prefix + "qkv.bias"
        name = re.sub(r"^layers\.(\d+)\.blocks\.", lambda m: f"features.{2 * int(m[1]) + 1}.", name)
        name = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"features.{2 * int(m[1]) + 2}.", name)
        for ours, replacement in (
            ("patch_embed.proj.", "features.0.0."),
            ("patch_embed.norm.", "features.0.2."),
            (".mlp.fc1.", ".mlp.0."),
            (".mlp.fc2.", ".mlp.3."),
        ):
            name = name.replace(ours, replacement)
        theirs[name] = tensor
    return theirs


def _unfolded(tensor: Tensor) -> Tensor:
    """Return the weights of a V1 merging's norm [4C] or reduction [2C, 4C] in the order of an unfold."""
    neighbours = tensor.unflatten(-1, (4, -1))[..., list(UNFOLDED), :]
    return neighbours.transpose(-1, -2).flatten(-2).contiguous()


def _refuse_other_windows(trunk: "Swin", library: str) -> None:
    for s, stage in enumerate(trunk.stages):
        if stage.window < trunk.window:
            raise UserError(
                f"the map of stage {s + 1} ({stage.window}×{stage.window}) is smaller than the window {trunk.window}, and "
                f"{library}'s Swin has one window for all stages"
            )
    if library == "torchvision" and trunk.in_chans != 3:
        raise UserError(f"torchvision's Swin has 3 channels, not {trunk.in_chans}")
