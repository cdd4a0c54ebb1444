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
from collections.abc import Mapping
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
            "input_size": [config.data.channels, size, size],
            "fixed_input_size": form.fixed_size,
            "interpolation": "bicubic",
            "crop_pct": crop_share(config),
            "crop_mode": "center",
            "mean": list(config.data.mean or MEAN),
            "std": list(config.data.std or STD),
            "num_classes": 0,
            "pool_size": [-(-size // form.reduction)] * 2,
            "first_conv": form.first_conv,
            "classifier": form.classifier,
        },
    }


def timm_tensors(trunk: Tensors, config: Config) -> Tensors:
    return timm_form.of(config).tensors(trunk)


def from_timm(theirs: Tensors, trunk: Mapping[str, list[int]], config: Config) -> Tensors:
    """Undo `timm_tensors`, exactly.

    Args:
        trunk: names and shapes of the trunk's tensors.

    Raises:
        KeyError: a tensor is missing.
        UserError: positions were resized for timm, so that the trunk's own are not in the folder.
    """
    blank = {name: torch.empty(shape, device="meta") for name, shape in trunk.items()}
    their_name = {id(tensor): name for name, tensor in timm_tensors(blank, config).items()}
    ours = {}
    for name, tensor in blank.items():
        found = theirs[their_name.get(id(tensor), name)]
        if found.shape != tensor.shape:
            raise UserError(f"the folder holds {name} resized for timm; give the run, or --to safetensors of it")
        ours[name] = found
    return ours


def huggingface_config(config: Config) -> dict[str, Any]:
    shape = trunk_shape(config)
    return {
        "model_type": "swin" if shape.version == 1 else "swinv2",
        "architectures": ["SwinModel" if shape.version == 1 else "Swinv2Model"],
        "image_size": config.data.global_crops.size,
        "patch_size": PATCH,
        "num_channels": config.data.channels,
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
    """Return preprocessor_config.json: the transform of evaluation, as `AutoImageProcessor` reads it.

    Pixels are equal but for the crop's place: where the resized side less the crop is odd, the middle is half a pixel off
    the grid; transformers always rounds it down, torchvision and evaluation to the even number, so that their crops can
    be one pixel apart. 16-bit pictures transformers clips; it does not turn pictures upright either.
    """
    size = config.data.global_crops.size
    return {
        "image_processor_type": "BitImageProcessor",  # not ConvNext's, which squashes pictures at 384 pixels and above
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": evaluation_side(size)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / ((1 << config.data.bits) - 1),
        "do_normalize": True,
        "image_mean": list(config.data.mean or MEAN),
        "image_std": list(config.data.std or STD),
    }


def huggingface_tensors(trunk: Tensors, config: Config) -> Tensors:
    """Return the trunk's tensors under the names of the published checkpoints, which every version of transformers reads.

    transformers' Swin has a fixed eps of 1e-5 in some norms where EsViT has 1e-6. A norm of √10·x with eps 1e-5 is that of
    x with 1e-6: so its config says 1e-5 for all, and whatever writes what they read (`_INTO_NORMS`) is scaled by √10.
    """
    theirs: Tensors = {}
    for name, tensor in trunk.items():
        names = _huggingface_names(name)
        scaled = (tensor.double() * _huggingface_scale(name, config)).to(tensor.dtype)
        theirs |= dict(zip(names, (part.contiguous() for part in scaled.chunk(len(names))), strict=True))
    return theirs


def from_huggingface(theirs: Tensors, trunk: Mapping[str, list[int]], config: Config) -> Tensors:
    """Undo `huggingface_tensors`, to a rounding of fp32 where it scaled.

    Args:
        trunk: names and shapes of the trunk's tensors.

    Raises:
        KeyError: a tensor is missing.
    """
    ours: Tensors = {}
    for name in trunk:
        whole = torch.cat([theirs[part] for part in _huggingface_names(name)])
        ours[name] = (whole.double() / _huggingface_scale(name, config)).to(whole.dtype)
    return ours


def _huggingface_scale(name: str, config: Config) -> float:
    scaled = trunk_shape(config).version == 1 and any(part in name for part in _INTO_NORMS)
    return float(10**0.5) if scaled else 1.0


def _huggingface_names(name: str) -> list[str]:
    """transformers' name of a tensor; three for qkv, which it keeps apart. Swin V2's query and value biases are its
    layers' own."""
    for pattern, replacement in _HUGGING_FACE:
        name = re.sub(pattern, replacement, name)
    before, qkv, kind = name.partition(".self.qkv.")
    if qkv:
        return [f"{before}.self.{part}.{kind}" for part in ("query", "key", "value")]
    for ours, theirs in ((".self.q_bias", ".self.query.bias"), (".self.v_bias", ".self.value.bias")):
        name = name.replace(ours, theirs)
    return [name]


def crop_share(config: Config) -> float:
    """Return the share of the resized short side that evaluation crops; a hair less, since timm cuts size / share to an
    integer."""
    size = config.data.global_crops.size
    return size / evaluation_side(size) * (1 - 1e-9)
