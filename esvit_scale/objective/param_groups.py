"""Groups of parameters: the optimizer's, by weight decay, freezing and depth, and the parts of the network for monitors.

The optimizer's groups are named "decay", "no_decay", "last_layer" and "matrices" after their kind. Where the trunk is
treated differently from the heads, its groups are "trunk.decay" and so on, and with a rate for every depth of the trunk
"trunk.3.decay" and so on. Layers that a trunk adds to pretrained ones (`Trunk.added`) are treated like heads.
"""

import math
import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, cast, get_args

from torch import Tensor, nn

from esvit_scale.config import Optim
from esvit_scale.models.trunk import Trunk

Kind = Literal["decay", "no_decay", "last_layer", "matrices"]
MATRICES: Kind = "matrices"  # the kind of group that the optimizer Muon steps; other optimizers have no such group
TRUNK = "trunk."  # prefix of the trunk's parameters, and of groups that hold nothing else


class Matrix(NamedTuple):
    """A matrix [rows, columns] of a hidden layer: an interval of a flattened parameter, or all of it."""

    name: str  # of the parameter
    start: int  # where the matrix begins in the flattened parameter
    rows: int
    columns: int


def parameter_groups(
    module: nn.Module, decay: Literal["weights", "all"] = "weights", matrices: Collection[str] = ()
) -> dict[str, Kind]:
    """Return the kind of optimizer group of every trainable parameter, by name.

    "no_decay": biases, 1-D tensors, and Swin V2's temperatures and position-bias network. "last_layer": the heads'
    prototypes with their gains, which decay (the gains are 2-D) but are frozen during the first epochs. "decay": all
    others, position-bias tables (2-D) included.

    Args:
        module: a module whose parameters are not partitioned by ZeRO-3, because their shapes are read.
        decay: `optim.decay`. With "all", the parameters of "no_decay" are in "decay".
        matrices: names of the parameters of "decay" that are in "matrices" instead.
    """
    kinds = {name: _kind(name, p) for name, p in module.named_parameters() if p.requires_grad}
    kinds |= dict.fromkeys(matrices, MATRICES)
    return {name: "decay" if decay == "all" and kind == "no_decay" else kind for name, kind in kinds.items()}


def optimizer_groups(
    network: nn.Module, trunk: Trunk, optim: Optim, matrices: Collection[str] = ()
) -> dict[str, list[str]]:
    """Return the names of the trainable parameters of each optimizer group, by the group's name.

    Args:
        network: the module that holds the trunk as `trunk`, with whole parameters (not partitioned by ZeRO 3).
        matrices: names of the parameters that Muon steps.
    """
    depths, _ = trunk_depths(trunk)
    groups: dict[str, list[str]] = {}
    for name, kind in parameter_groups(network, optim.decay, matrices).items():
        prefix = ""
        of_weights = name.startswith(TRUNK) and not name.removeprefix(TRUNK).startswith(trunk.added)
        if of_weights and (optim.layer_decay < 1 or optim.freeze_trunk_steps or optim.trunk_rate < 1):
            prefix = f"{TRUNK}{depths[name.removeprefix(TRUNK)]}." if optim.layer_decay < 1 else TRUNK
        groups.setdefault(prefix + kind, []).append(name)
    return dict(sorted(groups.items(), key=lambda item: get_args(Kind).index(kind_of(item[0]))))


def kind_of(group: str) -> Kind:
    """Return the kind of the optimizer group of this name."""
    return cast(Kind, group.rpartition(".")[2])


def lr_scale(group: str, trunk: Trunk, optim: Optim) -> float:
    """Return the factor of the learning rate of the optimizer group of this name: trunk_rate · layer_decay^(n + 1 − depth)
    for parameters of the trunk with n blocks, 1 for others."""
    if not group.startswith(TRUNK):
        return 1.0
    depth = group.split(".")[1]
    if not depth.isdecimal():
        return optim.trunk_rate
    _, deepest = trunk_depths(trunk)
    return float(optim.trunk_rate * optim.layer_decay ** (deepest - int(depth)))


