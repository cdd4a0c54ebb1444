"""A network of the timm library as a trunk (`model.trunk: timm:<name>`), called once per resolution.

A crop's view feature is what timm's own classifier would read (`forward_head(…, pre_logits=True)`), its region tokens
are the cells of `forward_features`. Parameters are named `network.` and then as in timm. Whatever depends on a random
generator or on a single GPU is replaced; everything else runs as in timm:

- stochastic depth, dropout, batch norms and the calls of blocks are replaced by models/timm_parts.py;
- initial values are those that timm draws on a CPU in fp32 from the run's seed, under every engine.

Which arguments a network takes, and whether it takes the run's crop sizes, is tried out when a run begins
(models/timm_probe.py).
"""

from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esvit_scale.config import Config
from esvit_scale.errors import UserError, first_line
from esvit_scale.models import timm_probe
from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.descriptions import PublishedWeights, Tensors, TimmForm, TrunkCard
from esvit_scale.models.distributions import Initializer, OfSeed
from esvit_scale.models.drop_path import drop_keys as keys_of
from esvit_scale.models.drop_path import keep_scales
from esvit_scale.models.timm_parts import State, make_unit, replace
from esvit_scale.models.timm_probe import PREFIX, Probe, grid_of
from esvit_scale.models.trunk import Features, Grid, TokenMap, Trunk


