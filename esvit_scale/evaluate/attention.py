"""`esvit-scale evaluate attention`: a trunk's attention maps and its tokens' principal components on one image."""

from pathlib import Path
from typing import NamedTuple

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
from esvit_scale.models.attention_maps import BlockAttention
from esvit_scale.models.trunk import Trunk

MAX_PIXELS = 2**22  # largest resized picture (2048²); its attention maps take about 3 GB at the published widths


def attention(trunk: nn.Module, image: Tensor) -> list[BlockAttention]:
    """Return the attention of every block, first to last, on one normalised image [3, H, W] of any size.

    Raises:
        UserError: the trunk has no attention maps.
    """
    return require_attention_maps(trunk).attention_maps(image)


@torch.no_grad()
def components(trunk: nn.Module, image: Tensor, n: int = 3) -> list[Tensor]:
    """Return the first n principal components of each stage's tokens as maps [n, H_s, W_s] with values from 0 to 1.

    The components are computed over the tokens of this image. With n = 3 a map can be shown as an RGB image, in which
    parts that the trunk represents alike have similar colours. Values are scaled so that 0 and 1 are the 2nd and 98th
    percentile; a component's sign is chosen so that its largest entry is positive.

    Args:
        image: normalised image [3, H, W].

    Raises:
        UserError: the trunk has no attention maps.
    """
    maps = []
    for tokens, [(_, h, w)], _ in require_attention_maps(trunk).stage_maps([image[None]]):
        x = (tokens - tokens.mean(0)).double()  # [T, C]
        _, _, basis = torch.linalg.svd(x, full_matrices=False)
        kept = basis[:n]
        kept = kept * kept.gather(1, kept.abs().argmax(1, keepdim=True)).sign()  # the SVD does not determine the sign
        values = x @ kept.T  # [T, ≤ n]
        values = torch.cat([values, values.new_zeros(len(values), n - values.shape[1])], 1)
        low, high = values.quantile(0.02, 0), values.quantile(0.98, 0)
        scaled = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        maps.append(scaled.T.reshape(n, h, w).float().cpu())
    return maps


@torch.no_grad()
def kept(trunk: nn.Module, image: Tensor) -> list[Tensor]:
    """Return which tokens of one normalised image [3, H, W] each pruning stage of a sparse trunk keeps, bool [H_s, W_s];
    nothing of other trunks."""
    found = require_attention_maps(trunk)([image[None]]).kept
    if found is None:
        return []
    [(_, h, w)] = found.grids
    return [mask.view(h, w).bool().cpu() for mask in found.masks]


class AttentionResult(NamedTuple):
    """The result of the attention evaluation on one picture: every block's attention and every stage's components."""

    teacher: FrozenTrunk
    picture: np.ndarray  # uint8 [H, W, 3], as the trunk sees it
    blocks: list[BlockAttention]
    components: list[Tensor]
    kept: list[Tensor]  # bool [H_s, W_s] for each pruning stage of a sparse trunk: True for a token that it kept


def run_attention(checkpoint: Path, image: Path, out: Path, size: int | None = None) -> AttentionResult:
    """Run `esvit-scale evaluate attention`: write `out`/attention.npz and return the result.

    The file has the arrays `image` (uint8 [H, W, 3]), `stage{s}_block{i}` for block i of stage s, counted from 1
    (float32 [heads, H_s, W_s], the attention that each token receives), and `components_stage{s}` (float32 [3, H_s,
    W_s]), and of a sparse trunk `kept{s}` for each of its pruning stages (bool [H_s, W_s]: True for a token that it kept).
    report/evaluation_figures.py draws the figures.

    Args:
        size: pixels to resize the picture's short side to; None takes the size of the run's global crops.

    Raises:
        UserError: the file is no image, the picture is too large at this size, or the trunk has no attention maps.
    """
    teacher = load_frozen_trunk(checkpoint)
    require_attention_maps(teacher.trunk)
    require_pictures(teacher)
    return save_attention(teacher, decoded(image), out, size, str(image))


def save_attention(
    teacher: FrozenTrunk, picture: np.ndarray, out: Path, size: int | None = None, name: str = "picture"
) -> AttentionResult:
    """Do the work of `run_attention` for a loaded trunk and a picture uint8 [H, W, 3]; `name` is for messages."""
    shown = resized(picture, size or teacher.size, name)
    pixels = to_trunk(shown, teacher.pixels)
    found = (attention(teacher.trunk, pixels), components(teacher.trunk, pixels), kept(teacher.trunk, pixels))
    seen = AttentionResult(teacher, shown, *found)
    arrays = {f"stage{b.stage + 1}_block{b.block + 1}": b.received().float().numpy() for b in seen.blocks}
    arrays |= {f"kept{s + 1}": mask.numpy() for s, mask in enumerate(seen.kept)}
    arrays |= {f"components_stage{s + 1}": c.numpy() for s, c in enumerate(seen.components)}
    out.mkdir(parents=True, exist_ok=True)
    with files.replacing(out / "attention.npz") as tmp, tmp.open("wb") as file:
        np.savez_compressed(file, image=shown, **arrays)  # type: ignore[arg-type]
    return seen


def read_picture(path: Path, size: int) -> np.ndarray:
    """Read a picture from a file and return it with the short side resized to `size` pixels: uint8 [H, W, 3].

    Raises:
        UserError: the file does not exist or is no image, or the resized picture has more than MAX_PIXELS pixels.
    """
    return resized(decoded(path), size, str(path))


def decoded(path: Path) -> np.ndarray:
    """Read a picture from a file and return it as uint8 [H, W, 3].

    Raises:
        UserError: the file does not exist or is no image.
    """
    if path.is_dir() or not path.exists():
        raise UserError(f"{path}: {'is a folder; name one image' if path.is_dir() else 'no such image'}")
    try:
        return np.array(decode(image_folder.read_file(path)))
    except (BadImage, OSError) as error:
        raise UserError(f"{path}: {error}") from None


def resized(picture: np.ndarray, size: int, name: str) -> np.ndarray:
    """Resize a picture uint8 [H, W, 3] bicubically so that its short side has `size` pixels.

    Raises:
        UserError: the resized picture has more than MAX_PIXELS pixels.
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
    """Convert a picture uint8 [H, W, 3] to the trunk's input: normalised float32 [3, H, W]."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    return photometric.normalize_(x, pixels)[0]


def require_pictures(teacher: FrozenTrunk) -> None:
    """Raise UserError if a checkpoint was trained on images other than 8-bit RGB."""
    if not teacher.pixels.is_rgb8:
        raise UserError(
            f"this evaluation needs a checkpoint trained on 8-bit RGB images; this one was trained on {teacher.pixels}"
        )


def require_attention_maps(trunk: nn.Module) -> Trunk:
    """Return `trunk` if it has attention maps, else raise UserError."""
    if not isinstance(trunk, Trunk) or not trunk.has_attention_maps:
        name = trunk.name if isinstance(trunk, Trunk) else type(trunk).__name__
        raise UserError(f"attention maps are stitched from the windows of a Swin; {name} has none")
    return trunk
