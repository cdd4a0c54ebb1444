"""Descriptions of a Swin: as a timm network and as a transformers model for exports, and for its model card.

Both libraries shift windows before padding the map, EsViT pads first. Features therefore agree only at image sizes at
which no window is padded; an export is made for one such size.

Parameter names:

| ours | timm | transformers |
|---|---|---|
| `layers.0.downsample` | `layers.1.downsample` | `encoder.layers.0.downsample` |
| `….attn.qkv` | the same | `….attention.self.query`, `.key`, `.value` |
| `….norm1`, `….norm2` | the same | `….layernorm_before`, `….layernorm_after` |
| `patch_embed.proj`, `norm` | the same | `embeddings.patch_embeddings.projection`, `layernorm` |
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from esvit_scale.errors import UserError
from esvit_scale.models.descriptions import HuggingFaceForm, Tensors, TimmForm, TrunkCard

if TYPE_CHECKING:
    from esvit_scale.models.swin import Swin
    from esvit_scale.models.swin_v2 import SwinV2

Sizes = tuple[int, tuple[int, ...]]  # (embed_dim, depths)

# timm's registered networks by size; any other size is exported as the smallest with explicit constructor arguments.
TIMM_V1: dict[Sizes, str] = {
    (96, (2, 2, 6, 2)): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2)): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2)): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2)): "swin_large_patch4_window7_224",
}
TIMM_V2: dict[Sizes, str] = {
    (96, (2, 2, 6, 2)): "swinv2_tiny_window8_256",
    (96, (2, 2, 18, 2)): "swinv2_small_window8_256",
    (128, (2, 2, 18, 2)): "swinv2_base_window8_256",
    (192, (2, 2, 18, 2)): "swinv2_large_window12_192",
}

_HUGGING_FACE = [
    (r"^layers\.", "encoder.layers."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^norm\.", "layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
    (r"\.attn\.", ".attention.self."),
]

# The layers of a V1 whose outputs go into layer norms: the patch embedding, and all that write to the residual stream.
_INTO_NORMS = ("patch_embed.", ".attn.proj.", ".mlp.fc2.", ".downsample.reduction.")


def card(trunk: "Swin", family: str) -> TrunkCard:
    """Return what a model card says about a Swin; `family` is "Swin" or "Swin V2"."""
    depths = "-".join(map(str, trunk.depths))
    sizes = f"width {trunk.embed_dim}, depths {depths}, window {trunk.window}"
    return TrunkCard(
        "swin",
        f"{family} ({trunk.name}: {sizes})",
        "Any other size works too; windows are padded as in training.",
    )


# --- timm ------------------------------------------------------------------------------------------------------------


def timm_v1(trunk: "Swin", size: int) -> TimmForm:
    """Return a description of a Swin V1 as a timm network with norms of eps 1e-6, which is not timm's default.

    Raises:
        UserError: at `size` pixels a window needs padding, which timm does differently.
    """
    form = _timm(trunk, size, TIMM_V1)
    return form._replace(norm_eps="1e-6", note="EsViT's norms have eps 1e-6, timm's default is 1e-5.")


def timm_v2(trunk: "SwinV2", size: int) -> TimmForm:
    """Return a description of a Swin V2 as a timm network.

    Raises:
        UserError: the trunk has extra norms, which timm lacks, or a window needs padding, which timm does differently.
    """
    refuse_extra_norms(trunk, "timm")
    form = _timm(trunk, size, TIMM_V2)
    return form._replace(arguments=form.arguments | _pretrained(trunk))


def _timm(trunk: "Swin", size: int, registered: dict[Sizes, str]) -> TimmForm:
    _refuse_padded_windows(trunk, size, "timm")
    arguments = {
        "img_size": size,
        "window_size": trunk.window,
        "embed_dim": trunk.embed_dim,
        "depths": list(trunk.depths),
        "num_heads": list(trunk.heads),
    }
    smallest = next(iter(registered.values()))
    return TimmForm(
        registered.get((trunk.embed_dim, trunk.depths), smallest),
        arguments,
        width=trunk.dim,
        reduction=trunk.reductions[-1],
        pool="avg",
        first_conv="patch_embed.proj",
        classifier="head.fc",
        tensors=_timm_tensors,
        fixed_size=True,
        size_note=f"Use {size} pixels: elsewhere timm shifts windows before it pads them, EsViT after, and features "
        "differ.",
    )


def _timm_tensors(trunk: Tensors) -> Tensors:
    """Rename patch-merging tensors from the end of a stage to the start of the next stage, where timm has them."""
    move = lambda match: f"layers.{int(match[1]) + 1}.downsample."  # noqa: E731
    return {re.sub(r"^layers\.(\d+)\.downsample\.", move, name): tensor for name, tensor in trunk.items()}


# --- transformers ----------------------------------------------------------------------------------------------------


def huggingface_v1(trunk: "Swin", size: int) -> HuggingFaceForm:
    """Return a description of a Swin V1 as a transformers model.

    Tensors get the names of the published checkpoints, which every version of transformers can load.

    Some norms of transformers' Swin have a fixed eps of 1e-5, EsViT's have 1e-6. The norm of √10·x with eps 1e-5 equals
    that of x with eps 1e-6, so the config sets 1e-5 for all norms, and the weights of all layers whose outputs go into
    a norm (`_INTO_NORMS`) are stored √10 times as large.

    Raises:
        UserError: a window needs padding, which transformers does differently, or a map is smaller than the window.
    """
    _refuse_padded_windows(trunk, size, "huggingface")
    for s, stage in enumerate(trunk.stages):
        if stage.window < trunk.window:
            raise UserError(
                f"the map of stage {s + 1} ({stage.window}×{stage.window}) is smaller than the window {trunk.window}, "
                "which transformers' Swin cannot do"
            )
    return _huggingface(trunk, size, "swin", "SwinModel")._replace(
        scale=lambda name: float(10**0.5) if any(part in name for part in _INTO_NORMS) else 1.0,
        note="EsViT's norms have eps 1e-6 where some of transformers' have a fixed 1e-5. So that features are the same, "
        "whatever a norm reads is stored √10 times as large: `hidden_states` are √10 times EsViT's, features are not.",
    )


def huggingface_v2(trunk: "SwinV2", size: int) -> HuggingFaceForm:
    """Return a description of a Swin V2 as a transformers model.

    Raises:
        UserError: the trunk has extra norms, which transformers lacks, or a window needs padding, which it does
            differently.
    """
    refuse_extra_norms(trunk, "huggingface")
    _refuse_padded_windows(trunk, size, "huggingface")
    form = _huggingface(trunk, size, "swinv2", "Swinv2Model")
    return form._replace(config=form.config | _pretrained(trunk))


def _pretrained(trunk: "SwinV2") -> dict[str, list[int]]:
    """Return the argument with which timm and transformers scale distances by the windows of an earlier training."""
    return {} if trunk.pretrained_windows is None else {"pretrained_window_sizes": list(trunk.pretrained_windows)}


def _huggingface(trunk: "Swin", size: int, model_type: str, architecture: str) -> HuggingFaceForm:
    config = {
        "model_type": model_type,
        "architectures": [architecture],
        "image_size": size,
        "patch_size": trunk.reductions[0],
        "num_channels": trunk.in_chans,
        "embed_dim": trunk.embed_dim,
        "depths": list(trunk.depths),
        "num_heads": list(trunk.heads),
        "window_size": trunk.window,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "drop_path_rate": 0.0,
        "layer_norm_eps": 1e-5,  # see huggingface_v1
        "torch_dtype": "float32",
    }
    size_note = f"Use {size} pixels: elsewhere transformers shifts windows before it pads them, EsViT after, and features differ."
    return HuggingFaceForm(config, _huggingface_names, lambda name: 1.0, size_note)


def _huggingface_names(name: str) -> list[str]:
    """Return the names that transformers has for one of the trunk's tensors: one name, or three for a qkv tensor.

    transformers has separate query, key and value layers. V2's q_bias and v_bias become the biases of two of them.
    """
    for pattern, replacement in _HUGGING_FACE:
        name = re.sub(pattern, replacement, name)
    before, qkv, kind = name.partition(".self.qkv.")
    if qkv:
        return [f"{before}.self.{part}.{kind}" for part in ("query", "key", "value")]
    for ours, theirs in ((".self.q_bias", ".self.query.bias"), (".self.v_bias", ".self.value.bias")):
        name = name.replace(ours, theirs)
    return [name]


def is_huggingface(names: Mapping[str, object]) -> bool:
    """Return whether the names are those of transformers' Swin."""
    return any(name.startswith("encoder.layers.0.blocks.0.attention.self.") for name in names)


