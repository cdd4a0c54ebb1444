"""A ladder of trunk shapes between the named sizes, all with head dim 32 and most of their depth in stage 3.

The named sizes first grow in stage 3 (Swin-T → S: 6 → 18 blocks at width 96), then in width at depths 2-2-18-2 (B, L,
H, 1B), then in stage 3 again (G: 42 at width 512). The ladder fills in the steps: widths are multiples of 32, and where
the depth grows it grows by 2 (by 4 at width 512), because blocks come in pairs, one with plain and one with shifted
windows.

    width      32       64         96          128 … 480    512
    stage 3    2, 4     2, 4, 6    6, 8 … 18   18           18, 22 … 42
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective import costs
from esvit_scale.scaling.sweep_file import Size

HEAD_DIM = 32
OFF = 1.25  # a target may be this factor from the nearest step of the ladder
STAGE_3 = {32: (2, 4), 64: (2, 4, 6), 96: (6, 8, 10, 12, 14, 16, 18), 512: range(18, 43, 4)}
WIDEST = 512


class Shape(NamedTuple):
    """Width and depths of a trunk."""

    embed_dim: int
    depths: tuple[int, ...]

    @property
    def heads(self) -> tuple[int, ...]:
        """Return the number of attention heads of each stage."""
        return tuple(self.embed_dim // HEAD_DIM * 2**stage for stage in range(len(self.depths)))

    @property
    def overrides(self) -> dict[str, object]:
        """Return the values of the run config's model section that give this shape."""
        return {"embed_dim": self.embed_dim, "depths": list(self.depths), "heads": list(self.heads)}


def ladder() -> Iterator[Shape]:
    """Yield every shape of the ladder."""
    for width in range(HEAD_DIM, WIDEST + 1, HEAD_DIM):
        for depth in STAGE_3.get(width, (18,)):
            yield Shape(width, (2, 2, depth, 2))


def shape_of(size: Size, base: Config) -> Shape:
    """Return the shape that an entry of the sweep's `sizes` asks for.

    Raises:
        UserError: an unknown trunk, a width that is no multiple of 32, or a number of parameters far from the ladder.
    """
    if size.trunk is not None:
        named = _named(size.trunk, base)
        if type(named) is not type(_on_meta(base)):
            raise UserError(f"sizes: {size.trunk} is another trunk family than the base's {base.model.trunk}")
        if not named.channels:
            raise UserError(f"sizes: {size.trunk} has no stages, so a sweep cannot scale it; take a Swin")
        return Shape(named.channels[0], named.depths)
    if size.embed_dim is not None:
        if size.embed_dim % HEAD_DIM:
            near = max(HEAD_DIM, round(size.embed_dim / HEAD_DIM) * HEAD_DIM)
            raise UserError(f"sizes: embed_dim {size.embed_dim} is not a multiple of {HEAD_DIM}; nearest: {near}")
        depth = STAGE_3.get(size.embed_dim, (18,))[-1]
        return Shape(size.embed_dim, tuple(size.depths or (2, 2, depth, 2)))
    assert size.params is not None
    return _nearest(size.params, base)


def _named(name: str, base: Config) -> Trunk:
    """Return the trunk of this name with its own sizes, for the base's window and global crops."""
    values = {"trunk": name, "window": base.model.window}
    config = Config.model_validate({"model": values, "data": {"global_crops": {"size": base.data.global_crops.size}}})
    try:
        return _on_meta(config)
    except UserError as error:
        raise UserError(f"sizes: {str(error).removeprefix('model.trunk: ')}") from None


def _on_meta(config: Config) -> Trunk:
    with torch.device("meta"):
        return build_trunk(config)


def _nearest(target: float, base: Config) -> Shape:
    """Return the shape of the ladder whose trunk has about `target` parameters."""
    steps = ladder_with_counts(base.model.trunk, base.model.window, base.data.global_crops.size)
    shape, count = min(steps, key=lambda step: max(step[1] / target, target / step[1]))
    if not 1 / OFF <= count / target <= OFF:
        raise UserError(
            f"sizes: no shape of the ladder has about {target:.3g} parameters; the nearest has {count:.3g} "
            f"(embed_dim {shape.embed_dim}, depths {list(shape.depths)}); give embed_dim and depths for another"
        )
    return shape


@lru_cache
def ladder_with_counts(trunk: str, window: int, side: int) -> list[tuple[Shape, int]]:
    """Return the shapes of the ladder with their numbers of trunk parameters."""
    found = []
    for shape in ladder():
        model = {"trunk": trunk, "window": window} | shape.overrides
        config = Config.model_validate({"model": model, "data": {"global_crops": {"size": side}}})
        found.append((shape, costs.parameters(config).trunk))
    return found
