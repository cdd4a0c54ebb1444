"""What each trunk is to timm: the registered network, its constructor's arguments, its names.

| trunk | timm | beside renaming |
|---|---|---|
| Swin V1, V2 | `swin_*`, `swinv2_*` | `layers.0.downsample` → `layers.1.downsample`; features agree at the global crops' size alone |
| deit_s, deit_b | `deit_small_patch16_224`, `deit_base_patch16_224` | positions are resized to the global crops' size |
| vit_s_moco, vit_b_moco | `vit_small_patch16_224`, `vit_base_patch16_224` | the fixed positions are written out |
| resnet50 | `resnet50` | |
| timm:<name> | the same | |
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models import vit
from esvit_scale.models.registry import SHAPES, build_trunk, trunk_shape
from esvit_scale.models.resnet import ResNet
from esvit_scale.models.swin import PATCH, stage_window
from esvit_scale.models.trunk import Trunk
from esvit_scale.models.vit import MoCoViT, ViT

OTHERS = "--to safetensors or onnx"  # which take every trunk

SWIN_NAMES: dict[
    tuple[int, int, tuple[int, ...]], str
] = {  # (version, embed_dim, depths) → the registered name; others are spelled out by arguments
    (1, 96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (1, 96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (1, 128, (2, 2, 18, 2)): "swin_base_patch4_window7_224",
    (1, 192, (2, 2, 18, 2)): "swin_large_patch4_window7_224",
    (2, 96, (2, 2, 6, 2)): "swinv2_tiny_window8_256",
    (2, 96, (2, 2, 18, 2)): "swinv2_small_window8_256",
    (2, 128, (2, 2, 18, 2)): "swinv2_base_window8_256",
    (2, 192, (2, 2, 18, 2)): "swinv2_large_window12_192",
}
SWIN_ANY = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}
VIT_NAMES = {
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "vit_s_moco": "vit_small_patch16_224",
    "vit_b_moco": "vit_base_patch16_224",
}

Tensors = dict[str, Tensor]


class Form(NamedTuple):
    architecture: str
    arguments: dict[str, Any]
    width: int  # C of the features
    reduction: int  # pixels that a cell of the last map covers
    pool: str  # timm's global_pool
    first_conv: str
    classifier: str
    tensors: Callable[[Tensors], Tensors]  # the trunk's, by timm's names
    fixed_size: bool  # features are the trunk's at the global crops' size alone


def of(config: Config) -> Form:
    """
    Raises:
        UserError: timm has no such trunk, or computes it otherwise.
    """
    if config.model.trunk in SHAPES:
        return _swin(config)
    with torch.device("meta"):
        trunk = build_trunk(config)
    if isinstance(trunk, ViT):
        return _vit(trunk, config)
    if isinstance(trunk, ResNet):
        return _resnet(trunk, config)
    if config.model.trunk.startswith("timm:"):
        return _timm(trunk)
    raise UserError(f"--to timm: timm has no {config.model.trunk}; {OTHERS} takes it")


def taken(config: Config) -> str:
    """The forms that take the config's trunk, in words."""
    try:
        of(config)
    except UserError:
        return OTHERS
    return f"--to timm, {OTHERS.removeprefix('--to ')}"


def check_windows(config: Config, form: str) -> None:
    """
    Raises:
        UserError: a Swin that the library does not have, or whose windows it would pad otherwise.
    """
    shape = trunk_shape(config)
    if shape.extra_norm_every:
        raise UserError(f"--to {form}: {form} has no {config.model.trunk} (its extra norms); {OTHERS} takes it")
    size, window = config.data.global_crops.size, config.model.window
    for s in range(len(shape.depths)):
        side, _ = stage_window(size, window, s)
        if size % (PATCH * 2 ** (len(shape.depths) - 1)) or (size // PATCH // 2**s) % side:
            raise UserError(
                f"--to {form}: at {size} pixels, stage {s + 1} pads its windows of {side}, which {form} does otherwise; "
                f"{OTHERS} takes it"
            )
        if form == "huggingface" and shape.version == 1 and side < window:
            raise UserError(
                f"--to huggingface: the map of stage {s + 1} ({side}×{side}) is smaller than the window {window}, which "
                "transformers' Swin cannot do; --to timm or onnx takes it"
            )


def _swin(config: Config) -> Form:
    check_windows(config, "timm")
    shape = trunk_shape(config)
    arguments = {
        "img_size": config.data.global_crops.size,
        "window_size": config.model.window,
        "embed_dim": shape.embed_dim,
        "depths": list(shape.depths),
        "num_heads": list(shape.heads),
    }
    return Form(
        SWIN_NAMES.get((shape.version, shape.embed_dim, shape.depths), SWIN_ANY[shape.version]),
        arguments,
        shape.widths[-1],
        PATCH * 2 ** (len(shape.depths) - 1),
        "avg",
        "patch_embed.proj",
        "head.fc",
        _swin_tensors,
        True,
    )


def _swin_tensors(trunk: Tensors) -> Tensors:
    """timm has the merging at the beginning of the next stage."""
    move = lambda match: f"layers.{int(match[1]) + 1}.downsample."  # noqa: E731
    return {re.sub(r"^layers\.(\d+)\.downsample\.", move, name): tensor for name, tensor in trunk.items()}


def _vit(trunk: ViT, config: Config) -> Form:
    size, block = config.data.global_crops.size, cast(vit.Block, trunk.blocks[0])
    if size % vit.PATCH:
        raise UserError(f"--to timm: timm pads no crop, and {size} pixels are no multiple of 16; {OTHERS} takes it")
    arguments = {
        "img_size": size,
        "embed_dim": trunk.dim,
        "depth": trunk.depths[0],
        "num_heads": block.attn.heads,
    }
    kind, side = type(trunk), size // vit.PATCH

    def tensors(trunk: Tensors) -> Tensors:
        cpu, learned = torch.device("cpu"), trunk.get("pos_embed")
        dim = trunk["cls_token"].shape[-1]
        if kind is MoCoViT:
            return trunk | {"pos_embed": vit.sine_cosine(side, side, dim, cpu)[None]}
        return trunk | {"pos_embed": vit.resized(cast(Tensor, learned)[0], side, side)[None]}

    return Form(
        VIT_NAMES[config.model.trunk],
        arguments,
        trunk.dim,
        vit.PATCH,
        "token",
        "patch_embed.proj",
        "head",
        tensors,
        True,
    )


def _resnet(trunk: ResNet, config: Config) -> Form:
    if len(trunk.depths) != 4 or trunk.channels[0] != 256:
        raise UserError(f"--to timm: timm's resnet50 has 4 stages and a stem of 64 channels; {OTHERS} takes it")
    arguments = {"layers": list(trunk.depths)}
    return Form("resnet50", arguments, trunk.dim, trunk.reductions[-1], "avg", "conv1", "fc", dict, False)


def _timm(trunk: Trunk) -> Form:
    from esvit_scale.models.timm_trunk import TimmTrunk

    probe, network = cast(TimmTrunk, trunk).probe, cast(TimmTrunk, trunk).network
    arguments = {key: value for key, value in probe.arguments if key != "drop_path_rate"}
    theirs = cast(dict[str, Any], network.pretrained_cfg)
    return Form(
        probe.name,
        arguments,
        probe.dim,
        probe.reductions[-1] if probe.reductions else 16,
        str(getattr(network, "global_pool", "avg")),
        theirs.get("first_conv", ""),
        theirs.get("classifier", ""),
        lambda tensors: {name.removeprefix("network."): tensor for name, tensor in tensors.items()},
        False,
    )
