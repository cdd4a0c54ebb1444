"""Photometric augmentation: colour, blur and solarisation of crops, in one batched pass on the crops' device.

The recipe is DINO's, which EsViT uses (its `DataAugmentationDINO`): colour jitter (.4, .4, .2, .1) with p .8 in a random
order of its four operations, grayscale p .2, Gaussian blur of radius U(.1, 2) (p 1 for the first global crop, .1 for
the second, .5 for local crops), solarisation p .2 (second global only), then mean and standard deviation.
These are the defaults of the keys `data.global_crops.augment` and `data.local_crops.N.augment`.
Parameters are drawn for each crop from its sample's key, so a sample's pixels do not depend on the rest of its batch.

The official Pillow pipeline rounds to 8 bits after every operation; the values here differ from its by that rounding only.

Which crops an operation changes is decided on the host (`plan`), so that nothing waits for the device. `send_together`
copies the indices and parameters of all operations to the device in one transfer, and `run` applies them there.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from esvit_scale.data.pixel_format import MEAN as MEAN
from esvit_scale.data.pixel_format import RGB8, PixelFormat
from esvit_scale.data.pixel_format import STD as STD
from esvit_scale.run_keys import GlobalAugment, LocalAugment

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, Pillow's grey
ORDERS = tuple(permutations(range(4)))  # the orders of the four jitter operations
BOX_REACH = 2  # pixels on either side that one box pass of the largest radius that the config takes (2) reaches


class Strengths(NamedTuple):
    """How often and how strongly one crop is augmented: what its parameters are drawn from."""

    jitter: float  # probability
    reach: tuple[float, float, float, float]  # largest change of brightness, contrast, saturation and hue
    grayscale: float  # probability
    blur: float  # probability
    radius: tuple[float, float]  # pixels: smallest and largest blur
    solarize: float  # probability


def strengths(augment: GlobalAugment | LocalAugment) -> list[Strengths]:
    """Return the strengths that a config section describes: of both global crops, or of one local crop."""
    a = augment
    blur, solarize = (a.blur, a.solarize) if isinstance(a, GlobalAugment) else ((a.blur,), (a.solarize,))
    reach = (a.brightness, a.contrast, a.saturation, a.hue)
    return [Strengths(a.jitter, reach, a.grayscale, b, a.blur_radius, s) for b, s in zip(blur, solarize, strict=True)]


ESVIT = [*strengths(GlobalAugment()), *strengths(LocalAugment())]  # first global, second global, local crops


class BatchAugmentationParams(NamedTuple):
    """Photometric parameters of many crops; all fields have the same leading shape ([V, B] in a batch, [N] flattened)."""

    order: Tensor  # int64: index in ORDERS of the order in which the jitter operations are applied; -1: no jitter
    factors: Tensor  # float32 [..., 4]: brightness, contrast, saturation factor; hue shift in turns
    grayscale: Tensor  # bool
    radius: Tensor  # float32: blur radius in pixels, 0: no blur
    solarize: Tensor  # bool

    def crops(self, start: int, stop: int) -> "BatchAugmentationParams":
        """Return the parameters of crops start..stop-1 of every image, flattened to [(stop-start)·B] as the crops are."""
        return BatchAugmentationParams(*(field[start:stop].flatten(0, 1) for field in self))


class PlannedOperation(NamedTuple):
    """One operation on some of the crops, in the order in which they are applied."""

    function: Callable[..., Tensor]
    has_parameter: bool
    first: int  # its crops are rows[first : first + crops] of the plan
    crops: int  # their number


class Plan(NamedTuple):
    """All operations on a group of crops, with the two tensors that they need on the device."""

    operations: list[PlannedOperation]
    rows: Tensor  # int64 [n]: indices of crops
    values: Tensor  # float32 [n]: the operation's parameter for each of them, 0 without one


class AugmentationParams(NamedTuple):
    """Photometric parameters of one crop: the fields of `BatchAugmentationParams` as plain numbers."""

    order: int
    factors: tuple[float, float, float, float]
    grayscale: bool
    radius: float
    solarize: bool


def draw_params(rng: np.random.Generator, strength: Strengths) -> AugmentationParams:
    """Draw the parameters of one crop from the crop's generator; the same ten numbers whatever the strengths are."""
    u = rng.random(10)
    b, c, s, h = ((2 * float(v) - 1) * reach for v, reach in zip(u[2:6], strength.reach, strict=True))
    low, high = strength.radius
    return AugmentationParams(
        order=int(u[1] * len(ORDERS)) if u[0] < strength.jitter else -1,
        factors=(1 + b, 1 + c, 1 + s, h),
        grayscale=bool(u[6] < strength.grayscale),
        radius=low + (high - low) * float(u[8]) if u[7] < strength.blur else 0.0,
        solarize=bool(u[9] < strength.solarize),
    )


