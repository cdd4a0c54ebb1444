"""One network in one safetensors file, with the config that builds it in the file's metadata.

Tensors are fp32 and have the names of `objective.network.Network`: `trunk.…`, and with heads `objective.view_head.…`,
`objective.region_head.…` and the centres `center.…`. Reading takes torch and safetensors, no DeepSpeed; tensors are
mapped from the file, so that many processes of a machine share one copy.
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
FOLDER_WEIGHTS = "model.safetensors"  # of an exported folder
FORMAT_VERSION = 1
CENTER = "center."


def write(path: Path, weights: Weights, network: str) -> None:
    """Write the tensors of `weights.networks[network]` and its centres."""
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
    """Write a safetensors file whose bytes are the same whenever its content is.

    The library keeps metadata in a hash table and writes it in an order of chance; here it is put in order of its keys.
    """
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        in_order = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(in_order) <= length:  # always, as both write JSON without spaces
            file.seek(8)
            file.write(in_order.ljust(length))


def is_ours(path: Path) -> bool:
    """Whether a safetensors file has a config in its metadata, which this program puts there."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == "esvit-scale"
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from None


def read(path: Path) -> Weights:
    """Read the file's one network, under the name it was written with.

    Raises:
        UserError: no such file, damaged, not written by this program, or by a newer one.
    """
    if weight_file.detect_format(path) != "safetensors":
        raise UserError(
            f"{path}: a checkpoint of torch.save in spite of its name; `esvit-scale convert --from esvit` reads it"
        )
    try:
        with safe_open(path, "pt") as file:
            config, network = _read_metadata(path, file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or not a safetensors file: {error}") from None
    centers = {name.removeprefix(CENTER): _pop(tensors, name) for name in list(tensors) if name.startswith(CENTER)}
    return Weights(config, {network: tensors}, centers)


def _read_metadata(path: Path, metadata: dict[str, str]) -> tuple[Config, str]:
    if metadata.get("format") != "esvit-scale":
        raise UserError(f"{path}: no esvit-scale file (its metadata has no config); `esvit-scale convert` writes one")
    if metadata["format_version"] != str(FORMAT_VERSION):
        raise UserError(f"{path}: format version {metadata['format_version']}, this program reads {FORMAT_VERSION}")
    values: dict[str, Any] = json.loads(metadata["config"])
    return configs.validate(values, where=str(path)), metadata["network"]


def _pop(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors.pop(name)
