"""Checkpoints of the official EsViT code (`main_esvit.py`): student, teacher and centres, in and out.

The file is a pickle. It is read with `weights_only`, and the few things beside tensors that the official trainer
saves (its arguments; numpy numbers in the optimizer's state) are read as nothing at all; whatever else asks for code
is refused.

| official | here |
|---|---|
| `module.` (DDP), `backbone.` (multi-crop wrapper) | left out |
| `patch_embed.…`, `layers.…`, `norm.…` | `trunk.…` |
| `head.…`, `head_dense.…` | `objective.view_head.…`, `objective.region_head.…` |
| `….relative_position_index`, `….attn_mask` | computed |
| `dino_loss`: `center`, `center_grid` [1, K] | centres `view.values`, `region.values` [K] |
"""

import math
import re
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esvit_scale import config as config_module
from esvit_scale import files
from esvit_scale.checkpoint.weights import (
    TRUNK,
    Weights,
    check_network,
    check_shapes,
    head_of_center,
    head_prefix,
    heads_in,
)
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.registry import SHAPES
from esvit_scale.models.swin import PATCH
from esvit_scale.models.windows import relative_position_index

NETWORKS = {"student": "module.", "teacher": ""}  # with the prefix that the official trainer saves it under
CENTERS = {"center": "view.values", "center_grid": "region.values"}
_THEIR_HEADS = {"head.": head_prefix("view_head"), "head_dense.": head_prefix("region_head")}
_WRAPPERS = ("module.", "backbone.")
_COMPUTED = ("relative_position_index", "attn_mask")
_TABLE = re.compile(r"trunk\.layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table")
_SIZES = (224, *range(PATCH, 1025, PATCH))  # of global crops, the likely one first


def read(path: Path) -> Weights:
    """Student, teacher (what there is of them) and centres; the config is read off the tensors' shapes.

    Raises:
        UserError: no such file, damaged, asking for code, another architecture, or tensors missing or unknown.
    """
    content = _load(path)
    found = {name: content[name] for name in NETWORKS if isinstance(content.get(name), Mapping)}
    if not found:
        held = ", ".join(sorted(map(str, content))[:5]) or "nothing"
        raise UserError(f"{path}: no official EsViT checkpoint: no student or teacher in it; it holds {held}")
    networks = {name: _our_names(found[name]) for name in found}
    some = networks.get("teacher") or networks["student"]
    config = _config(path, some)
    for name, tensors in networks.items():
        check_network(f"{path}: {name}", tensors, config)
    return Weights(config, networks, _centers(path, content.get("dino_loss"), config, heads_in(some)))


def write(path: Path, weights: Weights) -> None:
    """A file that the official scripts load; no optimizer state, their training starts at its epoch 0.

    Raises:
        UserError: a network is missing, or the trunk is none of the official code's.
    """
    absent = [name for name in NETWORKS if name not in weights.networks]
    if absent:
        raise UserError(f"{path}: an official checkpoint holds both networks, here is no {absent[0]}; give a run dir")
    if not any(_TABLE.fullmatch(name) for name in weights.networks["teacher"]):
        raise UserError(f"{path}: the official code has no {weights.config.model.trunk}; --to safetensors takes it")
    content: dict[str, Any] = {n: _their_names(weights.networks[n], prefix) for n, prefix in NETWORKS.items()}
    centers = {theirs: weights.centers[ours][None] for theirs, ours in CENTERS.items() if ours in weights.centers}
    with files.replacing(path) as aside:
        torch.save(content | {"dino_loss": centers}, aside)


# --- the file --------------------------------------------------------------------------------------------------------


class _Nothing:
    """Stands for what a checkpoint holds beside weights: takes any arguments and state, keeps and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_READ_AS_NOTHING = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Bool")),
    "_codecs.encode",
)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the .pth of the official trainer")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(_Nothing, n) for n in _READ_AS_NOTHING]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles of others
            # Legacy files (torch < 1.6) cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can fail in any way; it runs no code
        raise UserError(f"{path}: {_why(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: no official EsViT checkpoint: holds a {type(content).__name__}")
    return content


def _check_archive(path: Path) -> None:
    """The archive's own checksums, which torch does not look at."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if bad:
        raise UserError(f"{path}: damaged: {bad} is not what was written")


