"""Features of single pixels: stage maps of windows over an image, interpolated bilinearly at any place.

An image is covered by square windows, each of which goes through the trunk by itself. A place is given in pixels of the
resized image, where the centre of pixel i is at i + 0.5. A linear classifier of an interpolated feature is the
interpolated score of the cells, so that heads compute scores cell by cell and only these are enlarged.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esvit_scale.data import photometric
from esvit_scale.data.pixel_format import RGB8
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import CPU_BATCH, ExtractionOptions, FrozenTrunk
from esvit_scale.evaluate.progress import progress
from esvit_scale.models.trunk import Trunk
from esvit_scale.parallel import collectives

ELEMENTS_AT_ONCE = 2**24  # scores of a band of rows: classes × rows × columns


class StageMap(NamedTuple):
    """A stage's features of one window."""

    values: Tensor  # [h, w, C_s]
    cell: float  # pixels along a cell's side


class Window(NamedTuple):
    """A window of an image, by its upper left corner in pixels, and what was computed of it: maps [h, w, …]."""

    top: int
    left: int
    maps: list[StageMap]


class HasPixels(Protocol):
    """An image of an evaluation set."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """Return the resized RGB image [H, W, 3]."""
        ...


SetImage = TypeVar("SetImage", bound=HasPixels)


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Return where windows of `crop` pixels begin on a side of `length` pixels; the last one ends at its end."""
    count = -(-(length - crop) // stride) + 1
    return [min(i * stride, length - crop) for i in range(count)]


def window_sizes(size: int, crop: int | None, stride: int | None) -> tuple[int, int]:
    """Return the side of windows and the pixels between them, for images whose short side has `size` pixels.

    By default a window is as large as the short side, and the stride is two thirds of it.

    Raises:
        UserError: a window is larger than the image, or the stride larger than the window.
    """
    crop = crop or size
    stride = stride or max(1, 2 * crop // 3)
    if crop > size:
        raise UserError(f"--crop {crop}: larger than the image's short side of {size} pixels; nearest: --crop {size}")
    if stride > crop:
        raise UserError(f"--stride {stride}: leaves gaps between windows of {crop} pixels; nearest: --stride {crop}")
    return crop, stride


def interpolation(places: Tensor, cell: float, cells: int) -> Tensor:
    """Return the weights [n, cells] that interpolate the values of a row of cells linearly at n places.

    Beyond the centres of the first and last cell their values go on.

    Args:
        places: float [n], in pixels from the beginning of the row.
        cell: pixels of a cell.
    """
    at = (places / cell - 0.5).clamp(0, cells - 1)
    low = at.floor().long()
    part = (at - low).float()[:, None]
    weights = torch.zeros(len(places), cells, device=places.device)
    weights.scatter_add_(1, low[:, None], 1 - part)
    return weights.scatter_add_(1, (low + 1).clamp(max=cells - 1)[:, None], part)


def require_grid(trunk: nn.Module) -> Trunk:
    """Return a trunk that gives tokens on a grid; raise UserError for any other."""
    if not isinstance(trunk, Trunk) or not trunk.has_regions:
        name = trunk.name if isinstance(trunk, Trunk) else type(trunk).__name__
        raise UserError(f"this evaluation needs tokens on a grid; {name} gives none")
    return trunk


@torch.no_grad()
def stage_maps(trunk: nn.Module, images: Tensor) -> list[list[StageMap]]:
    """Return the maps of all stages for every window of images [B, 3, S, S]; the last stage's after the final norm.

    Raises:
        UserError: the trunk gives no tokens on a grid.
    """
    trunk = require_grid(trunk)
    found = trunk.stage_maps([images])
    stages = []
    for s, (tokens, [(n, h, w)], _) in enumerate(found):
        normed = trunk.norm(tokens) if s == len(found) - 1 else tokens
        cell = float(trunk.reductions[s]) if trunk.reductions else images.shape[-1] / h
        stages.append([StageMap(values, cell) for values in normed.float().view(n, h, w, -1)])
    return [list(of_window) for of_window in zip(*stages, strict=True)]


def windows_of_set(
    teacher: FrozenTrunk,
    read: Callable[[range], Iterator[SetImage]],
    total: int,
    name: str,
    crop: int,
    stride: int,
    options: ExtractionOptions,
    device: torch.device,
) -> Iterator[tuple[SetImage, list[Window]]]:
    """Yield this rank's images of a set, each with its windows and their stage maps.

    Args:
        read: returns the images with these numbers, in order.
        total: number of images of the set.
        name: of the set, for the progress line.
        crop, stride: side of a window and pixels between windows.
    """
    trunk = teacher.trunk.to(device).eval()
    numbers = range(total)[share(total, collectives.rank(), collectives.world_size())]
    at_once = CPU_BATCH if device.type == "cpu" else options.batch
    for image in progress(read(numbers), f"features of {name}", len(numbers), "images"):
        yield image, window_maps(trunk, image.pixels, crop, stride, at_once, device, options.precision == "bf16")


@torch.no_grad()
def window_maps(
    trunk: nn.Module,
    pixels: NDArray[np.uint8],
    crop: int,
    stride: int,
    batch: int,
    device: torch.device,
    bf16: bool = False,
) -> list[Window]:
    """Return the windows that cover an RGB image [H, W, 3], with their stage maps.

    Args:
        trunk: in eval mode, on `device`.
        crop, stride: side of a window and pixels between windows.
        batch: windows of a forward pass.
        bf16: run the trunk under autocast.
    """
    image = photometric.normalize_(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, RGB8)[0]
    corners = [
        (top, left) for top in starts(image.shape[1], crop, stride) for left in starts(image.shape[2], crop, stride)
    ]
    windows: list[Window] = []
    for start in range(0, len(corners), batch):
        some = corners[start : start + batch]
        batch_pixels = torch.stack([image[:, y : y + crop, x : x + crop] for y, x in some]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            maps = stage_maps(trunk, batch_pixels)
        windows += [Window(y, x, of_window) for (y, x), of_window in zip(some, maps, strict=True)]
    return windows


def grid_features(window: Window, y: Tensor, x: Tensor) -> Tensor:
    """Return the features of all stages at a grid of places [ny, nx, ΣC_s].

    Args:
        y, x: places [ny] and [nx] in pixels of the image.
    """
    found = []
    for values, cell in window.maps:
        rows = interpolation(y - window.top, cell, values.shape[0])
        columns = interpolation(x - window.left, cell, values.shape[1])
        found.append(torch.einsum("xw,ywc->yxc", columns, torch.einsum("yh,hwc->ywc", rows, values)))
    return torch.cat(found, 2)


def features_at(windows: list[Window], crop: int, y: Tensor, x: Tensor) -> Tensor:
    """Return the features of all stages at n places [n, ΣC_s], each from the window whose centre is nearest.

    Args:
        y, x: places [n] in pixels of the image.
    """
    corners = torch.tensor([[w.top, w.left] for w in windows], dtype=torch.float32)
    places = torch.stack([y, x], 1).float()  # [n, 2]
    nearest = (
        (places[:, None] - corners - crop / 2).square().sum(2).argmin(1)
    )  # of [n, windows]; nearest along both axes
    found = torch.empty(len(y), sum(m.values.shape[2] for m in windows[0].maps))
    for i in nearest.unique().tolist():
        mine, parts = nearest == i, []
        for values, cell in windows[i].maps:
            rows = interpolation(y[mine] - windows[i].top, cell, values.shape[0]).to(values.device)
            columns = interpolation(x[mine] - windows[i].left, cell, values.shape[1]).to(values.device)
            along = torch.einsum("nh,hwc->nwc", rows, values)
            parts.append(torch.einsum("nw,nwc->nc", columns, along).cpu())
        found[mine] = torch.cat(parts, 1)
    return found


def predicted_classes(windows: list[Window], crop: int, resized: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Return the class with the highest score for every pixel of a mask: int64 [H, W]; arguments as `at_pixels`."""
    return at_pixels(windows, crop, resized, shape, lambda scores: scores.argmax(2))


def at_pixels(
    windows: list[Window],
    crop: int,
    resized: tuple[int, int],
    shape: tuple[int, int],
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what `reduce` makes of the scores of every pixel of a mask: [H, W].

    Scores are interpolated at the centres of the mask's own pixels, summed over stages, and averaged over the windows
    that cover a pixel. A band of rows is computed at a time, so that memory does not grow with the mask.

    Args:
        windows: windows with maps of scores [h, w, K].
        crop: side of a window in pixels.
        resized: height and width of the image that the windows lie on.
        shape: H and W of the mask.
        reduce: maps scores [h, W, K] to values [h, W].
    """
    device, classes = windows[0].maps[0].values.device, windows[0].maps[0].values.shape[2]
    height, width = shape
    y = (torch.arange(height, device=device) + 0.5) * resized[0] / height
    x = (torch.arange(width, device=device) + 0.5) * resized[1] / width
    found = []
    band = max(1, ELEMENTS_AT_ONCE // (classes * width))
    for start in range(0, height, band):
        rows = y[start : start + band]
        total = torch.zeros(len(rows), width, classes, device=device)
        covered = torch.zeros(len(rows), width, 1, device=device)
        for window in windows:
            of_rows = (rows >= window.top) & (rows < window.top + crop)
            of_columns = (x >= window.left) & (x < window.left + crop)
            if of_rows.any():
                first, last = (int(i) for i in of_rows.nonzero()[[0, -1], 0])
                left, right = (int(i) for i in of_columns.nonzero()[[0, -1], 0])
                scores = _summed_scores(window, rows[first : last + 1], x[left : right + 1])
                total[first : last + 1, left : right + 1] += scores
                covered[first : last + 1, left : right + 1] += 1
        found.append(reduce(total.div_(covered)).cpu())
    return torch.cat(found)


def _summed_scores(window: Window, y: Tensor, x: Tensor) -> Tensor:
    """Return scores [ny, nx, K] at a grid of places, summed over the stages."""
    total = torch.zeros((), device=y.device)
    for values, cell in window.maps:
        rows = interpolation(y - window.top, cell, values.shape[0])
        columns = interpolation(x - window.left, cell, values.shape[1])
        total = total + torch.einsum("xw,ywk->yxk", columns, torch.einsum("yh,hwk->ywk", rows, values))
    return total
