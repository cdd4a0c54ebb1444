"""What of a training stage is carried over to the next one, by the names and shapes of tensors.

| tensors | in the next stage |
|---|---|
| trunk | the same, for student and teacher each |
| position tables of another window or resolution | resized (positions.py) |
| heads that both stages have | the same, with their centres |
| heads that only the next stage has | initialised at random, as in a new run |
| heads that only the stage before has | left out |
| the optimizer's averages | none: it begins anew |

state.py reads the tensors (`carry_over`). Everything here needs shapes alone, so that a run of many stages is checked
before its first step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from esvit_scale.checkpoint import positions
from esvit_scale.checkpoint.weights import OBJECTIVE, Shapes, head_titles, heads_in, shapes_of
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective.network import Network, build_network


class Carried(NamedTuple):
    """The tensors of a stage, by where their values come from."""

    same: list[str]  # those of the stage before
    resized: list[str]  # position tables, from those of the stage before
    fresh: list[str]  # initialised at random
    note: str  # for the log


def compare(where: object, stored: Shapes, wanted: Shapes) -> Carried:
    """Return what of a stage's tensors the tensors of the stage before give.

    Args:
        where: the stage or its checkpoint, for messages.
        stored: shapes of the tensors of the stage before.
        wanted: shapes of the tensors of the stage.

    Raises:
        UserError: a tensor fits neither as it is nor resized.
    """
    theirs, ours = heads_in(stored), heads_in(wanted)
    only_theirs, only_ours = ([h for h in a if h not in b] for a, b in ((theirs, ours), (ours, theirs)))
    of_both = {name: shape for name, shape in wanted.items() if _head(name) not in only_ours}
    kept = {name: shape for name, shape in stored.items() if _head(name) not in only_theirs}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in kept.items()}
    _, resized = positions.resize_to_fit(where, tensors, of_both)
    parts = ["student and teacher, each its own"]
    parts += [resized] if resized else []
    parts += [f"{head_titles(only_ours)} at random"] if only_ours else []
    parts += [f"{head_titles(only_theirs)} left out"] if only_theirs else []
    tables = [name for name, shape in of_both.items() if shape != stored[name]]
    same = [name for name, shape in of_both.items() if shape == stored[name]]
    return Carried(same, tables, [name for name in wanted if name not in of_both], ", ".join(parts))


def check(stages: Sequence[Config]) -> None:
    """Raise UserError if a stage cannot start from the one before; `stages` are the configs of a run's stages."""
    before: Network | None = None
    for number, config in enumerate(stages if len(stages) > 1 else ()):
        try:
            with torch.device("meta"):
                network = build_network(config)
        except UserError as error:
            raise UserError(f"stages.{number}: {error}") from None
        if before is not None:
            _check_next(f"stages.{number}", config, before, network)
        before = network


def _check_next(where: str, config: Config, before: Network, now: Network) -> None:
    try:
        compare(where, shapes_of(before), shapes_of(now))
    except UserError as error:
        reason = str(error).removeprefix(f"{where}: ").replace("in the checkpoint", "before")
        reason = reason.replace("in the model", "now").removeprefix("a checkpoint of another architecture: ")
        raise UserError(f"{where}: cannot start from the stage before: {reason}") from None
    check_distances(where, before.trunk, now.trunk, config)


def check_distances(where: str, before: Trunk, now: Trunk, config: Config) -> None:
    """Raise UserError if position biases that are computed from distances would be stretched without being asked for.

    Args:
        where: the stage or the source of the weights, for the message.
        before: the trunk that the weights come from.
        now: the trunk of `config` that takes them.
    """
    old, new = before.distance_windows, now.distance_windows
    if old == new or config.model.pretrained_windows is not None:
        return
    keep, stretch = (f"model.pretrained_windows=[{','.join(map(str, sides or ()))}]" for sides in (old, new))
    raise UserError(
        f"{where}: the windows change, and the trunk computes its position bias from distances; set {keep} so that the "
        f"bias of two tokens stays as it is, or {stretch} to stretch it over the new windows"
    )


def _head(name: str) -> str:
    """Return the head that a tensor belongs to; "" for tensors of the trunk."""
    return name.split(".")[1] if name.startswith(OBJECTIVE) else ""
