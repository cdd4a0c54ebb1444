"""Reading the folders that `esvit-scale convert` writes in the formats safetensors, timm and huggingface.

A timm or huggingface folder holds tensors and config under that library's names. Its extra file esvit_scale.json
records which network was exported (student or teacher) and the run's config. An ONNX graph cannot be read back.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from esvit_scale import config as configs
from esvit_scale import files
from esvit_scale.checkpoint import libraries, safetensors_file, weight_file
from esvit_scale.checkpoint.weights import TRUNK, Weights, check_network, network_shapes
from esvit_scale.errors import UserError

ORIGIN_FILE = "esvit_scale.json"
FORMAT_VERSION = 1
_FROM_LIBRARY = {"timm": libraries.from_timm, "huggingface": libraries.from_huggingface}


def write_origin(folder: Path, weights: Weights, network: str, form: str) -> None:
    """Write esvit_scale.json (network, config) into a timm or huggingface folder, so that `read` can undo an export."""
    config = weights.config.model_dump(mode="json")
    origin = {"format_version": FORMAT_VERSION, "form": form, "network": network, "config": config}
    files.write_json(folder / ORIGIN_FILE, origin)


def is_exported(folder: Path) -> bool:
    """Return whether a folder is an export: whether it has model.safetensors, model.onnx or esvit_scale.json."""
    return any((folder / name).is_file() for name in (safetensors_file.FOLDER_WEIGHTS, "model.onnx", ORIGIN_FILE))


def is_foreign(folder: Path) -> bool:
    """Return whether a folder has model.safetensors of another program, as repositories of Hugging Face do."""
    path = folder / safetensors_file.FOLDER_WEIGHTS
    if not path.is_file() or (folder / ORIGIN_FILE).exists():
        return False
    return not (weight_file.detect_format(path) == "safetensors" and safetensors_file.is_ours(path))


def read(folder: Path) -> Weights:
    """Return the weights of an exported folder, which holds one network.

    Raises:
        UserError: the folder was written by another program or a newer version, is incomplete or damaged, or holds an
            ONNX graph.
    """
    path = folder / safetensors_file.FOLDER_WEIGHTS
    if not path.is_file():
        if (folder / "model.onnx").is_file():
            raise UserError(
                f"{folder}: holds an ONNX graph, which cannot be read back; give the run or another export of it"
            )
        raise UserError(f"{folder}: incomplete: it has no {safetensors_file.FOLDER_WEIGHTS}")
    if weight_file.detect_format(path) == "safetensors" and safetensors_file.is_ours(path):
        return safetensors_file.read(path)
    origin = _origin(folder)
    config = configs.validate(origin["config"], where=str(folder / ORIGIN_FILE))
    shapes = {n.removeprefix(TRUNK): s for n, s in network_shapes(config).items() if n.startswith(TRUNK)}
    try:
        trunk = _FROM_LIBRARY[origin["form"]](load_file(path), shapes, config)
    except KeyError as error:
        raise UserError(f"{path}: damaged: the tensor {error} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    tensors = {TRUNK + name: tensor for name, tensor in trunk.items()}
    check_network(path, tensors, config)
    return Weights(config, {origin["network"]: tensors}, {})


def _origin(folder: Path) -> dict[str, Any]:
    path = folder / ORIGIN_FILE
    try:
        origin = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder}: not written by esvit-scale (it has no {ORIGIN_FILE}); if it holds a trunk of timm or of an official "
            f"code, name the file instead: {folder / safetensors_file.FOLDER_WEIGHTS}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not isinstance(origin, dict) or not {"config", "form", "network"} <= origin.keys():
        raise UserError(f"{path}: damaged: it lacks config, form or network")
    if origin.get("format_version") != FORMAT_VERSION or origin["form"] not in _FROM_LIBRARY:
        raise UserError(
            f"{path}: format version {origin.get('format_version')}; this version of esvit-scale reads {FORMAT_VERSION}"
        )
    return origin
