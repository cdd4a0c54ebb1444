"""Reading and writing one network as a safetensors file; the metadata hold the config that builds the network.

Tensors are fp32 and are named as in `objective.network.Network`: `trunk.…`, and with heads `objective.view_head.…`,
`objective.region_head.…` and the centres `center.…`. Reading needs torch and safetensors but not DeepSpeed. Tensors are
memory-mapped, so that all processes of a machine share one copy in memory.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale import files
from esvit_scale.checkpoint import weight_file
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.config import Config
from esvit_scale.errors import UserError

SUFFIX = ".safetensors"
FOLDER_WEIGHTS = "model.safetensors"  # name of the file of weights in an exported folder
FORMAT_VERSION = 1
CENTER = "center."


def write(path: Path, weights: Weights, network: str) -> None:
    """Write `weights.networks[network]`, the centres and the config to one safetensors file, atomically."""
    tensors = weights.networks[network] | {CENTER + name: value for name, value in weights.centers.items()}
    metadata = {
        "format": "esvit-scale",
        "format_version": str(FORMAT_VERSION),
        "network": network,
        "config": json.dumps(weights.config.model_dump(mode="json")),
    }
    with files.replacing(path) as tmp:
        save(tmp, tensors, metadata)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file whose bytes are reproducible: the same tensors and metadata give the same file.

    The safetensors library writes the metadata in random order; this function sorts them by key.
    """
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        in_order = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(in_order) <= length:  # always true, because both headers are JSON without spaces
            file.seek(8)
            file.write(in_order.ljust(length))


def is_ours(path: Path) -> bool:
    """Return whether a safetensors file was written by esvit-scale, according to its metadata.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == "esvit-scale"
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from None


def read(path: Path) -> Weights:
    """Return the network ("student" or "teacher", as it was written), centres and config of a safetensors file.

    Raises:
        UserError: the file does not exist, is damaged, or was written by another program or a newer version.
    """
    if weight_file.detect_format(path) != "safetensors":
        raise UserError(
            f"{path}: a file of torch.save in spite of its name; convert it with `esvit-scale convert --from esvit`"
        )
    try:
        with safe_open(path, "pt") as file:
            config, network = _read_metadata(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file: {error}") from None
    centers = {name.removeprefix(CENTER): tensors.pop(name) for name in list(tensors) if name.startswith(CENTER)}
    return Weights(config, {network: tensors}, centers)


def _read_metadata(path: Path, metadata: dict[str, str]) -> tuple[Config, str]:
    if metadata.get("format") != "esvit-scale":
        raise UserError(
            f"{path}: not a file of esvit-scale (no config in its metadata); write one with `esvit-scale convert`"
        )
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise UserError(
            f"{path}: format version {metadata['format_version']}; this version of esvit-scale reads {FORMAT_VERSION}"
        )
    values: dict[str, Any] = json.loads(metadata["config"])
    return configs.validate(values, where=str(path)), metadata["network"]
