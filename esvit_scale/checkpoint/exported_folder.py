"""Exported folders read back: `--to safetensors`, timm and huggingface.

The last two hold other libraries' names and configs; esvit_scale.json beside them says which network of which config it
was. An ONNX graph is for runtimes and is not read back.
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
    """Say in a timm or huggingface folder what it was made from, so that `read` can undo the form."""
    config = weights.config.model_dump(mode="json")
    origin = {"format_version": FORMAT_VERSION, "form": form, "network": network, "config": config}
    files.write_json(folder / ORIGIN_FILE, origin)


def is_exported(folder: Path) -> bool:
    """Whether a folder looks like one of `convert`, or of another library: not a run dir, and no step folder."""
    return any((folder / name).is_file() for name in (safetensors_file.FOLDER_WEIGHTS, "model.onnx", ORIGIN_FILE))


def read(folder: Path) -> Weights:
    """Read the one network of an exported folder.

    Raises:
        UserError: a folder of another program, of a newer version, incomplete or damaged, or one of ONNX.
    """
    path = folder / safetensors_file.FOLDER_WEIGHTS
    if not path.is_file():
        if (folder / "model.onnx").is_file():
            raise UserError(f"{folder}: an ONNX graph, for runtimes alone; give the run or another form of its weights")
        raise UserError(f"{folder}: incomplete: no {safetensors_file.FOLDER_WEIGHTS} in it")
    if weight_file.detect_format(path) == "safetensors" and safetensors_file.is_ours(path):
        return safetensors_file.read(path)
    origin = _origin(folder)
    config = configs.validate(origin["config"], where=str(folder / ORIGIN_FILE))
    shapes = {n.removeprefix(TRUNK): s for n, s in network_shapes(config).items() if n.startswith(TRUNK)}
    try:
        trunk = _FROM_LIBRARY[origin["form"]](load_file(path), shapes, config)
    except KeyError as error:
        raise UserError(f"{path}: damaged: without the tensor {error}") from None
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
            f"{folder}: not written by this version of esvit-scale (no {ORIGIN_FILE} in it); a trunk of timm or of the official "
            f"codes may be read from its file, {folder / safetensors_file.FOLDER_WEIGHTS}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    if not isinstance(origin, dict) or not {"config", "form", "network"} <= origin.keys():
        raise UserError(f"{path}: damaged: no config, form and network in it")
    if origin.get("format_version") != FORMAT_VERSION or origin["form"] not in _FROM_LIBRARY:
        raise UserError(f"{path}: format version {origin.get('format_version')}, this program reads {FORMAT_VERSION}")
    return origin
