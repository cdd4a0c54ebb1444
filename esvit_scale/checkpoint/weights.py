"""Weights in memory, named as `objective.network.Network` names them, whatever file they came from."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.objective.network import build_network
from esvit_scale.parallel.buffers import persistent_buffers
from esvit_scale.parallel.zero import full_shape

TRUNK = "trunk."
OBJECTIVE = "objective."
Shapes = dict[str, list[int]]


class Weights(NamedTuple):
    """The tensors of one or two networks, with the config that they fit."""

    config: Config  # its model and objective sections describe the tensors
    networks: dict[str, dict[str, Tensor]]  # "student", "teacher" → name of a parameter or running statistic → fp32
    centers: dict[str, Tensor]  # "view.values", "region.values" → fp32 [K]


def shapes_of(module: nn.Module) -> Shapes:
    """Return the shape of every parameter (whole, also under ZeRO-3) and of every running statistic, by name."""
    shapes = {name: list(full_shape(p)) for name, p in module.named_parameters()}
    return shapes | {name: list(buffer.shape) for name, buffer in persistent_buffers(module).items()}


def network_shapes(config: Config) -> Shapes:
    """Return the shapes of everything that the config's network saves, without allocating it."""
    with torch.device("meta"):
        return shapes_of(build_network(config))


def heads_in(names: Iterable[str]) -> list[str]:
    """Return the heads of an objective ("view_head", "region_head", "projector", …) that have a tensor in `names`, in order."""
    return list(dict.fromkeys(name.split(".")[1] for name in names if name.startswith(OBJECTIVE)))


def head_prefix(head: str) -> str:
    """Return the prefix of the names of a head's tensors."""
    return f"{OBJECTIVE}{head}."


def head_of_center(name: str) -> str:
    """Return the head that a centre belongs to: "view_head" for "view.values"."""
    return f"{name.partition('.')[0]}_head"


def head_titles(heads: list[str]) -> str:
    """Return the names of heads for a message: "view head, region head"."""
    return ", ".join(head.replace("_", " ") for head in heads)


def check_shapes(where: object, stored: Shapes, wanted: Shapes) -> None:
    """Check that a checkpoint has the tensors that a model wants, and no others.

    Raises:
        UserError: names the first tensors that are absent, unknown or of another shape, and how many more there are.
    """
    lines = [
        f"{n}: {stored.get(n, 'absent')} in the checkpoint, {s} in the model"
        for n, s in wanted.items()
        if stored.get(n) != s
    ]
    lines += [f"{n}: {s} in the checkpoint, absent in the model" for n, s in stored.items() if n not in wanted]
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(f"{where}: a checkpoint of another architecture: {'; '.join(lines[:3])}{more}")


def check_network(where: object, tensors: dict[str, Tensor], config: Config) -> None:
    """Check that the tensors are the config's whole trunk and any number of its whole heads.

    Raises:
        UserError: as `check_shapes`.
    """
    there = (TRUNK, *(head_prefix(head) for head in heads_in(tensors)))
    wanted = {name: shape for name, shape in network_shapes(config).items() if name.startswith(there)}
    check_shapes(where, {name: list(tensor.shape) for name, tensor in tensors.items()}, wanted)
