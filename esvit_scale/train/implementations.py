"""The run's implementations of the parts of a step that have several.

Rank 0 calls this module and broadcasts the result.
"""

from pathlib import Path
from typing import NamedTuple

from esvit_scale.config import Config
from esvit_scale.parallel.world import World
from esvit_scale.train.attention import AttentionChoice
from esvit_scale.train.prototype_loss import PrototypeLossChoice


class Implementations(NamedTuple):
    """Names of implementations; the defaults run everywhere."""

    attention: str = AttentionChoice.plain
    prototype_loss: str = PrototypeLossChoice.plain


PLAIN = Implementations()
_CHOICES = (AttentionChoice, PrototypeLossChoice)  # in the order of Implementations


def check(config: Config, world: World) -> None:
    """Raise UserError if the config names an implementation that this device or network does not have."""
    for choice in _CHOICES:
        choice(config, world).check()


def choose(config: Config, world: World) -> Implementations:
    """Return the implementations that a new run of a config has on this machine.

    Raises:
        UserError: one that the config names cannot be used, is not accurate here, or raises.
    """
    return Implementations(*(choice(config, world).choose() for choice in _CHOICES))


def choose_for_run(config: Config, world: World, path: Path, resumed: bool) -> Implementations:
    """Return the implementations for this start of the run in `path`, and record them there.

    Raises:
        UserError: one that the config names is not accurate here, or raises.
    """
    return Implementations(*(choice(config, world).choose_for_run(path, resumed) for choice in _CHOICES))
