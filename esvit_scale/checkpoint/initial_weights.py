"""Loading the weights that a new run starts from, if `model.init_from` names a checkpoint of any supported format."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from esvit_scale.checkpoint import carried, convert, exported_folder, positions, state, state_file, step_folders
from esvit_scale.checkpoint.weights import (
    TRUNK,
    Shapes,
    Weights,
    check_shapes,
    head_of_center,
    head_prefix,
    head_titles,
    heads_in,
    network_shapes,
)
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.registry import build_trunk
from esvit_scale.parallel import collectives


class InitialWeights(NamedTuple):
    """Initial values for some of a network's parameters; the other parameters are initialised at random."""

    values: dict[str, Tensor]  # name of a parameter or running statistic → fp32
    centers: dict[str, Tensor]  # centres of the heads in `values`
    note: str  # for the log: which parts of the source were used


REGISTERS = f"{TRUNK}reg_token"  # models/vit.py
NO_INITIAL_WEIGHTS = InitialWeights({}, {}, "")


def load_initial_weights(config: Config) -> InitialWeights:
    """Return the weights that `model.init_from` names; NO_INITIAL_WEIGHTS when it is null. All ranks call it.

    Student and teacher both start from the source's teacher, or from its student if the source has no teacher. Every
    tensor of the trunk must fit the run's trunk, except that position tables of another window or resolution are
    resized (positions.py). A head that source and run both have is loaded with its centre, and must fit; a classifier of
    other classes is initialised at random. A head that
    only the run has is initialised at random; a head that only the source has is ignored. Registers are initialised at
    random if the source has none. The gains (weight_g) of a
    head's last layer are not loaded when `norm_last_layer` fixes them at 1.

    Raises:
        UserError: the source cannot be read, its trunk or a head does not fit the run's network, or it computes position
            biases from distances in other windows and `model.pretrained_windows` does not say which count.
    """
    if config.model.init_from is None:
        return NO_INITIAL_WEIGHTS
    path = Path(config.model.init_from)
    # One rank resolves it for all, because a run that is still training may change `latest` in between.
    source = collectives.run_on_rank0_and_broadcast(lambda: _resolve_source(path))
    own = source.is_dir() and not exported_folder.is_exported(source)
    weights = state.read_weights(source) if own else _read_foreign(source)
    return _select(source, weights, config)


def _resolve_source(path: Path) -> Path:
    path = step_folders.follow_pointer(path)
    if not path.exists():
        raise UserError(f"model.init_from: {path}: no such file or folder")
    if not path.is_dir() or exported_folder.is_exported(path):
        return path
    folder = step_folders.resolve(path)
    state_file.check_files(folder)
    return folder


def _read_foreign(source: Path) -> Weights:
    try:
        return convert.read(source)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None


def _select(source: Path, weights: Weights, config: Config) -> InitialWeights:
    theirs_channels, channels = weights.config.data.channels, config.data.channels
    if theirs_channels != channels:
        raise UserError(
            f"model.init_from: {source}: was trained on images of {theirs_channels} channels, but data.channels={channels}; "
            f"name weights of {channels} channels, or start from random values (model.init_from=null)"
        )
    wanted = network_shapes(config)
    network = "teacher" if "teacher" in weights.networks else next(iter(weights.networks))
    tensors = weights.networks[network]
    trunk = {name: tensor for name, tensor in tensors.items() if name.startswith(TRUNK)}
    fresh = _check_registers(source, weights.config.model.registers, config.model.registers)
    added = _added(config, trunk)
    new = (*added, *([REGISTERS] if fresh else []))
    fitting = {name: shape for name, shape in _part(wanted, TRUNK).items() if not name.startswith(new)}
    trunk, resized = positions.resize_to_fit(f"model.init_from: {source}", trunk, fitting)
    with torch.device("meta"):
        carried.check_distances(f"model.init_from: {source}", build_trunk(weights.config), build_trunk(config), config)
    tensors = tensors | trunk
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    taken, notes = [TRUNK], ["trunk" + (f" ({resized})" if resized else "")]
    if fresh:
        notes.append("registers not in the source: initialised at random")
    if added:
        notes.append("layers that prune tokens not in the source: initialised at random")
    theirs, ours = heads_in(tensors), heads_in(wanted)
    if not _same_classes(weights.config, config):
        theirs = [head for head in theirs if head not in ours]
    for head in dict.fromkeys([*ours, *theirs]):
        prefix, words = head_prefix(head), head_titles([head])
        if head in theirs and head in ours:
            _check_head(source, words, _part(shapes, prefix), _part(wanted, prefix))
            taken.append(prefix)
            notes.append(words)
        elif head in ours:
            notes.append(f"{words} not in the source: initialised at random")
        else:
            notes.append(f"{words} ignored: the run has none")
    left = ".weight_g" if config.objective.norm_last_layer else ()
    values = {n: t for n, t in tensors.items() if n.startswith(tuple(taken)) and not n.endswith(left)}
    centers = {n: c for n, c in weights.centers.items() if head_prefix(head_of_center(n)) in taken}
    return InitialWeights(values, centers, f"{network} of {source}: {', '.join(notes)}")


def _check_registers(source: Path, theirs: int, ours: int) -> bool:
    """Return whether the run's registers start from random values, because the source has none.

    Raises:
        UserError: the source has registers, and the run another number of them.
    """
    if theirs and theirs != ours:
        raise UserError(
            f"model.init_from: {source}: has {theirs} registers, but model.registers={ours}; set model.registers={theirs}"
        )
    return ours > theirs


def _added(config: Config, trunk: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the prefixes of the run's layers that pretrained trunks lack; none if these weights `trunk` have them."""
    with torch.device("meta"):
        added = tuple(TRUNK + name for name in build_trunk(config).added)
    return () if any(name.startswith(added) for name in trunk) else added


def _same_classes(theirs: Config, ours: Config) -> bool:
    """Return whether heads for classes may be loaded: both configs have the same classes, or none."""
    a, b = theirs.objective, ours.objective
    return (a.classes, a.class_names) == (b.classes, b.class_names)


def _check_head(source: Path, head: str, stored: Shapes, wanted: Shapes) -> None:
    try:
        check_shapes(f"model.init_from: {source}", stored, wanted)
    except UserError as error:
        raise UserError(
            f"{error}; set objective.prototypes, head_hidden and bottleneck to the source's values, or keep only its trunk, "
            f"so that the {head} starts at random: `esvit-scale convert … --to safetensors` writes such a file"
        ) from None


def _part(shapes: Shapes, prefix: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
