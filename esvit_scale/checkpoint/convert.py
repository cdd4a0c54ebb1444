"""Reading and converting weights in every supported format.

The formats are official EsViT checkpoints, run dirs, step folders, exported folders and safetensors files.
"""

from pathlib import Path

from esvit_scale.checkpoint import (
    export,
    exported_folder,
    official,
    outside,
    safetensors_file,
    state,
    state_file,
    step_folders,
    weight_file,
)
from esvit_scale.checkpoint.weights import (
    OBJECTIVE,
    TRUNK,
    Weights,
    check_shapes,
    head_titles,
    heads_in,
    network_shapes,
    shapes_of,
)
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective.network import configs_of_students

SINGLE_NETWORK_FORMATS = ("safetensors", *export.FOLDER_FORMATS, *export.DETECTORS)


def convert(
    source: Path,
    destination: Path,
    source_format: str,
    target_format: str,
    network: str | None = None,
    heads: bool = False,
    student: int | None = None,
) -> str:
    """Write the weights of `source` to `destination` atomically, and return a one-line summary of what was written.

    Args:
        source_format: "esvit" (a .pth of the official trainer, or a trunk alone) or "esvit-scale" (a run dir, step
            folder, exported folder or .safetensors file).
        target_format: "esvit-scale" (a step folder) or "esvit" (an official .pth) for both networks and the centres;
            "safetensors" (a file, or a folder with a model card when the name has no suffix), "timm", "huggingface"
            or "onnx" (folders, see export.py), or "mmdet", "detectron2" or "torchvision" (.pth files with the names of
            their Swin) for the trunk of one network.
        network: "teacher" (the default) or "student", for the formats that hold one network.
        heads: for "safetensors": also write the heads and centres, to continue pretraining from.
        student: the number of a further student of a distillation (`objective.students`); None: the first, of `model`.

    Raises:
        UserError: the source cannot be read or lacks what the target format needs, or the destination exists.
    """
    _check_request(destination, source_format, target_format, network, heads)
    weights = _of_student(source, official.read(source) if source_format == "esvit" else read_ours(source), student)
    if target_format in SINGLE_NETWORK_FORMATS:
        weights = _select_network(source, weights, network, heads)
        name = next(iter(weights.networks))
        if target_format in export.DETECTORS:
            export.write_for_detector(destination, weights, name, target_format)
        elif destination.suffix == safetensors_file.SUFFIX:
            safetensors_file.write(destination, weights, name)
        else:
            export.write(destination, weights, name, target_format, source)
    else:
        _check_complete(source, weights)
        write = official.write if target_format == "esvit" else state.write_weights
        write(destination, weights)
    return _summary(destination, weights)


def read(path: Path) -> Weights:
    """Return the weights at `path`, in any supported format, which is detected from the content, not from the name.

    Raises:
        UserError: `path` does not exist, is damaged, or holds no weights that can be read; the message says what it is.
    """
    if outside.is_outside(str(path)):
        return outside.read(str(path))
    path = step_folders.follow_pointer(path)
    if exported_folder.is_foreign(path):
        return official.read(path / safetensors_file.FOLDER_WEIGHTS)
    if path.exists() and not path.is_dir() and not _is_our_file(path):
        return official.read(path)
    return read_ours(path)


def read_ours(path: Path) -> Weights:
    """Return the weights of a run dir, step folder, exported folder, safetensors file or zoo:NAME of esvit-scale."""
    path = step_folders.follow_pointer(path)
    if path.is_dir() and exported_folder.is_exported(path):
        return exported_folder.read(path)
    if path.is_file() and weight_file.detect_format(path) == "safetensors":
        return safetensors_file.read(path)
    folder = step_folders.resolve(path)
    state_file.check_files(folder)
    return state.read_weights(folder)


def load_trunk(path: Path) -> tuple[Trunk, Config]:
    """Load the trunk from weights in any supported format; return it in fp32, on the CPU, in eval mode, and its config.

    The trunk is the teacher's if the weights hold a teacher, otherwise the student's.

    Raises:
        UserError: as `read`.
    """
    if not outside.is_outside(str(path)):
        path = step_folders.follow_pointer(path)
        if not path.exists() or (path.is_dir() and not exported_folder.is_exported(path)):
            return state.load_teacher(step_folders.resolve(path))
    found = read(path)
    tensors = found.networks.get("teacher") or next(iter(found.networks.values()))
    trunk = build_trunk(found.config)
    of_trunk = {n.removeprefix(TRUNK): t for n, t in tensors.items() if n.startswith(TRUNK)}
    check_shapes(path, {name: list(tensor.shape) for name, tensor in of_trunk.items()}, shapes_of(trunk))
    trunk.load_state_dict(of_trunk)
    return trunk.eval(), found.config