def from_huggingface(theirs: Tensors) -> Tensors:
    """Return the tensors of a Swin V1 of transformers under our names.

    Norms keep their weights: transformers' have an eps of 1e-5, ours of 1e-6.
    """
    ours: Tensors = {}
    for name, tensor in theirs.items():
        # Longest first, because one name can begin with another.
        for pattern, replacement in sorted(_HUGGING_FACE, key=lambda pair: -len(pair[1])):
            name = name.replace(replacement, pattern.replace("\\", "").removeprefix("^"))
        ours[name] = tensor
    for name in [name for name in ours if ".attn.query." in name]:
        parts = [ours.pop(name.replace(".query.", f".{part}."), None) for part in ("query", "key", "value")]
        if all(part is not None for part in parts):
            ours[name.replace(".query.", ".qkv.")] = torch.cat(parts)  # type: ignore[arg-type]
    return ours


# --- what neither library supports -----------------------------------------------------------------------------------


def refuse_extra_norms(trunk: "SwinV2", library: str) -> None:
    """Raise UserError for a Swin V2 with extra norms, which no library has."""
    if trunk.extra_norm_every:
        raise UserError(f"{library} has no {trunk.name} (its extra norms)")


def _refuse_padded_windows(trunk: "Swin", size: int, library: str) -> None:
    for s, (stage, reduction) in enumerate(zip(trunk.stages, trunk.reductions, strict=True)):
        if size % trunk.reductions[-1] or (size // reduction) % stage.window:
            raise UserError(
                f"at {size} pixels, stage {s + 1} pads its windows of {stage.window}, which {library} does otherwise"
            )
