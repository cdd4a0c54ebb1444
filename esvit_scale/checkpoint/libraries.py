"""A trunk's weights for other libraries: timm (what of it each trunk is: timm_form.py) and, for Swin, Hugging Face
transformers. Names and configs only; neither is needed to write them.

For Swin, both shift windows before they pad where EsViT pads before it shifts, so features are the same at the size of the global
crops, where no window is padded, and not elsewhere.

| ours | timm | transformers |
|---|---|---|
| `layers.0.downsample` | `layers.1.downsample` | `encoder.layers.0.downsample` |
| `….attn.qkv` | the same | `….attention.self.query`, `.key`, `.value` |
| `….norm1`, `….norm2` | the same | `….layernorm_before`, `….layernorm_after` |
| `patch_embed.proj`, `norm` | the same | `embeddings.patch_embeddings.projection`, `layernorm` |
"""

import re
from typing import Any

import torch
from torch import Tensor

from esvit_scale.checkpoint import timm_form
from esvit_scale.checkpoint.timm_form import check_windows
from esvit_scale.config import Config
from esvit_scale.data.photometric import MEAN, STD
from esvit_scale.data.stream import evaluation_side
from esvit_scale.errors import UserError
from esvit_scale.models.registry import SHAPES, trunk_shape
from esvit_scale.models.swin import PATCH

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

# Of Swin V1: the patch embedding, which its norm reads, and what writes into the stream that all other norms read.
_INTO_NORMS = ("patch_embed.", ".attn.proj.", ".mlp.fc2.", ".downsample.reduction.")

Tensors = dict[str, Tensor]


def check(config: Config, form: str) -> None:
    """
    Raises:
        UserError: a trunk that the library does not have, or would compute otherwise.
    """
    if form == "timm":
        timm_form.of(config)
    elif config.model.trunk not in SHAPES:
        raise UserError(
            f"--to huggingface: Swin alone is written for transformers, not {config.model.trunk}; "
            f"{timm_form.taken(config)} takes it"
        )
    else:
        check_windows(config, form)


def timm_config(config: Config) -> dict[str, Any]:
    """config.json, as `timm.create_model("local-dir:…")` and the Hugging Face hub read it."""
    form, size = timm_form.of(config), config.data.global_crops.size
    return {
        "architecture": form.architecture,
        "num_classes": 0,
        "num_features": form.width,
        "global_pool": form.pool,
        "model_args": form.arguments,
        "pretrained_cfg": {
            "tag": "esvit",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": form.fixed_size,
            "interpolation": "bicubic",
            "crop_pct": crop_share(config),
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            "pool_size": [-(-size // form.reduction)] * 2,
            "first_conv": form.first_conv,
            "classifier": form.classifier,
        },
    }


def timm_tensors(trunk: Tensors, config: Config) -> Tensors:
    return timm_form.of(config).tensors(trunk)


def huggingface_config(config: Config) -> dict[str, Any]:
    shape = trunk_shape(config)
    return {
        "model_type": "swin" if shape.version == 1 else "swinv2",
        "architectures": ["SwinModel" if shape.version == 1 else "Swinv2Model"],
        "image_size": config.data.global_crops.size,
        "patch_size": PATCH,
        "num_channels": 3,
        "embed_dim": shape.embed_dim,
        "depths": list(shape.depths),
        "num_heads": list(shape.heads),
        "window_size": config.model.window,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "hidden_act": "gelu",
        "drop_path_rate": 0.0,
        "layer_norm_eps": 1e-5,  # see huggingface_tensors
        "torch_dtype": "float32",
    }


def huggingface_processor(config: Config) -> dict[str, Any]:
    """preprocessor_config.json: the transform of evaluation, as `AutoImageProcessor` reads it."""
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": config.data.global_crops.size},
        "crop_pct": crop_share(config),
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def huggingface_tensors(trunk: Tensors, config: Config) -> Tensors:
    """The names of the published checkpoints, which every version of transformers reads.

    transformers' Swin has a fixed eps of 1e-5 in some norms where EsViT has 1e-6. A norm of √10·x with eps 1e-5 is that of
    x with 1e-6: so its config says 1e-5 for all, and whatever writes what they read (`_INTO_NORMS`) is scaled by √10.
    """
    theirs: Tensors = {}
    scaled = _INTO_NORMS if trunk_shape(config).version == 1 else ()
    for name, tensor in trunk.items():
        if any(part in name for part in scaled):
            tensor = (tensor.double() * 10**0.5).to(tensor.dtype)
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        theirs |= _split(name, tensor)
    return theirs


def _split(name: str, tensor: Tensor) -> Tensors:
    """qkv into three; Swin V2's query and value biases to their layers."""
    before, qkv, kind = name.partition(".self.qkv.")
    if qkv:
        parts = zip(("query", "key", "value"), torch.chunk(tensor, 3), strict=True)
        return {f"{before}.self.{part}.{kind}": piece.contiguous() for part, piece in parts}
    before, bias, _ = name.partition("_bias")
    if bias and before.endswith((".self.q", ".self.v")):
        return {
            f"{before.removesuffix('.q').removesuffix('.v')}.{'query' if before[-1] == 'q' else 'value'}.bias": tensor
        }
    return {name: tensor}


def crop_share(config: Config) -> float:
    """What evaluation crops of the resized short side; a hair less, since both libraries cut size / share to an integer."""
    size = config.data.global_crops.size
    return size / evaluation_side(size) * (1 - 1e-9)
