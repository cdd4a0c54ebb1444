"""Reading the frozen teacher of a distillation (`objective.teacher`) from weights in any supported format.

`described_in` looks at the weights before a run begins: it checks that they can teach this student and completes the
config with what they are (objective/frozen.py). `load` reads them again on every rank, for the engine.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, zoo
from esvit_scale.checkpoint.weights import (
    TRUNK,
    Weights,
    check_shapes,
    head_of_center,
    head_prefix,
    head_titles,
    heads_in,
    shapes_of,
)
from esvit_scale.config import Config
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.errors import UserError, first_line
from esvit_scale.models.registry import build_trunk
from esvit_scale.objective import costs, frozen
from esvit_scale.objective.network import (
    TeacherNetwork,
    build_frozen_teacher,
    build_network,
    configs_of_students,
)


class FrozenWeights(NamedTuple):
    """The tensors of the frozen teacher's network and the centres of its heads."""

    values: dict[str, Tensor]  # name of a parameter or running statistic → fp32
    centers: dict[str, Tensor]  # the first centres of the student's loss


NO_TEACHER = FrozenWeights({}, {})


def described_in(config: Config) -> Config:
    """Return the config with `objective.teacher_config` read from the weights; as it is if it names no teacher.

    Raises:
        UserError: the weights cannot be read, do not fit the student or its crops, or are not those with which the
            config was recorded. The message is one line.
    """
    source = config.objective.teacher
    if source is None:
        return config
    weights = _read(source, config)
    heads = _heads(config)
    chosen = _chosen(source, weights, heads)
    description = frozen.described(weights.config, _checksum(chosen.values))
    recorded = config.objective.teacher_config
    if recorded is not None and recorded != description:
        raise UserError(
            f"objective.teacher: {source}: not the weights with which this config was recorded; name those, or leave out "
            "objective.teacher_config and start a new run"
        )
    objective = config.objective.model_copy(update={"teacher_config": description})
    complete = config.model_copy(update={"objective": objective})
    _check_images(source, weights.config, config)
    with torch.device("meta"):
        network = build_frozen_teacher(complete, build_network(complete).objective)
    _check_tensors(source, chosen.values, network)
    _check_grid(source, complete)
    return complete


def load(config: Config) -> FrozenWeights:
    """Return the teacher's weights of a config that `described_in` completed; NO_TEACHER if it names none.

    Raises:
        UserError: they can no longer be read, or have changed since.
    """
    source, description = config.objective.teacher, config.objective.teacher_config
    if source is None or description is None:
        return NO_TEACHER
    chosen = _chosen(source, _read(source, config), _heads(config))
    if _checksum(chosen.values) != description[frozen.CHECKSUM]:
        raise UserError(f"objective.teacher: {source}: its weights changed while the run started")
    return chosen


def _read(source: str, config: Config) -> Weights:
    """Return the weights of a file, a folder or zoo:NAME, or those that a library knows by the name of a trunk ("timm:NAME")."""
    try:
        path = zoo.located(Path(source))
        if ":" in source and not path.exists():
            return _published(source, config)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        return convert.read(path)
    except UserError as error:
        raise UserError(f"objective.teacher: {error}") from None


def _published(trunk: str, config: Config) -> Weights:
    """Return the weights that come with the library's network of this name, for the run's global crops."""
    values: dict[str, Any] = {
        "model": {"trunk": trunk, "drop_path": 0.0},
        "data": {"global_crops": {"size": config.data.global_crops.size}, "local_crops": []},
        "objective": {"regions": False},
    }
    built = build_trunk(configs.validate(values, where=trunk))
    found = built.published()
    tensors = {TRUNK + name: found.tensors[name].float() for name in shapes_of(built)}
    values["data"] |= {"mean": list(found.mean), "std": list(found.std)}
    return Weights(configs.validate(values, where=trunk), {"teacher": tensors}, {})


def _heads(config: Config) -> list[str]:
    """Return the heads of the teacher that the targets need."""
    if config.objective.targets != "prototypes":
        return []
    return ["view_head", "region_head"] if config.objective.regions else ["view_head"]


def _chosen(source: str, weights: Weights, heads: list[str]) -> FrozenWeights:
    """Return the tensors of the teacher's trunk and of these heads."""
    tensors = weights.networks.get("teacher") or next(iter(weights.networks.values()))
    if missing := [head for head in heads if head not in heads_in(tensors)]:
        cure = "set objective.targets=cosine, which needs none"
        if missing != heads:
            cure = f"set objective.regions=false, or {cure}"
        raise UserError(
            f"objective.teacher: {source}: holds no {head_titles(missing)}, whose prototypes are the targets; {cure}"
        )
    prefixes = (TRUNK, *map(head_prefix, heads))
    centers = {name: center for name, center in weights.centers.items() if head_of_center(name) in heads}
    return FrozenWeights({name: t for name, t in tensors.items() if name.startswith(prefixes)}, centers)


def _check_images(source: str, theirs: Config, ours: Config) -> None:
    """Raise UserError if the teacher was trained on images of other channels, or normalised otherwise."""
    if theirs.data.channels != ours.data.channels:
        raise UserError(
            f"objective.teacher: {source}: was trained on images of {theirs.data.channels} channels, but "
            f"data.channels={ours.data.channels}; name a teacher for {ours.data.channels} channels"
        )
    wanted, given = pixel_format(theirs.data), pixel_format(ours.data)
    if (wanted.mean, wanted.std) != (given.mean, given.std):
        mean, std = (f"[{','.join(f'{value:g}' for value in values)}]" for values in (wanted.mean, wanted.std))
        raise UserError(
            f"objective.teacher: {source}: expects images normalised by other numbers; set data.mean={mean} data.std={std}"
        )


def _check_tensors(source: str, values: dict[str, Tensor], network: TeacherNetwork) -> None:
    wanted = shapes_of(network)
    check_shapes(f"objective.teacher: {source}", {name: list(t.shape) for name, t in values.items()}, wanted)


def _check_grid(source: str, config: Config) -> None:
    """Raise UserError unless the teacher takes global crops and, for regions, cuts them into the grid of every student."""
    teacher, size = frozen.teacher_config(config.objective), config.data.global_crops.size
    try:
        theirs = costs.region_grid(teacher, size)
    except UserError:
        raise
    except Exception as error:  # whatever a library's network raises that takes images of one size alone
        raise UserError(
            f"objective.teacher: {source}: takes no crops of {size} pixels ({first_line(error)}); set "
            f"data.global_crops.size={teacher.data.global_crops.size}"
        ) from None
    for student in configs_of_students(config) if config.objective.regions else []:
        ours = costs.region_grid(student, size)
        if theirs != ours:
            raise UserError(
                f"objective.teacher: {source}: makes {_text(theirs)} regions of a crop of {size} pixels, and the student "
                f"{student.model.trunk} {_text(ours)}; name a teacher with the student's patch size, or set "
                "objective.regions=false"
            )


def _text(grid: tuple[int, int]) -> str:
    return f"{grid[0]} × {grid[1]}" if all(grid) else "no"


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return a checksum of the names, shapes and values of fp32 tensors, in any order."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().contiguous()
        found.update(f"{name} {list(tensor.shape)}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
