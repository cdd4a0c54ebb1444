"""Probing of timm networks: which constructor arguments they take, what they return for crops, where their blocks are.

Most of it is in timm's metadata. The metadata is verified by running the network at every crop size on the meta device,
or on the CPU if the network cannot run on meta.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from esvit_scale.errors import UserError, nearest

PREFIX = "timm:"
Given = TypeVar("Given")


class Probe(NamedTuple):
    """A timm network by name and constructor arguments, and the dimensions that its outputs were found to have."""

    name: str  # timm's name of the network
    arguments: tuple[tuple[str, Any], ...]  # keyword arguments of its constructor
    dim: int = 0  # C of the view feature
    has_regions: bool = False  # forward_features returns a grid of cells of width `dim`
    channels_last: bool = False  # forward_features returns maps as [B, H, W, C]
    channels: tuple[int, ...] = ()  # of the maps that forward_intermediates returns; empty: no pyramid
    reductions: tuple[int, ...] = ()  # pixels along a side of a cell of these maps
    in_chans: int = 3

    def create(self, pretrained: bool = False) -> nn.Module:
        """Return the network on the default device, with random or with timm's pretrained weights.

        Raises:
            TypeError: the network does not take one of the arguments.
        """
        import timm

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            channels = {} if self.in_chans == 3 else {"in_chans": self.in_chans}
            return timm.create_model(
                self.name, pretrained=pretrained, num_classes=0, **channels, **dict(self.arguments)
            )

    def images(self, network: nn.Module, n: int, size: int) -> Tensor:
        """Return n images of zeros, [n, in_chans, size, size], on the network's device."""
        return torch.zeros(n, self.in_chans, size, size, device=next(network.parameters()).device)


def candidates(name: str, size: int, drop_path: float, in_chans: int = 3) -> Iterator[Probe]:
    """Yield probes of a timm network with different constructor arguments, those that allow the most crop sizes first.

    Raises:
        UserError: timm has no network of this name.
    """
    import timm

    if not timm.is_model(name):
        close = nearest(name, timm.list_models())
        raise UserError(f"model.trunk: timm has no network {name!r}{close if 'did you mean' in close else ''}")
    liberties: list[dict[str, Any]] = [
        {"dynamic_img_size": True, "img_size": size},
        {"dynamic_img_size": True},
        {"strict_img_size": False, "img_size": size},
        {"img_size": size},
        {},
    ]
    rate = {"drop_path_rate": drop_path} if drop_path else {}
    for liberty in liberties:
        yield Probe(name, tuple({**liberty, **rate}.items()), in_chans=in_chans)


def looked_at(candidate: Probe, sizes: tuple[int, ...]) -> Probe:
    """Run the candidate at every crop size and return it with the dimensions of its outputs filled in.

    Raises:
        Exception: whatever the network raises for constructor arguments or crop sizes that it does not take.
    """
    network = candidate.create()
    found = [outputs(network, candidate.images(network, 2, size)) for size in sizes]
    dim, last = found[0][0].shape[1], getattr(network, "output_fmt", "NCHW") == "NHWC"
    grids = []
    for size, (view, cells) in zip(sizes, found, strict=True):
        if view.dim() != 2:
            raise ValueError(f"its pooled features have {view.dim()} dimensions")
        grids.append(_has_grid(network, cells, size, dim, last))
    channels, reductions = _pyramid(network, candidate.images(network, 1, sizes[0]))
    return candidate._replace(
        dim=dim, has_regions=all(grids), channels_last=last, channels=channels, reductions=reductions
    )


def outputs(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return view features [B, C] of images x, and cells (spatial features) in the layout of timm's `forward_features`.

    If the network's head has a norm after its pooling (ConvNeXt, DaViT), the cells go through that norm too.
    """
    cells = network.forward_features(x)  # type: ignore[operator]
    view = network.forward_head(cells, pre_logits=True)  # type: ignore[operator]
    norm = getattr(getattr(network, "head", None), "norm", None)
    if isinstance(norm, nn.LayerNorm) and cells.dim() == 4:
        cells = norm(cells)
    return view, cells


def intermediates(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the map [B, C_s, H_s, W_s] of every stage s whose reduction is at least 4, before the final norm."""
    indices = [i for i, info in enumerate(_feature_info(network)) if info["reduction"] >= 4]
    return network.forward_intermediates(  # type: ignore[operator]
        x, indices=indices, norm=False, output_fmt="NCHW", intermediates_only=True
    )


def units(network: nn.Module) -> list[list[nn.Module]]:
    """Return the network's blocks, one list per stage.

    Blocks are the children of containers that are named `blocks`. A network without such containers has as its blocks
    the children of the stages in timm's `feature_info`; a stage that is no sequence of modules is one block.
    """
    found: list[list[nn.Module]] = []
    inside: list[str] = []
    for name, module in network.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if name.rpartition(".")[2] == "blocks" and isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module):
            found.append([child for child in module if _trains(child)])
            inside.append(f"{name}.")
    if found:
        return found
    stages = []
    for info in _feature_info(network):
        try:
            stages.append(network.get_submodule(info["module"]))
        except AttributeError:
            continue
    for stage in stages:
        if isinstance(stage, nn.Sequential) and len(stage) > 1:
            found.append([child for child in stage if _trains(child)])
        elif _trains(stage):
            found.append([stage])
    return found


def on_meta(attempt: Callable[[], Given]) -> Given:
    """Return the result of `attempt`, called on the meta device, or on the CPU if it needs the values of tensors."""
    try:
        with torch.device("meta"):
            return attempt()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        return attempt()


def grid_of(cells: int, height: int, width: int) -> tuple[int, int] | None:
    """Return (rows, columns) of `cells` cells that tile an image of height × width pixels; None if no grid fits."""
    rows = max(1, round(math.sqrt(cells * height / width)))
    return (rows, cells // rows) if cells and cells % rows == 0 and (height != width or rows * rows == cells) else None


def _has_grid(network: nn.Module, cells: Tensor, size: int, dim: int, last: bool) -> bool:
    if cells.dim() == 4:
        return cells.shape[-1 if last else 1] == dim
    prefix = getattr(network, "num_prefix_tokens", 0)
    return cells.dim() == 3 and cells.shape[2] == dim and grid_of(cells.shape[1] - prefix, size, size) is not None


def _pyramid(network: nn.Module, image: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the channels and the reductions of the stages' maps.

    Both are empty if the network returns no such maps, if the maps do not shrink from stage to stage, or if their
    shapes are not those in timm's metadata.
    """
    infos = [info for info in _feature_info(network) if info["reduction"] >= 4]
    channels = tuple(int(info["num_chs"]) for info in infos)
    reductions = tuple(int(info["reduction"]) for info in infos)
    if len(set(reductions)) < 2 or sorted(set(reductions)) != list(reductions):
        return (), ()
    try:
        maps = intermediates(network, image)
    except Exception:  # the network can be a trunk without a pyramid
        return (), ()
    shapes = [(m.shape[1], -(-image.shape[-1] // m.shape[2])) for m in maps]
    return (channels, reductions) if shapes == list(zip(channels, reductions, strict=True)) else ((), ())


def _feature_info(network: nn.Module) -> list[dict[str, Any]]:
    info = getattr(network, "feature_info", [])
    return list(getattr(info, "info", info))


def _trains(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
