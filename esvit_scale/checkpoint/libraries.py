"""A trunk's tensors and config files for other libraries: timm and Hugging Face transformers.

Every trunk describes its counterpart in these libraries itself (`Trunk.timm_form`, `Trunk.huggingface_form`); here is what
is the same for all trunks. Neither library needs to be installed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.data.photometric import MEAN, STD
from esvit_scale.data.stream import evaluation_side
from esvit_scale.errors import UserError
from esvit_scale.models.descriptions import HuggingFaceForm, TimmForm
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Trunk

Tensors = dict[str, Tensor]

OTHERS = "--to safetensors or onnx"  # the formats that can hold every trunk


def check(config: Config, form: str) -> None:
    """Raise UserError if the library of this format does not have the trunk, or would compute it otherwise."""
    {"timm": timm_form, "huggingface": huggingface_form}[form](config)


def timm_form(config: Config) -> TimmForm:
    """Return the description of the config's trunk as a network of timm.

    Raises:
        UserError: timm has no such trunk, or computes it otherwise.
    """
    try:
        form = _trunk(config).timm_form(config.data.global_crops.size)
    except UserError as error:
        raise UserError(f"--to timm: {error}; use {OTHERS}") from None
    if form is None:
        raise UserError(f"--to timm: timm has no {config.model.trunk}; use {OTHERS}")
    return form


def huggingface_form(config: Config) -> HuggingFaceForm:
    """Return the description of the config's trunk as a network of transformers.

    Raises:
        UserError: transformers has no such trunk, or computes it otherwise.
    """
    try:
        form = _trunk(config).huggingface_form(config.data.global_crops.size)
    except UserError as error:
        raise UserError(f"--to huggingface: {error}; {_takes_it(config)}") from None
    if form is None:
        raise UserError(
            f"--to huggingface: no form of {config.model.trunk} is written for transformers; {_takes_it(config)}"
        )
    return form


def _takes_it(config: Config) -> str:
    """Return, for a message, which formats other than huggingface can hold the config's trunk."""
    try:
        timm_form(config)
    except UserError:
        return f"use {OTHERS}"
    return f"use --to timm, {OTHERS.removeprefix('--to ')}"


def _trunk(config: Config) -> Trunk:
    with torch.device("meta"):
        return build_trunk(config)


def timm_config(config: Config) -> dict[str, Any]:
    """Return config.json as `timm.create_model("local-dir:…")` and the Hugging Face hub read it."""
    form, size = timm_form(config), config.data.global_crops.size
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
            "crop_pct": crop_fraction(config),
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
    """Return the trunk's tensors under timm's names."""
    return timm_form(config).tensors(trunk)


def from_timm(theirs: Tensors, trunk: Mapping[str, list[int]], config: Config) -> Tensors:
    """Undo `timm_tensors`, exactly.

    Args:
        trunk: names and shapes of the trunk's tensors.

    Raises:
        KeyError: a tensor is missing.
        UserError: the folder holds position embeddings resized for timm instead of the trunk's own.
    """
    blank = {name: torch.empty(shape, device="meta") for name, shape in trunk.items()}
    their_name = {id(tensor): name for name, tensor in timm_tensors(blank, config).items()}
    ours = {}
    for name, tensor in blank.items():
        found = theirs[their_name.get(id(tensor), name)]
        if found.shape != tensor.shape:
            raise UserError(
                f"the folder holds {name} resized for timm; give the run, or an export with --to safetensors"
            )
        ours[name] = found
    return ours


def huggingface_config(config: Config) -> dict[str, Any]:
    """Return config.json as `transformers.AutoModel` reads it."""
    return huggingface_form(config).config


def huggingface_processor(config: Config) -> dict[str, Any]:
    """Return preprocessor_config.json: the transform of evaluation, as `AutoImageProcessor` reads it.

    Pixels are equal except that crops can be shifted by one pixel: where the resized side minus the crop is odd,
    transformers rounds the offset down, torchvision and evaluation round it to the even number. Also, transformers clips
    16-bit pictures and does not turn pictures upright.
    """
    size = config.data.global_crops.size
    return {
        "image_processor_type": "BitImageProcessor",  # ConvNext's does not crop at 384 pixels and above
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
    """Return the trunk's tensors under transformers' names, some of them scaled (`HuggingFaceForm.scale`)."""
    form = huggingface_form(config)
    theirs: Tensors = {}
    for name, tensor in trunk.items():
        names = form.names(name)
        scaled = (tensor.double() * form.scale(name)).to(tensor.dtype)
        theirs |= dict(zip(names, (part.contiguous() for part in scaled.chunk(len(names))), strict=True))
    return theirs


def from_huggingface(theirs: Tensors, trunk: Mapping[str, list[int]], config: Config) -> Tensors:
    """Undo `huggingface_tensors`; exact except for fp32 rounding of tensors that were scaled.

    Args:
        trunk: names and shapes of the trunk's tensors.

    Raises:
        KeyError: a tensor is missing.
    """
    form = huggingface_form(config)
    ours: Tensors = {}
    for name in trunk:
        whole = torch.cat([theirs[part] for part in form.names(name)])
        ours[name] = (whole.double() / form.scale(name)).to(whole.dtype)
    return ours


def crop_fraction(config: Config) -> float:
    """Return the fraction of the resized short side that evaluation crops.

    It is lowered by 1e-9, because timm truncates size / fraction to an integer.
    """
    size = config.data.global_crops.size
    return size / evaluation_side(size) * (1 - 1e-9)