def stack(draws: list[list[AugmentationParams]]) -> BatchAugmentationParams:
    """Return parameters [V][B] as tensors with the leading shape [V, B]."""
    columns = [[[d[field] for d in row] for row in draws] for field in range(len(AugmentationParams._fields))]
    types = (torch.int64, torch.float32, torch.bool, torch.float32, torch.bool)
    return BatchAugmentationParams(*(torch.tensor(c, dtype=t) for c, t in zip(columns, types, strict=True)))


def concatenate(parts: list[BatchAugmentationParams], dim: int) -> BatchAugmentationParams:
    """Concatenate parameters along a dimension of their leading shape."""
    return BatchAugmentationParams(*(torch.cat(fields, dim) for fields in zip(*parts, strict=True)))


def apply(crops: Tensor, params: BatchAugmentationParams, pixels: PixelFormat = RGB8) -> Tensor:
    """Augment and normalise crops.

    Images of other than three channels get the operations that are defined for them: brightness, contrast (about each
    channel's own mean) and blur.

    Args:
        crops: uint8 or uint16 [N, C, S, S].
        params: parameters of these N crops, on the host.

    Returns:
        float32 [N, C, S, S], normalised with the format's mean and standard deviation, on the crops' device.
    """
    planned = plan(params, pixels)
    rows, values = send_together([planned.rows, planned.values], crops.device)
    return run(crops, planned._replace(rows=rows, values=values), pixels)


def plan(params: BatchAugmentationParams, pixels: PixelFormat = RGB8) -> Plan:
    """Return the operations on N crops, given their parameters on the host."""
    colour = pixels.channels == 3
    jitter = (_brightness, _contrast, _saturation, _hue) if colour else (_brightness, _contrast_of_channels)
    orders = torch.tensor([*ORDERS, (-1,) * 4])[params.order]  # [N, 4]
    wanted: list[tuple[Callable[..., Tensor], Tensor, Tensor | None]] = [
        (function, orders[:, place] == operation, params.factors[:, operation])
        for place in range(4)
        for operation, function in enumerate(jitter)
    ]
    wanted += [(_grayscale, params.grayscale, None)] if colour else []
    wanted += [(_blur, params.radius > 0, params.radius)]
    wanted += [(_solarize, params.solarize, None)] if colour else []
    operations, rows, values, first = [], [], [], 0
    for function, chosen, parameter in wanted:
        at = chosen.nonzero().flatten()
        rows.append(at)
        values.append(torch.zeros(len(at)) if parameter is None else parameter[at])
        if len(at):
            operations.append(PlannedOperation(function, parameter is not None, first, len(at)))
        first += len(at)
    return Plan(operations, torch.cat(rows), torch.cat(values))


def run(crops: Tensor, planned: Plan, pixels: PixelFormat = RGB8) -> Tensor:
    """Augment and normalise crops [N, C, S, S] as `apply` does, by a plan whose tensors are on the crops' device."""
    x = unit(crops, pixels)
    for function, has_parameter, first, count in planned.operations:
        rows = planned.rows.narrow(0, first, count)
        parameters = [planned.values.narrow(0, first, count).view(-1, 1, 1, 1)] if has_parameter else []
        x.index_copy_(0, rows, function(x.index_select(0, rows), *parameters))
    return normalize_(x, pixels)


def send_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies of small host tensors on a device, which share one transfer; on a CPU, return the tensors.

    For a GPU they go through page-locked memory, so that the host does not wait for the copy.
    """
    if device.type == "cpu":
        return list(tensors)
    spaces = [-(-t.numel() * t.element_size() // 8) * 8 for t in tensors]  # bytes; all begin at a multiple of 8
    packed = torch.empty(sum(spaces), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, place in zip(tensors, packed.split(spaces), strict=True):
        content = tensor.contiguous().view(-1).view(torch.uint8)
        place[: len(content)].copy_(content)
    there = packed.to(device, non_blocking=True)
    return [
        place[: t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        for t, place in zip(tensors, there.split(spaces), strict=True)
    ]


def unit(crops: Tensor, pixels: PixelFormat = RGB8) -> Tensor:
    """Return stored pixel values [N, C, S, S] scaled to 0..1, as a contiguous float32 tensor."""
    return crops.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / pixels.largest)


def normalize_(x: Tensor, pixels: PixelFormat = RGB8) -> Tensor:
    """Normalise pixels [N, C, S, S] in 0..1 with the format's mean and standard deviation, in place."""
    return x.sub_(_constant(tuple(pixels.mean), x.device)).div_(_constant(tuple(pixels.std), x.device))


@cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor [n, 1, 1] on a device, the same tensor at every call: it is copied there once."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def _grey(x: Tensor) -> Tensor:
    """Return the luma [N, 1, S, S] of RGB images."""
    return (x[:, 0] * LUMA[0]).add_(x[:, 1], alpha=LUMA[1]).add_(x[:, 2], alpha=LUMA[2]).unsqueeze(1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(max=1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(x).mean((2, 3), keepdim=True)
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _contrast_of_channels(x: Tensor, factor: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(x)
    return x.mul_(factor).add_(grey * (1 - factor)).clamp_(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by `shift` turns; HSV value and saturation stay.

    Channel c of a colour of hue h is max − chroma · clamp(min(k, 4 − k), 0, 1) with k = (n_c + 6h) mod 6 and n = 5, 3, 1 for
    red, green, blue; so no case distinction over the six sectors of the hue is needed.
    """
    highest, lowest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = highest - lowest
    r, g, b = x.unbind(1)
    inverse = chroma.squeeze(1).clamp(min=1e-12).reciprocal_()
    is_r, is_g = r == highest.squeeze(1), g == highest.squeeze(1)
    sixths = torch.where(is_r, (g - b) * inverse, torch.where(is_g, (b - r) * inverse + 2, (r - g) * inverse + 4))
    sixths = sixths.add_(6 * shift.squeeze(1)).unsqueeze(1)  # 6h, [N, 1, S, S]
    k = (sixths + _constant((5.0, 3.0, 1.0), x.device)).remainder_(6)
    return torch.addcmul(highest, torch.minimum(k, 4 - k).clamp_(0, 1), chroma, value=-1)


def _grayscale(x: Tensor) -> Tensor:
    return _grey(x).expand_as(x)


def _blur(x: Tensor, radius: Tensor) -> Tensor:
    """Apply Pillow's Gaussian blur as two products with one banded matrix [S, S] per image."""
    n, channels, size, _ = x.shape
    matrix = blur_matrices(radius.flatten(), size)  # [n, S, S]
    rows = torch.bmm(x.reshape(n, channels * size, size), matrix.transpose(1, 2)).view_as(x)
    return torch.matmul(matrix.unsqueeze(1), rows)


def blur_matrices(radius: Tensor, size: int) -> Tensor:
    """Return the blur along one axis as matrices [n, S, S], whose row i holds the weights of output pixel i.

    A blur is three passes of `box_taps`, each with edge replication.
    """
    taps = box_taps(radius)
    offsets = torch.arange(-BOX_REACH, BOX_REACH + 1, device=radius.device)
    source = (torch.arange(size, device=radius.device).unsqueeze(1) + offsets).clamp_(0, size - 1)  # [S, 5]
    box = torch.zeros(len(radius), size, size, device=radius.device)
    box.scatter_add_(2, source.expand(len(radius), -1, -1), taps.unsqueeze(1).expand(-1, size, -1))
    return box @ box @ box


def box_taps(radius: Tensor) -> Tensor:
    """Return the weights [n, 5] (float32) of one of the three box blurs that make up Pillow's `GaussianBlur(radius)`.

    The box has a fractional width, so that the three variances add up to radius² (Gwosdek et al., extended box filters).

    Args:
        radius: [n], at most 2 pixels.
    """
    variance = radius.double().unsqueeze(1) ** 2 / 3  # of one pass
    whole = ((12 * variance + 1).sqrt().sub(1) / 2).floor()
    fraction = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    offsets = torch.arange(-BOX_REACH, BOX_REACH + 1, device=radius.device)
    taps = torch.where(offsets.abs() <= whole, 1.0, torch.where(offsets.abs() == whole + 1, fraction, 0.0))
    return (taps / (2 * (whole + fraction) + 1)).float()


def _solarize(x: Tensor) -> Tensor:
    return torch.where(x >= 127.5 / 255, 1 - x, x)
