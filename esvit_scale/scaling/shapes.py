"""A ladder of trunk shapes that interpolates the named Swin sizes, with head dim 32 and most blocks in stage 3.

The named sizes first grow in depth of stage 3 (Swin-T → S: 6 → 18 blocks at width 96), then in width at depths 2-2-18-2
(B, L, H, 1B), then in stage 3 again (G: 42 blocks at width 512). The ladder adds the sizes between them: widths are
multiples of 32, and the depth grows by 2 (by 4 at width 512), because blocks come in pairs, one with plain and one with
shifted windows. The rows below are the width of stage 1 and the possible numbers of blocks in stage 3.

    width      32       64         96          128 … 480    512
    stage 3    2, 4     2, 4, 6    6, 8 … 18   18           18, 22 … 42
"""

import json
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
OFF = 1.25  # largest factor between a requested number of parameters and that of the nearest shape
STAGE_3 = {32: (2, 4), 64: (2, 4, 6), 96: (6, 8, 10, 12, 14, 16, 18), 512: range(18, 43, 4)}
WIDEST = 512


class Shape(NamedTuple):
    """The shape of a trunk: width of the first stage and number of blocks of each stage."""

    embed_dim: int
    depths: tuple[int, ...]

    @property
    def heads(self) -> tuple[int, ...]:
        """Return the number of attention heads of each stage."""
        return tuple(self.embed_dim // HEAD_DIM * 2**stage for stage in range(len(self.depths)))

    @property
    def overrides(self) -> dict[str, object]:
        """Return this shape as values of the run config's `model` section."""
        return {"embed_dim": self.embed_dim, "depths": list(self.depths), "heads": list(self.heads)}


class Values(NamedTuple):
    """Keys of the run config's `model` section that the sweep file gives for a size."""

    text: str  # as JSON, so that equal sizes compare equal

    @property
    def overrides(self) -> dict[str, object]:
        """Return the keys with their values."""
        found: dict[str, object] = json.loads(self.text)
        return found


def ladder() -> Iterator[Shape]:
    """Yield every shape of the ladder, narrow ones first."""
    for width in range(HEAD_DIM, WIDEST + 1, HEAD_DIM):
        for depth in STAGE_3.get(width, (18,)):
            yield Shape(width, (2, 2, depth, 2))


def shape_of(size: Size, base: Config) -> Shape | Values:
    """Return the shape for an entry of the sweep's `sizes`: a named trunk, a width, a number of parameters, or any values.

    Raises:
        UserError: an unknown trunk, a width that is not a multiple of 32, a number of parameters far from every shape of
            the ladder, or a ladder for a trunk that has none.
    """
    if size.model is not None:
        return Values(json.dumps(size.model, sort_keys=True))
    if size.trunk is None and not _on_meta(base).has_ladder:
        raise UserError(
            f"sizes: {base.model.trunk} is no Swin, and only Swins have shapes for params and embed_dim; give model: "
            "{…} with the keys of its size"
        )
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
    """Build a named trunk in its own size on the meta device, with the base config's window and global crop size."""
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
    """Return the shape of the ladder whose number of trunk parameters is nearest to `target`, by ratio."""
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
    """Return every shape of the ladder with its number of trunk parameters.

    Args:
        trunk: name of the trunk family's base, as in `model.trunk`.
        side: size of the global crops in pixels.
    """
    found = []
    for shape in ladder():
        model = {"trunk": trunk, "window": window} | shape.overrides
        config = Config.model_validate({"model": model, "data": {"global_crops": {"size": side}}})
        found.append((shape, costs.parameters(config).trunk))
    return found
