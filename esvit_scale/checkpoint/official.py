"""Reading and writing checkpoints of the official EsViT code (`main_esvit.py`): student, teacher and centres.

A checkpoint is a pickle and is read with torch's `weights_only`. Objects other than tensors that the official trainer
saves (its arguments, and numpy numbers in the optimizer's state) are ignored; a file that needs any other class is
rejected. Files of a single trunk can be read too, as published by Swin, DeiT, DINO and timm, saved by torch or as
safetensors, and Swin of Hugging Face transformers; a classifier in such a file is dropped.

| official tensor name | our name |
|---|---|
| prefixes `module.` (DDP) and `backbone.` (multi-crop wrapper) | dropped |
| `patch_embed.…`, `layers.…`, `norm.…` | `trunk.…`; other trunks than Swin: official_trunks.py |
| `head.…`, `head_dense.…` | `objective.view_head.…`, `objective.region_head.…` |
| `….relative_position_index`, `….attn_mask`, `….num_batches_tracked` | dropped: can be computed |
| `dino_loss`: `center`, `center_grid` [1, K] | centres `view.values`, `region.values` [K] |
"""

import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale import files
from esvit_scale.checkpoint import official_trunks, safetensors_file, weight_file
from esvit_scale.checkpoint.official_trunks import Family
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

log = logging.getLogger(__name__)

NETWORKS = {"student": "module.", "teacher": ""}  # network → prefix of its tensors' names in an official checkpoint
CENTERS = {"center": "view.values", "center_grid": "region.values"}
_OFFICIAL_HEADS = {"head.": head_prefix("view_head"), "head_dense.": head_prefix("region_head")}
_WRAPPERS = ("module.", "backbone.", "swin.")  # "swin.": of transformers' classifiers
_SINGLE_NETWORK_KEYS = (
    "model",
    "state_dict",
)  # keys under which other programs save a single network; without such a key the whole file is the network
_CLASSIFIER = re.compile(r"(head|head\.fc|head_dist|fc|classifier)\.(weight|bias)")


def read(path: Path) -> Weights:
    """Return the networks and centres of a file, with a config that is derived from the shapes of the tensors.

    A file that holds a single network is returned as a teacher.

    Raises:
        UserError: the file does not exist, is damaged, needs code to be unpickled, or holds another architecture, or
            tensors are missing or unknown.
    """
    content = _load_file(path)
    found = _networks(path, content)
    networks, parts = {}, {}
    for name, tensors in found.items():
        trunk, heads = to_our_names(tensors)
        parts[name] = official_trunks.identify(path, trunk)
        networks[name] = {TRUNK + key: tensor for key, tensor in parts[name][1].items()} | heads
    some = "teacher" if "teacher" in networks else "student"
    classifier = [name for name in found[some] if _CLASSIFIER.fullmatch(_strip_wrappers(name))]
    if classifier:
        log.warning("%s: its classifier (%s) is left out", path, ", ".join(classifier))
    config = _config(path, *parts[some], networks[some])
    for name, tensors in networks.items():
        check_network(f"{path}: {name}", tensors, config)
    return Weights(config, networks, _centers(path, content.get("dino_loss"), config, heads_in(networks[some])))


def read_network(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of one network under the names in the file, or the teacher's of several networks.

    Raises:
        UserError: as `read`, but of any architecture.
    """
    found = _networks(path, _load_file(path))
    network = found.get("teacher") or next(iter(found.values()))
    return {str(name): tensor for name, tensor in network.items() if isinstance(tensor, Tensor)}


def write(path: Path, weights: Weights) -> None:
    """Write a checkpoint that the official scripts can load. It has no optimizer state, so they train from epoch 0.

    Raises:
        UserError: a network is missing, or the official code does not have the trunk.
    """
    absent = [name for name in NETWORKS if name not in weights.networks]
    if absent:
        raise UserError(
            f"{path}: an official checkpoint needs both networks, and the source has no {absent[0]}; give a run dir"
        )
    family = official_trunks.family_of(weights.config.model.trunk)
    if family is None:
        raise UserError(f"{path}: the official code has no trunk {weights.config.model.trunk}; use --to safetensors")
    if weights.config.model.registers:
        raise UserError(f"{path}: the official code has no registers; use --to safetensors or timm")
    content: dict[str, Any] = {}
    for name, prefix in NETWORKS.items():
        tensors = _to_official_names(family, weights.networks[name])
        if any(key.endswith("running_var") for key in tensors):
            prefix = "module."  # the official code wraps a teacher that has batch norms in DDP too
        content[name] = {prefix + key: tensor for key, tensor in tensors.items()}
    centers = {theirs: weights.centers[ours][None] for theirs, ours in CENTERS.items() if ours in weights.centers}
    with (
        files.replacing(path) as tmp,
        tmp.open("wb") as file,
    ):  # given a path, torch would write the path's name into the file
        torch.save(content | {"dino_loss": centers}, file)


# --- the file --------------------------------------------------------------------------------------------------------


class _Ignored:
    """A placeholder that ignored objects are unpickled to; it accepts any arguments and state and discards them."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_IGNORED_GLOBALS = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Bool")),
    "_codecs.encode",
)


