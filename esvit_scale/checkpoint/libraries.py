"""A trunk's weights for other libraries: timm and Hugging Face transformers. Names and configs only; neither is needed
to write them.

Both shift windows before they pad where EsViT pads before it shifts, so features are the same at the size of the global
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

from esvit_scale.config import Config
from esvit_scale.data.photometric import MEAN, STD
from esvit_scale.data.stream import evaluation_side
from esvit_scale.errors import UserError
from esvit_scale.models.registry import trunk_shape
from esvit_scale.models.shape import Shape
from esvit_scale.models.swin import PATCH, stage_window

TIMM_NAMES: dict[
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
TIMM_ANY = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}
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
    shape = trunk_shape(config)
    if shape.extra_norm_every:
        raise UserError(
            f"--to {form}: {form} has no {config.model.trunk} (its extra norms); --to safetensors or onnx takes it"
        )
    size, window = config.data.global_crops.size, config.model.window
    for s in range(len(shape.depths)):
        side, _ = stage_window(size, window, s)
        if size % (PATCH * 2 ** (len(shape.depths) - 1)) or (size // PATCH // 2**s) % side:
            raise UserError(
                f"--to {form}: at {size} pixels, stage {s + 1} pads its windows of {side}, which {form} does otherwise; "
                "--to safetensors or onnx takes it"
            )
        if form == "huggingface" and shape.version == 1 and side < window:
            raise UserError(
                f"--to huggingface: the map of stage {s + 1} ({side}×{side}) is smaller than the window {window}, which "
                "transformers' Swin cannot do; --to timm or onnx takes it"
            )


def timm_config(config: Config) -> dict[str, Any]:
    """config.json, as `timm.create_model("local-dir:…")` and the Hugging Face hub read it."""
    shape, size = trunk_shape(config), config.data.global_crops.size
    name = TIMM_NAMES.get((shape.version, shape.embed_dim, shape.depths), TIMM_ANY[shape.version])
    arguments = {
        "img_size": size,
        "window_size": config.model.window,
        "embed_dim": shape.embed_dim,
        "depths": list(shape.depths),
        "num_heads": list(shape.heads),
    }
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": width(shape),
        "global_pool": "avg",
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "esvit",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_share(config),
            "crop_mode": "center",
            "mean": list(MEAN),
            "std": list(STD),
            "num_classes": 0,
            "pool_size": [side_of_map(config)] * 2,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
        },
    }


def timm_tensors(trunk: Tensors) -> Tensors:
    """timm has the merging at the beginning of the next stage."""
    move = lambda match: f"layers.{int(match[1]) + 1}.downsample."  # noqa: E731
    return {re.sub(r"^layers\.(\d+)\.downsample\.", move, name): tensor for name, tensor in trunk.items()}


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


def width(shape: Shape) -> int:
    """C of the last stage."""
    return shape.embed_dim * 2 ** (len(shape.depths) - 1)


def side_of_map(config: Config) -> int:
    """Tokens along a side of the last stage's map of a global crop."""
    return config.data.global_crops.size // (PATCH * 2 ** (len(trunk_shape(config).depths) - 1))
