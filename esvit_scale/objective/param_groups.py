"""Groups of parameters: the optimizer's, by weight decay and freezing, and the parts of the network for monitors."""

import re
from typing import Literal

from torch import nn

Group = Literal["decay", "no_decay", "last_layer"]


def parameter_groups(module: nn.Module, decay: Literal["weights", "all"] = "weights") -> dict[str, Group]:
    """Return the optimizer group of every trainable parameter, by name.

    "no_decay": biases, 1-D tensors, and Swin V2's temperatures and position-bias network. "last_layer": the heads'
    prototypes with their gains, which decay (the gains are 2-D) but are frozen during the first epochs. "decay": all
    others, position-bias tables (2-D) included.

    Args:
        module: a module whose parameters are not partitioned by ZeRO-3, because their shapes are read.
        decay: `optim.decay`. With "all", the parameters of "no_decay" are in "decay".
    """
    groups = {name: _group(name, p) for name, p in module.named_parameters() if p.requires_grad}
    return {name: "decay" if decay == "all" and group == "no_decay" else group for name, group in groups.items()}


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


def _group(name: str, parameter: nn.Parameter) -> Group:
    if ".last_layer." in f".{name}":
        return "last_layer"
    dimensions = parameter.ndim
    exempt = name.endswith((".bias", ".logit_scale")) or ".cpb_mlp." in name
    return "no_decay" if exempt or dimensions == 1 else "decay"
