"""What a Swin trunk looks at: attention probabilities of every block, stitched from windows to maps of the image."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from esvit_scale import files
from esvit_scale.data import image_folder, photometric
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.pixel_format import RGB8, PixelFormat
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import FrozenTrunk, load_frozen_trunk
from esvit_scale.models.swin import PATCH, Swin, WindowAttention, attend
from esvit_scale.models.swin_v2 import WindowAttentionV2
from esvit_scale.models.windows import WindowPlan, merged, storage_plan

MAX_PIXELS = 2**22  # of a picture after resizing, 2048²: its attention takes about 3 GB at the published widths


class BlockAttention(NamedTuple):
    """One block's attention on one image. Windows come in the trunk's order; `cells` says what they cover."""

    stage: int  # from 0, as is the block within its stage
    block: int
    grid: tuple[int, int]  # tokens (H, W) of the stage's map
    probabilities: Tensor  # [windows, heads, L, L]; a row is one query's, over its window's slots, and sums to 1
    cells: Tensor  # int64 [windows, L]: row-major token of each slot, shift undone; −1: padding

    def received(self) -> Tensor:
        """[heads, H, W]: the attention that each token gets from the queries of its window, as a multiple of an even
        share. A query on padding asks nothing; what falls on padding is left out."""
        asks = (self.cells >= 0).to(self.probabilities.dtype)  # [windows, L]
        share = torch.einsum("whqk,wq->whk", self.probabilities, asks) / asks.sum(1)[:, None, None]
        return self._stitched((share * self.cells.shape[1]).transpose(0, 1))

    def row(self, token: int) -> tuple[Tensor, Tensor]:
        """One query's attention [heads, H, W], zero outside its window, and what it gives to padding [heads]."""
        [[window, slot]] = (self.cells == token).nonzero().tolist()
        weights = torch.zeros(*self.cells.shape[:1], *self.probabilities.shape[1:3], dtype=self.probabilities.dtype)
        weights[window] = self.probabilities[window, :, slot]
        pads = (weights[window] * (self.cells[window] < 0)).sum(-1)
        return self._stitched(weights.transpose(0, 1)), pads

    def _stitched(self, values: Tensor) -> Tensor:
        """[heads, windows, L] → [heads, H, W]: every token lies in exactly one window."""
        real = self.cells >= 0
        out = values.new_zeros(len(values), self.grid[0] * self.grid[1])
        out[:, self.cells[real]] = values[:, real]
        return out.view(-1, *self.grid)