class TimmTrunk(Trunk):
    """A network of timm as a trunk.

    Args:
        probe: the network's name, constructor arguments and output dimensions.
    """

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe, self.state = probe, State(self)
        self.dim, self.has_regions, self.in_chans = probe.dim, probe.has_regions, probe.in_chans
        self.channels, self.reductions = probe.channels, probe.reductions
        self.network = probe.create()
        self.network.forward = partial(timm_probe.outputs, self.network)  # as forward, so that engine hooks fire
        self.drop_rates: list[float] = []
        replace(self.network, self.state, self.drop_rates)
        self._units = timm_probe.units(self.network)
        self.depths = tuple(len(stage) for stage in self._units)
        for block in self.blocks:
            make_unit(block, self.state)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, in order."""
        return [block for stage in self._units for block in stage]

    @property
    def patch_projection(self) -> nn.Module:
        """The first layer, which `model.freeze_patch_embed` keeps at its random values."""
        return next(m for m in self.network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))

    def initial_values(self) -> dict[str, Initializer]:
        """Return an initialiser of every parameter that gives the value timm draws for it from the run's seed."""
        drawn = _Drawn(self.probe)
        return {f"network.{name}": OfSeed(partial(drawn, name)) for name, _ in self.network.named_parameters()}

    def published(self) -> PublishedWeights:
        """Return timm's pretrained weights, from its cache or, where there is a network, from its hub.

        Raises:
            UserError: timm has none, or cannot load them here.
        """
        try:
            theirs = self.probe.create(pretrained=True)
        except Exception as error:  # whatever timm and the hub's client raise
            raise UserError(
                f"{PREFIX}{self.probe.name}: timm has no pretrained weights at hand: {first_line(error)}"
            ) from None
        settings = cast(dict[str, Any], theirs.pretrained_cfg)
        tensors = {f"network.{name}": tensor for name, tensor in theirs.state_dict().items()}
        return PublishedWeights(tensors, tuple(settings["mean"]), tuple(settings["std"]))

    def card(self) -> TrunkCard:
        """Return what a model card says about the trunk."""
        return (
            super()
            .card()
            ._replace(tag=self.probe.name, input_sizes="Any other size that timm's network takes works too.")
        )

    def timm_form(self, size: int) -> TimmForm:
        """Return a description of the wrapped network by its own timm name and constructor arguments."""
        theirs = cast(dict[str, Any], self.network.pretrained_cfg)
        return TimmForm(
            self.probe.name,
            {key: value for key, value in self.probe.arguments if key != "drop_path_rate"},
            width=self.dim,
            reduction=self.reductions[-1] if self.reductions else 16,
            pool=str(getattr(self.network, "global_pool", "avg")),
            first_conv=theirs.get("first_conv", ""),
            classifier=theirs.get("classifier", ""),
            tensors=_by_timms_names,
            fixed_size=False,
        )

    def forward(self, crops: list[Tensor], drop_keys: Tensor | None = None) -> Features:
        """Compute the features of all crops (`Trunk.forward`), with one call of the network per resolution."""
        scales, first, features = None, 0, []
        if drop_keys is not None and self.drop_rates:
            scales = keep_scales(drop_keys, torch.tensor(self.drop_rates, device="cpu"))[:, 0]  # [paths, ΣB]
        self._cast_constants()
        for x in crops:
            self.state.scales = None if scales is None else scales[:, first : first + x.shape[0]]
            first += x.shape[0]
            view, cells = self.network(x.to(self._dtype))
            tokens, grid = self._tokens(cells, x) if self.has_regions else (view[:0], (x.shape[0], 0, 0))
            features.append(TokenMap(tokens, [grid], view))
        view, tokens, grids = _joined(features)
        return Features(view, tokens, grids)

    def last_blocks(self, crops: list[Tensor], n: int) -> list[TokenMap]:
        """Return the token maps of the last n blocks, in order.

        The last map is the output of `forward`. The maps of the other blocks of the last stage go through the network's
        final norm if that is a layer norm.
        """
        groups = []
        for x in crops:
            self.state.outputs = []
            features = self([x])
            before = self.state.outputs[-n:-1]
            last_stage = len(before) + 1 - self.depths[-1]
            maps = [self._block_map(out, x, i >= last_stage) for i, out in enumerate(before)]
            groups.append([*maps, TokenMap(features.regions, features.grids, features.view)])
            self.state.outputs = None
        return [TokenMap(tokens, grids, view) for view, tokens, grids in map(_joined, zip(*groups, strict=True))]

    def stage_maps(self, crops: list[Tensor]) -> list[TokenMap]:
        """Return the token map of every stage whose reduction is at least 4, before the final norm."""
        self._cast_constants()
        groups = []
        for x in crops:
            maps = timm_probe.intermediates(self.network, x.to(self._dtype))
            groups.append([TokenMap(_pixels(m), [(m.shape[0], m.shape[2], m.shape[3])]) for m in maps])
        return [TokenMap(tokens, grids) for _, tokens, grids in map(_joined, zip(*groups, strict=True))]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def _cast_constants(self) -> None:
        """Cast floating-point buffers, other than those of batch norms, to the parameters' precision, in place."""
        for module in self.network.modules():
            if not isinstance(module, BatchNorm):
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_floating_point() and buffer.dtype != self._dtype:
                        module._buffers[name] = buffer.to(self._dtype)

    def _tokens(self, cells: Tensor, x: Tensor) -> tuple[Tensor, Grid]:
        """Return the cells of images x as tokens [B·T, C], and their grid.

        `cells` are [B, T, C] (with or without prefix tokens, which are left out), [B, C, H, W] or [B, H, W, C].
        """
        height, width = x.shape[-2:]
        if cells.dim() == 3:
            for prefix in (self._prefix, 0):  # 0: XCiT's blocks run before its class token is added
                if (grid := grid_of(cells.shape[1] - prefix, height, width)) is not None:
                    return cells[:, prefix:].flatten(0, 1), (cells.shape[0], *grid)
            raise UserError(f"model.trunk: {PREFIX}{self.probe.name} gives no grid of cells at {height}×{width}")
        _, a, b, c = cells.shape
        last, first = a * width == b * height, b * width == c * height
        if self.probe.channels_last if last == first else last:
            return cells.flatten(0, 2), (cells.shape[0], a, b)
        return _pixels(cells), (cells.shape[0], b, c)

    @property
    def _prefix(self) -> int:
        """The number of prefix tokens, which come before the cells: class token and registers."""
        return int(getattr(self.network, "num_prefix_tokens", 0))

    def _block_map(self, out: Any, x: Tensor, normed: bool) -> TokenMap:
        out = out[0] if isinstance(out, (tuple, list)) else out
        norm = next((m for m in _norms(self.network) if m.normalized_shape == (self.dim,)), None)
        if normed and norm is not None and out.dim() == 3:
            out = F.layer_norm(out, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        tokens, grid = self._tokens(out, x)
        if normed and norm is not None and out.dim() == 4:
            tokens = F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        has_token = out.dim() == 3 and out.shape[1] * out.shape[0] > len(tokens)
        if has_token and getattr(self.network, "global_pool", "") == "token":
            return TokenMap(tokens, [grid], out[:, 0])
        return TokenMap(tokens, [grid], tokens.view(out.shape[0], -1, tokens.shape[1]).mean(1))


def _by_timms_names(trunk: Tensors) -> Tensors:
    return {name.removeprefix("network."): tensor for name, tensor in trunk.items()}


class _Drawn:
    """The initial values that timm draws for a network from a seed; a call returns a parameter's value and frees it."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.seed = probe, -1
        self.values: dict[str, Tensor] = {}

    def __call__(self, name: str, seed: int) -> Tensor:
        if seed != self.seed or name not in self.values:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                network = self.probe.create()
            self.values, self.seed = {n: p.detach().float() for n, p in network.named_parameters()}, seed
        return self.values.pop(name)


def build(config: Config) -> Trunk:
    """Return the timm network that `config.model.trunk` names.

    Raises:
        UserError: timm has no such network, the network does not take the crop sizes, or a setting does not apply to
            timm networks. The message is one line.
    """
    model, name = config.model, config.model.trunk.removeprefix(PREFIX)
    given = [key for key in ("embed_dim", "depths", "heads") if getattr(model, key)]
    if given:
        raise UserError(f"model.{given[0]}: {model.trunk} has widths of its own; leave it out, or take another network")
    implementation, sizes = config.train.activation_checkpointing, tuple(dict.fromkeys(config.crop_sizes))
    if implementation in ("deepspeed", "fairscale") and len(sizes) > 1:
        raise UserError(
            f"train.activation_checkpointing: {implementation}'s takes one call of a block a step, and {model.trunk} runs once a "
            f"crop size ({len(sizes)}); nearest: torch"
        )
    return TimmTrunk(_probed(name, model.drop_path, sizes, config.data.channels))


@lru_cache(maxsize=16)
def _probed(name: str, drop_path: float, sizes: tuple[int, ...], in_chans: int) -> Probe:
    refused = ""
    for candidate in timm_probe.candidates(name, sizes[0], drop_path, in_chans):
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return timm_probe.on_meta(partial(_tried, candidate, drop_path, sizes))
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                refused = refused or first_line(error)
        except UserError:
            raise
        except Exception as error:  # whatever the network raises for sizes that it does not take
            refused = refused or first_line(error)
    if not refused:
        raise UserError(f"model.drop_path: {PREFIX}{name} has no stochastic depth; set model.drop_path=0")
    shown = ", ".join(map(str, sizes))
    raise UserError(f"model.trunk: {PREFIX}{name} does not take crops of {shown} pixels: {refused}")


def _tried(candidate: Probe, drop_path: float, sizes: tuple[int, ...]) -> Probe:
    """Run a forward and a backward as in training; return the candidate with its outputs' dimensions filled in."""
    probe = timm_probe.looked_at(candidate, sizes)
    trunk = TimmTrunk(probe)
    if drop_path and not trunk.drop_rates:
        raise UserError(f"model.drop_path: {PREFIX}{probe.name} has no stochastic depth; set model.drop_path=0")
    crops = [probe.images(trunk.network, 2, size) for size in sizes]
    keys = keys_of(0, 0, torch.arange(2, device=crops[0].device), len(sizes))
    trunk(crops, keys).view.sum().backward()
    unused = [name for name, p in trunk.network.named_parameters() if p.requires_grad and p.grad is None]
    if unused:
        raise UserError(
            f"model.trunk: {PREFIX}{probe.name} does not use {unused[0]} (of {len(unused)} parameters) in a forward, and "
            "ZeRO-3 cannot train what is not used; take another network"
        )
    return probe


def _norms(network: nn.Module) -> Iterable[nn.LayerNorm]:
    owners = (network, getattr(network, "head", None))
    found = [getattr(owner, name, None) for owner in owners for name in ("norm", "fc_norm")]
    return (norm for norm in found if isinstance(norm, nn.LayerNorm))


def _joined(groups: Iterable[TokenMap]) -> tuple[Tensor, Tensor, list[Grid]]:
    """Join the token maps of all resolutions: return view features (empty if there are none), tokens and grids."""
    groups = list(groups)
    views = [group.view for group in groups if group.view is not None]
    tokens = torch.cat([group.tokens for group in groups])
    return torch.cat(views) if views else tokens[:0], tokens, [grid for group in groups for grid in group.grids]


def _pixels(maps: Tensor) -> Tensor:
    """Reshape maps [B, C, H, W] to one row per pixel, [B·H·W, C]."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