def trunk_depths(trunk: Trunk) -> tuple[dict[str, int], int]:
    """Return the depth of every parameter of a trunk with n blocks, by its name within the trunk, and the largest, n + 1.

    Parameters of the i-th block that runs have depth i, from 1. Others have the depth of the last block that is listed
    before them: 0 for the patch embedding, positions and tokens, the depth of a stage's last block for the merging or
    embedding that follows it, and n + 1 for the final norm.
    """
    of_block = {id(p): i for i, block in enumerate(trunk.blocks, start=1) for p in block.parameters()}
    last = len(trunk.blocks)
    depths, passed = {}, 0
    for name, p in trunk.named_parameters():
        own = of_block.get(id(p))
        passed = max(passed, own or 0)
        depths[name] = own if own is not None else passed if passed < last else last + 1
    return depths, last + 1


def hidden_matrices(trunks: Sequence[Trunk], network: nn.Module) -> list[Matrix]:
    """Return the matrices that Muon orthogonalises: the weights of linear layers and convolutions, of trunks and heads.

    Left out, as its author advises, are the first layer, whose input is pixels, and the prototypes, which are an output
    layer; also norms, biases, tokens and tables of positions, which are no matrices of a layer; grouped convolutions and
    layers with one output, whose weights are vectors; and Swin V2's network of position biases, which makes a table.
    The weight of a convolution is the matrix [outputs, inputs · height · width]. A weight that holds the matrices of
    queries, keys and values is three matrices, one of keys and values two.

    Args:
        network: the module that holds the trunks and the objectives, with whole parameters (not partitioned by ZeRO 3).
    """
    first = {id(p) for trunk in trunks for p in trunk.patch_projection.parameters()}
    found = []
    for path, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) > 1:
            continue
        name, weight = f"{path}.weight", module.weight
        if id(weight) in first or not weight.requires_grad or _kind(name, weight) != "decay":
            continue
        count = _stacked(path)
        rows, columns = len(weight) // count, math.prod(weight.shape[1:])
        if len(weight) % count == 0 and min(rows, columns) > 1:
            found += [Matrix(name, i * rows * columns, rows, columns) for i in range(count)]
    return found


_LAYER = re.compile(r"(?:network\.)?(?:(layers|stages|stage|blocks)[._]?(\d+)|layer(\d))")


def part_of(name: str) -> str:
    """Return the part of the network that a parameter belongs to, as monitors name it.

    Examples are "patch_embed", "stage3" and "view_head". A trunk with stages has one part per stage, one without (a
    plain ViT) one part per block.
    """
    owner, _, rest = name.partition(".")
    if owner not in ("trunk", "objective"):
        return owner
    if owner == "trunk" and (match := _LAYER.match(rest)):
        kind, from_zero, from_one = match.groups()
        return f"{'block' if kind == 'blocks' else 'stage'}{from_one or int(from_zero) + 1}"
    return rest.removeprefix("network.").partition(".")[0]


def largest_of_each_part(module: nn.Module) -> dict[str, str]:
    """Map each part of the network to the name of its largest trainable parameter, which represents it in monitors.

    The prototypes' directions (`weight_v`) are left out.
    """
    sizes = {
        name: p.numel() for name, p in module.named_parameters() if p.requires_grad and not name.endswith(".weight_v")
    }
    return {part_of(name): name for name in sorted(sizes, key=sizes.__getitem__)}


def _stacked(path: str) -> int:
    """Return how many matrices the weight of a layer with this path holds, one below the other."""
    last = path.split(".")[-2:]
    return 3 if "qkv" in last else 2 if last[-1] == "kv" else 1


def _kind(name: str, parameter: Tensor) -> Kind:
    if ".last_layer." in f".{name}":
        return "last_layer"
    dimensions = parameter.ndim
    exempt = name.endswith((".bias", ".logit_scale")) or ".cpb_mlp." in name
    return "no_decay" if exempt or dimensions == 1 else "decay"
