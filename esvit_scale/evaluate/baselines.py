"""What trained features are compared with: the same trunk untrained, and raw pixels.

Every evaluation takes them in the place of a checkpoint: `untrained:CONFIG` and `pixels`, or `pixels:SIDE`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data.pixel_format import RGB8, PixelFormat, pixel_format
from esvit_scale.errors import UserError
from esvit_scale.evaluate.pixels import SIDE, small_pixels
from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Features, TokenMap, Trunk

PIXELS, UNTRAINED = "pixels", "untrained:"


class Baseline(NamedTuple):
    """A trunk to compare with."""

    name: str  # in tables and reports
    trunk: Trunk
    size: int  # side in pixels of the images that it gets
    step: int | None  # 0 for an untrained trunk; None for pixels
    pixels: PixelFormat


class PixelTrunk(Trunk):
    """A stand-in for a trunk whose features are the pixels of RGB images of `side` × `side`."""

    has_regions = False

    def __init__(self, side: int) -> None:
        super().__init__()
        self.name, self.dim, self.depths, self.norm = PIXELS, 3 * side**2, (1,), nn.Identity()
        self.side = side

    @property
    def blocks(self) -> list[nn.Module]:
        """No blocks."""
        return []

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None) -> Features:
        """Return the pixels of all crops as their view features."""
        (found,) = self.block_maps(crops)
        assert found.view is not None
        return Features(found.view, found.tokens, found.grids)

    def block_maps(self, crops: list[Tensor]) -> Iterator[TokenMap]:
        """Yield one map without tokens, whose view features are the pixels."""
        (images,) = crops
        view = small_pixels(images, self.side)  # [N, 3 · side²]
        yield TokenMap(view[:0], [(len(images), 0, 0)], view)


def is_baseline(checkpoint: str) -> bool:
    """Return whether the value of `--checkpoint` names a baseline and not a path."""
    return checkpoint == PIXELS or checkpoint.startswith((f"{PIXELS}:", UNTRAINED))


def load(checkpoint: str) -> Baseline:
    """Return the baseline that the value of `--checkpoint` names.

    `untrained:CONFIG` is the trunk of a preset, a YAML file or a run dir with the initial values that its seed gives:
    those with which a run of this config starts.

    Raises:
        UserError: there is no such config, its trunk cannot be built, or SIDE is not a number of pixels.
    """
    kind, _, value = checkpoint.partition(":")
    if kind == PIXELS:
        if value and not (value.isdecimal() and 1 <= int(value) <= 1024):
            raise UserError(
                f"--checkpoint {checkpoint}: expected pixels:SIDE with a side of 1 to 1024, such as pixels:64"
            )
        side = int(value or SIDE)
        return Baseline(f"raw pixels, {side} × {side}", PixelTrunk(side), side, None, RGB8)
    config = untrained_config(value)
    # The seed draws a value by the parameter's name in the whole network, which begins with "trunk.".
    holder = nn.ModuleDict({"trunk": build_trunk(config)})
    initialize(holder, config.seed)
    trunk = holder["trunk"]
    assert isinstance(trunk, Trunk)
    return Baseline(
        f"untrained {config.name}", trunk.eval(), config.data.global_crops.size, 0, pixel_format(config.data)
    )


def untrained_config(value: str) -> Config:
    """Return the config that `untrained:` is followed by: that of a preset, a YAML file or a run dir.

    Raises:
        UserError: there is no such config.
    """
    if not value:
        raise UserError(
            f"--checkpoint {UNTRAINED}: needs a preset, a YAML file or a run dir, such as {UNTRAINED}swin_t"
        )
    of_run = Path(value) / "config.yaml"
    return (configs.load(of_run) if of_run.is_file() else configs.resolve(value)).of_stages[-1]