def _is_our_file(path: Path) -> bool:
    return weight_file.detect_format(path) == "safetensors" and safetensors_file.is_ours(path)


def _check_request(destination: Path, source_format: str, target_format: str, network: str | None, heads: bool) -> None:
    if source_format == target_format:
        raise UserError(
            f"--from {source_format} --to {target_format}: nothing to convert; choose two different formats"
        )
    if target_format not in SINGLE_NETWORK_FORMATS and (network or heads):
        raise UserError(
            f"--network and --heads: --to {target_format} holds both networks and all heads; leave the options out"
        )
    if heads and target_format != "safetensors":
        raise UserError(f"--heads: --to {target_format} holds only a trunk; --to safetensors can hold heads")
    if target_format == "safetensors" and destination.suffix not in (safetensors_file.SUFFIX, ""):
        raise UserError(
            f"{destination}: the name must end in {safetensors_file.SUFFIX} for a file, or have no suffix for a folder"
        )
    if target_format in export.FOLDER_FORMATS and destination.suffix in (
        safetensors_file.SUFFIX,
        ".onnx",
        ".pth",
        ".bin",
    ):
        raise UserError(f"{destination}: --to {target_format} writes a folder; nearest: {destination.with_suffix('')}")
    if target_format in export.DETECTORS and destination.suffix != ".pth":
        raise UserError(
            f"{destination}: --to {target_format} writes a .pth file; nearest: {destination.with_suffix('.pth')}"
        )
    if destination.exists():
        raise UserError(f"{destination}: exists already; choose another name or remove it")


def _of_student(source: Path, weights: Weights, number: int | None) -> Weights:
    """Return the weights of one student, as if it had been trained alone: of the first for None."""
    each = configs_of_students(weights.config)
    if number is not None and not 0 <= number < len(each) - 1:
        there = f"0 to {len(each) - 2}" if len(each) > 1 else "none"
        raise UserError(
            f"--student {number}: {source} has no such further student (objective.students); there: {there}"
        )
    if len(each) == 1:
        return weights
    prefix = "" if number is None else f"students.{number}."
    networks = {
        role: {
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix or (TRUNK, OBJECTIVE))
        }
        for role, tensors in weights.networks.items()
    }
    return Weights(each[0 if number is None else number + 1], networks, weights.centers)


def _select_network(source: Path, weights: Weights, network: str | None, heads: bool) -> Weights:
    name = network or ("teacher" if "teacher" in weights.networks else next(iter(weights.networks)))
    if name not in weights.networks:
        raise UserError(f"{source}: holds no {name}, only the {', '.join(weights.networks)}")
    tensors = weights.networks[name]
    if heads and not heads_in(tensors):
        raise UserError(f"{source}: holds no heads; leave out --heads")
    prefixes = (TRUNK, OBJECTIVE) if heads else (TRUNK,)
    kept = {n: t for n, t in tensors.items() if n.startswith(prefixes)}
    return Weights(weights.config, {name: kept}, weights.centers if heads else {})


def _check_complete(source: Path, weights: Weights) -> None:
    for name in official.NETWORKS:
        if name not in weights.networks:
            raise UserError(f"{source}: holds no {name}; --to safetensors needs none")
    for head in heads_in(network_shapes(weights.config)):
        if any(head not in heads_in(tensors) for tensors in weights.networks.values()):
            raise UserError(f"{source}: holds no {head_titles([head])}; --to safetensors needs none")


def _summary(destination: Path, weights: Weights) -> str:
    tensors = next(iter(weights.networks.values()))
    statistics = (".running_mean", ".running_var")
    counted = [t for name, t in tensors.items() if name.startswith(TRUNK) and not name.endswith(statistics)]
    count = sum(tensor.numel() for tensor in counted)
    heads = heads_in(tensors)
    parts = [f"{' and '.join(weights.networks)} of {weights.config.model.trunk} ({count:,} parameters in the trunk)"]
    prototypes = any(name.endswith(".weight_v") for name in tensors)
    parts += [head_titles(heads)] if heads else []
    parts += [f"K = {weights.config.objective.prototypes}"] if prototypes else []
    parts += ["centres"] if weights.centers else []
    return f"{destination}: {', '.join(parts)}"