def _why(error: Exception) -> str:
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"asks for {asked[1]}, which weights have no need of; refused, nothing of it was run"
    first = next(iter(str(error).splitlines()), "")
    return f"damaged, or not a checkpoint: {type(error).__name__}: {first[:160]}"


# --- names -----------------------------------------------------------------------------------------------------------


def _our_names(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    ours = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or name.endswith(_COMPUTED):
            continue
        while name.startswith(_WRAPPERS):
            name = name.partition(".")[2]
        prefix = next((prefix for prefix in _THEIR_HEADS if name.startswith(prefix)), "")
        ours[_THEIR_HEADS.get(prefix, TRUNK) + name.removeprefix(prefix)] = tensor.detach().float().contiguous()
    return ours


def _their_names(tensors: dict[str, Tensor], wrapper: str) -> dict[str, Tensor]:
    to_theirs = {ours: theirs for theirs, ours in _THEIR_HEADS.items()} | {TRUNK: ""}
    theirs = {}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in to_theirs if name.startswith(prefix))
        short = wrapper + to_theirs[prefix] + name.removeprefix(prefix)
        theirs[short] = tensor
        if _TABLE.fullmatch(name):
            window = _window(tensor)
            index = relative_position_index(window, torch.device("cpu")).view(window**2, window**2)
            theirs[short.replace("relative_position_bias_table", "relative_position_index")] = index.clone()
    return theirs


# --- what the tensors say --------------------------------------------------------------------------------------------


def _config(path: Path, tensors: dict[str, Tensor]) -> Config:
    stages: dict[int, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        if (match := _TABLE.fullmatch(name)) and tensor.ndim == 2:
            stages[int(match[1])].append(tensor)
    patches = tensors.get("trunk.patch_embed.proj.weight")
    if patches is None or not stages:
        names = [name.removeprefix(TRUNK) for name in tensors]
        raise UserError(
            f"{path}: not a Swin of the official code (no patch_embed.proj.weight or no relative position tables); "
            f"it has {', '.join(names[:3])} and {max(len(names) - 3, 0)} more tensors"
        )
    tables = [of_stage for _, of_stage in sorted(stages.items())]
    values = {
        "name": "converted",
        "data": {"global_crops": {"size": _global_size([_window(t[0]) for t in tables])}},
        "model": _model(len(patches), [len(t) for t in tables], [t[0].shape[1] for t in tables], _window(tables[0][0])),
        "objective": _objective(tensors),
    }
    return config_module.validate(values, where=str(path))


def _model(embed_dim: int, depths: list[int], heads: list[int], window: int) -> dict[str, Any]:
    shape = (embed_dim, tuple(depths), tuple(heads))
    for name, known in SHAPES.items():  # V1 stands before V2 of the same shape
        if known[:3] == shape:
            return {"trunk": name, "window": window}
    return {"trunk": "swin_t", "window": window, "embed_dim": embed_dim, "depths": depths, "heads": heads}


def _objective(tensors: dict[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {"regions": "region_head" in heads_in(tensors)}
    directions = tensors.get(head_prefix("view_head") + "last_layer.weight_v")
    first = tensors.get(head_prefix("view_head") + "mlp.0.weight")
    if directions is not None and directions.ndim == 2 and first is not None:
        values |= {"prototypes": len(directions), "bottleneck": directions.shape[1], "head_hidden": len(first)}
    return values


def _window(table: Tensor) -> int:
    """From a table of (2w − 1)² rows."""
    return (math.isqrt(len(table)) + 1) // 2


def _global_size(windows: list[int]) -> int:
    """Pixels of global crops for which stages have these windows: 224 if it fits, because sizes above it that give
    the same windows cannot be told from the tensors."""
    fits = (s for s in _SIZES if [min(s // PATCH // 2**i, windows[0]) for i in range(len(windows))] == windows)
    return next(fits, _SIZES[0])


def _centers(path: Path, loss: Any, config: Config, heads: list[str]) -> dict[str, Tensor]:
    """Of the heads that are there; a centre is of no use without its head."""
    there = loss if isinstance(loss, Mapping) else {}
    found = {
        ours: there[theirs].detach().float().view(-1)
        for theirs, ours in CENTERS.items()
        if isinstance(there.get(theirs), Tensor) and head_of_center(ours) in heads
    }
    wanted = {name: [config.objective.prototypes] for name in found}
    check_shapes(f"{path}: dino_loss", {name: list(center.shape) for name, center in found.items()}, wanted)
    return found