@torch.no_grad()
def attention(trunk: nn.Module, image: Tensor) -> list[BlockAttention]:
    """Of every block, first to last, for one image [3, H, W] (normalised, of any size).

    Raises:
        UserError: a trunk without window attention.
    """
    swin = require_swin(trunk)
    blocks: list[BlockAttention] = []
    grids = ((1, -(-image.shape[1] // PATCH), -(-image.shape[2] // PATCH)),)
    layout = []  # of every block in order: its stage, its number there, its grids
    for s, stage in enumerate(swin.stages):
        layout += [(s, i, grids, stage.window) for i in range(len(stage.blocks))]
        grids = cast(Any, merged(grids))

    def record(module: WindowAttention | WindowAttentionV2, tokens: Tensor, plan: WindowPlan) -> None:
        s, i, grids, window = layout[len(blocks)]
        qkv, bias = module.operands(tokens, plan)
        _, probabilities = attend(qkv, bias, plan.masks)
        row_major = storage_plan(grids, window, tokens.device).tokens
        cells = row_major[plan.slots.tokens]
        cells[plan.slots.pads] = -1
        blocks.append(BlockAttention(s, i, grids[0][1:], probabilities.cpu(), cells.view(-1, plan.window**2).cpu()))

    with _before_attention(swin, record):
        swin([image[None]])
    return blocks


@torch.no_grad()
def components(trunk: nn.Module, image: Tensor, n: int = 3) -> list[Tensor]:
    """The n principal components of each stage's tokens over the image, [n, H_s, W_s] in 0…1, signs fixed.

    The usual way to see what a representation tells apart: three components as red, green and blue. Each is scaled
    between its 2nd and 98th percentile.

    Raises:
        UserError: a trunk without stages.
    """
    maps = []
    for tokens, [(_, h, w)], _ in require_swin(trunk).stage_maps([image[None]]):
        x = (tokens - tokens.mean(0)).double()  # [T, C]
        _, _, basis = torch.linalg.svd(x, full_matrices=False)
        kept = basis[:n]
        kept = kept * kept.gather(1, kept.abs().argmax(1, keepdim=True)).sign()  # svd leaves the sign open
        values = x @ kept.T  # [T, ≤ n]
        values = torch.cat([values, values.new_zeros(len(values), n - values.shape[1])], 1)
        low, high = values.quantile(0.02, 0), values.quantile(0.98, 0)
        scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        maps.append(scaled.T.reshape(n, h, w).float().cpu())
    return maps


class AttentionResult(NamedTuple):
    """One picture and what the teacher makes of it."""

    teacher: FrozenTrunk
    picture: np.ndarray  # uint8 [H, W, 3], as the trunk sees it
    blocks: list[BlockAttention]
    components: list[Tensor]


def run_attention(checkpoint: Path, image: Path, out: Path, size: int | None = None) -> AttentionResult:
    """`esvit-scale evaluate attention`: writes `out`/attention.npz; the pictures are the report's to draw.

    Its arrays: `image` uint8 [H, W, 3]; for stage s and its block i `stage{s}_block{i}` float32 [heads, H_s, W_s], the
    attention each token receives; `components_stage{s}` float32 [3, H_s, W_s].

    Args:
        size: pixels of the picture's short side as the trunk sees it; None: the size of the run's global crops.

    Raises:
        UserError: not an image, too large at this size, or a trunk without window attention.
    """
    teacher = load_frozen_trunk(checkpoint)
    require_swin(teacher.trunk)
    require_pictures(teacher)
    return save_attention(teacher, decoded(image), out, size, str(image))


def save_attention(
    teacher: FrozenTrunk, picture: np.ndarray, out: Path, size: int | None = None, name: str = "picture"
) -> AttentionResult:
    """`run_attention` of a picture uint8 [H, W, 3]."""
    shown = resized(picture, size or teacher.size, name)
    pixels = to_trunk(shown, teacher.pixels)
    seen = AttentionResult(teacher, shown, attention(teacher.trunk, pixels), components(teacher.trunk, pixels))
    arrays = {f"stage{b.stage + 1}_block{b.block + 1}": b.received().float().numpy() for b in seen.blocks}
    arrays |= {f"components_stage{s + 1}": c.numpy() for s, c in enumerate(seen.components)}
    out.mkdir(parents=True, exist_ok=True)
    with files.replacing(out / "attention.npz") as tmp, tmp.open("wb") as file:
        np.savez_compressed(file, image=shown, **arrays)  # type: ignore[arg-type]
    return seen


def read_picture(path: Path, size: int) -> np.ndarray:
    """The whole picture with its short side at `size` pixels: uint8 [H, W, 3].

    Raises:
        UserError: no such file, not an image, or more than MAX_PIXELS at this size.
    """
    return resized(decoded(path), size, str(path))


def decoded(path: Path) -> np.ndarray:
    """
    Raises:
        UserError: no such file, or not an image.
    """
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: {'is a folder; name one image' if path.is_dir() else 'no such image'}")
    try:
        return np.array(decode(image_folder.read_file(path)))
    except (BadImage, OSError) as error:
        raise UserError(f"{path}: {error}") from None


def resized(picture: np.ndarray, size: int, name: str) -> np.ndarray:
    """The short side to `size` pixels, bicubic as evaluation resizes.

    Raises:
        UserError: more than MAX_PIXELS at this size.
    """
    scale = size / min(picture.shape[:2])
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    if width * height > MAX_PIXELS:
        fits = int(size * (MAX_PIXELS / (width * height)) ** 0.5)
        raise UserError(
            f"{name}: {width}×{height} pixels with the short side at {size}, over the limit of {MAX_PIXELS:,}; "
            f"nearest: --size {fits}"
        )
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def to_trunk(picture: np.ndarray, pixels: PixelFormat = RGB8) -> Tensor:
    """uint8 [H, W, 3] → [3, H, W], normalised."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    return photometric.normalize_(x, pixels)[0]


def require_pictures(teacher: FrozenTrunk) -> None:
    """Raise UserError for a checkpoint that was trained on anything but 8-bit RGB."""
    if not teacher.pixels.is_rgb8:
        raise UserError(f"this evaluation shows pictures in 8-bit RGB; the checkpoint was trained on {teacher.pixels}")


def require_swin(trunk: nn.Module) -> Swin:
    """
    Raises:
        UserError: any other trunk.
    """
    if not isinstance(trunk, Swin):
        raise UserError(f"attention maps are stitched from Swin's windows; {type(trunk).__name__} has none")
    return trunk


@contextmanager
def _before_attention(swin: Swin, record: Any) -> Iterator[None]:
    """Calls record(module, *inputs) before every block's attention."""
    modules = [cast(nn.Module, block.attn) for block in swin.blocks]
    handles = [module.register_forward_pre_hook(lambda m, inputs: record(m, *inputs)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