def _load_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such file; give the .pth of the official trainer")
    if weight_file.detect_format(path) == "safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: damaged: {error}") from None
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(_Ignored, n) for n in _IGNORED_GLOBALS]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles of other programs
            content = _torch_load(path)
    except Exception as error:  # a damaged pickle can raise any exception; none of its code is run
        raise UserError(f"{path}: {_explain_load_error(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint of networks: it holds a {type(content).__name__}")
    return content


def _torch_load(path: Path) -> Any:
    if path.suffix == safetensors_file.SUFFIX:  # torch would read a path with this suffix as a safetensors file
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    # With mmap, unused tensors are not read from disk. Files of torch before 1.6 are no zip files and cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _check_archive(path: Path) -> None:
    """Raise UserError if a zip archive's content does not match its checksums, which torch does not verify."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if bad:
        raise UserError(f"{path}: damaged: {bad} is not what was written")


def _explain_load_error(error: Exception) -> str:
    """Return a message for an error of `torch.load`, without torch's advice to load the file unsafely."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return (
            f"asks for {asked[1]}, which weights do not need (a whole pickled module? save its state_dict() instead); "
            "the file is refused, and no code of it was run"
        )
    return f"damaged, or not a checkpoint ({type(error).__name__} while reading it); {weight_file.DOWNLOAD_AGAIN}"


# --- names -----------------------------------------------------------------------------------------------------------


def _networks(path: Path, content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return a file's networks under the keys "student" and "teacher"; a single network is returned as the teacher.

    Raises:
        UserError: the file holds no network; the message says what it holds.
    """
    found = {name: content[name] for name in NETWORKS if isinstance(content.get(name), Mapping)}
    if found:
        return found
    for alone in (*(content.get(key) for key in _SINGLE_NETWORK_KEYS), content):
        if isinstance(alone, Mapping) and any(isinstance(value, Tensor) for value in alone.values()):
            return {"teacher": alone}
    held = ", ".join(sorted(map(str, content))[:5]) or "nothing"
    raise UserError(f"{path}: no network in it (student, teacher, {', '.join(_SINGLE_NETWORK_KEYS)}); it holds {held}")


def to_our_names(tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a network's tensors into the trunk's and the heads', and drop a classifier.

    The trunk's tensors keep their official names without the prefixes of wrappers; the heads' get our names.
    """
    trunk, heads = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or name.endswith(official_trunks.DERIVED):
            continue
        name = _strip_wrappers(name)
        if _CLASSIFIER.fullmatch(name):
            continue
        tensor = tensor.detach().float().contiguous()
        prefix = next((prefix for prefix in _OFFICIAL_HEADS if name.startswith(prefix)), None)
        if prefix is None:
            trunk[name] = tensor
        else:
            heads[_OFFICIAL_HEADS[prefix] + name.removeprefix(prefix)] = tensor
    return trunk, heads


def _strip_wrappers(name: str) -> str:
    """Return a tensor's name without the prefixes of DDP, of the multi-crop wrapper and of transformers' classifiers."""
    while name.startswith(_WRAPPERS):
        name = name.partition(".")[2]
    return name


def _to_official_names(family: Family, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    trunk = {name.removeprefix(TRUNK): tensor for name, tensor in tensors.items() if name.startswith(TRUNK)}
    theirs = official_trunks.to_official(family, trunk)
    for official, ours in _OFFICIAL_HEADS.items():
        theirs |= {official + n.removeprefix(ours): t for n, t in tensors.items() if n.startswith(ours)}
    return theirs


# --- the config -----------------------------------------------------------------------------------------------------


def _config(path: Path, family: Family, trunk: dict[str, Tensor], network: dict[str, Tensor]) -> Config:
    values = {
        "name": "converted",
        **official_trunks.config_values(path, family, trunk),
        "objective": _objective(network),
    }
    return configs.validate(values, where=str(path))


def _objective(tensors: dict[str, Tensor]) -> dict[str, Any]:
    values: dict[str, Any] = {"regions": "region_head" in heads_in(tensors)}
    directions = tensors.get(head_prefix("view_head") + "last_layer.weight_v")
    first = tensors.get(head_prefix("view_head") + "mlp.0.weight")
    if directions is not None and directions.ndim == 2 and first is not None:
        values |= {"prototypes": len(directions), "bottleneck": directions.shape[1], "head_hidden": len(first)}
    return values


def _centers(path: Path, loss: Any, config: Config, heads: list[str]) -> dict[str, Tensor]:
    """Return the centres [K] in a file's `dino_loss`, under our names, of the heads named in `heads`.

    Raises:
        UserError: a centre's length is not the number of prototypes.
    """
    there = loss if isinstance(loss, Mapping) else {}
    found = {
        ours: there[theirs].detach().float().view(-1)
        for theirs, ours in CENTERS.items()
        if isinstance(there.get(theirs), Tensor) and head_of_center(ours) in heads
    }
    wanted = {name: [config.objective.prototypes] for name in found}
    check_shapes(f"{path}: dino_loss", {name: list(center.shape) for name, center in found.items()}, wanted)
    return found
