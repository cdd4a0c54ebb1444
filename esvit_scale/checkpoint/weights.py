"""`Weights`: networks and centres in memory, read from any format, named as in `objective.network.Network`."""

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
    """The tensors of the student, the teacher or both, with the centres and the config of these networks."""

    config: Config  # its model and objective sections describe the tensors
    networks: dict[str, dict[str, Tensor]]  # "student", "teacher" → name of a parameter or running statistic → fp32
    centers: dict[str, Tensor]  # "view.values", "region.values" → fp32 [K]


def shapes_of(module: nn.Module) -> Shapes:
    """Return the shapes of a module's parameters and running statistics, by name; unpartitioned also under ZeRO-3."""
    shapes = {name: list(full_shape(p)) for name, p in module.named_parameters()}
    return shapes | {name: list(buffer.shape) for name, buffer in persistent_buffers(module).items()}


def network_shapes(config: Config) -> Shapes:
    """Return the shapes of all saved tensors of the config's network, by name, without allocating the tensors."""
    with torch.device("meta"):
        return shapes_of(build_network(config))


def heads_in(names: Iterable[str]) -> list[str]:
    """Return the heads ("view_head", "region_head", "projector", …) that occur in tensor names, by first occurrence."""
    return list(dict.fromkeys(name.split(".")[1] for name in names if name.startswith(OBJECTIVE)))


def head_prefix(head: str) -> str:
    """Return the prefix of the names of a head's tensors: "objective.view_head." for "view_head"."""
    return f"{OBJECTIVE}{head}."


def head_of_center(name: str) -> str:
    """Return the head to which a centre belongs: "view_head" for the centre "view.values"."""
    return f"{name.partition('.')[0]}_head"


def head_titles(heads: list[str]) -> str:
    """Return the names of heads as text for a message: "view head, region head"."""
    return ", ".join(head.replace("_", " ") for head in heads)


def check_shapes(where: object, stored: Shapes, wanted: Shapes) -> None:
    """Check that a checkpoint has exactly the tensors of a model, with the same shapes.

    Args:
        where: the checkpoint, for messages.
        stored: shapes of the checkpoint's tensors.
        wanted: shapes of the model's tensors.

    Raises:
        UserError: tensors are missing, unknown or of another shape; the message names the first of them.
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
    """Check that the tensors are those of the config's complete trunk and of any number of its heads, each complete.

    Raises:
        UserError: as `check_shapes`.
    """
    there = (TRUNK, *(head_prefix(head) for head in heads_in(tensors)))
    wanted = {name: shape for name, shape in network_shapes(config).items() if name.startswith(there)}
    check_shapes(where, {name: list(tensor.shape) for name, tensor in tensors.items()}, wanted)
