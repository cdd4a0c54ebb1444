"""Converting a trunk's tensors and config to and from the formats of other libraries.

How a trunk maps to a model of these libraries is defined by the trunk (`Trunk.timm_form`, `Trunk.huggingface_form`,
`Trunk.detector_form`);
this module holds the code that all trunks share. None of the libraries needs to be installed.
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

OTHERS = "--to safetensors or onnx"  # for messages: the formats that can hold every trunk


def check(config: Config, form: str) -> None:
    """Raise UserError if the library (`form`) lacks the config's trunk, or would compute other features with it."""
    {"timm": timm_form, "huggingface": huggingface_form}[form](config)


def timm_form(config: Config) -> TimmForm:
    """Return how the config's trunk maps to a model of timm.

    Raises:
        UserError: timm has no such trunk, or would compute other features with it.
    """
    try:
        form = _trunk(config).timm_form(config.data.global_crops.size)
    except UserError as error:
        raise UserError(f"--to timm: {error}; use {OTHERS}") from None
    if form is None:
        raise UserError(f"--to timm: timm has no {config.model.trunk}; use {OTHERS}")
    return form


def huggingface_form(config: Config) -> HuggingFaceForm:
    """Return how the config's trunk maps to a model of transformers.

    Raises:
        UserError: transformers has no such trunk, or would compute other features with it.
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


def detector_content(config: Config, library: str, trunk: Tensors) -> dict[str, Any]:
    """Return the content of a .pth file with which a detection library starts its Swin from a trunk.

    Raises:
        UserError: the library lacks the trunk, or would compute other features with it.
    """
    try:
        form = _trunk(config).detector_form(library)
    except UserError as error:
        raise UserError(f"--to {library}: {error}; use load_backbone(…).pyramid as the backbone") from None
    if form is None:
        raise UserError(
            f"--to {library}: no form of {config.model.trunk} is written for it; use load_backbone(…).pyramid as the backbone"
        )
    return form.content({name: tensor.contiguous() for name, tensor in form.tensors(trunk).items()})


def _takes_it(config: Config) -> str:
    """Return the advice for an error message: the formats other than huggingface that can hold the config's trunk."""
    try:
        timm_form(config)
    except UserError:
        return f"use {OTHERS}"
    return f"use --to timm, {OTHERS.removeprefix('--to ')}"


def _trunk(config: Config) -> Trunk:
    with torch.device("meta"):
        return build_trunk(config)


def timm_config(config: Config) -> dict[str, Any]:
    """Return the content of config.json for `timm.create_model("local-dir:…")` and the Hugging Face hub."""
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
    """Return the trunk's tensors (our names) under the names that timm uses."""
    return timm_form(config).tensors(trunk)


def from_timm(theirs: Tensors, trunk: Mapping[str, list[int]], config: Config) -> Tensors:
    """Return tensors with timm's names under our names: the inverse of `timm_tensors`, exact in the features they give.

    Args:
        theirs: tensors under timm's names.
        trunk: our names of the trunk's tensors, with their shapes.

    Raises:
        KeyError: a tensor is missing.
        UserError: a tensor has another shape, because its position embeddings were resized for timm.
    """
    theirs = timm_form(config).from_tensors(theirs)
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
    """Return the content of config.json for `transformers.AutoModel`."""
    return huggingface_form(config).config


def huggingface_processor(config: Config) -> dict[str, Any]:
    """Return the content of preprocessor_config.json: the evaluation transform, for `transformers.AutoImageProcessor`.

    The transform of transformers differs from our evaluation transform in three cases:

    - Its centre crop can be shifted by one pixel: if the resized side minus the crop is odd, transformers rounds the
      offset down, while torchvision and our evaluation round to even.
    - It clips 16-bit images.
    - It ignores the EXIF orientation.
    """
    size = config.data.global_crops.size
    return {
        "image_processor_type": "BitImageProcessor",  # ConvNextImageProcessor does not crop at 384 pixels and above
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
    """Return the trunk's tensors under the names of transformers, split and scaled as `HuggingFaceForm` says."""
    form = huggingface_form(config)
    theirs: Tensors = {}
    for name, tensor in trunk.items():
        names = form.names(name)
        scaled = (tensor.double() * form.scale(name)).to(tensor.dtype)
        theirs |= dict(zip(names, (part.contiguous() for part in scaled.chunk(len(names))), strict=True))
    return theirs


def from_huggingface(theirs: Tensors, trunk: Mapping[str, list[int]], config: Config) -> Tensors:
    """Return tensors with transformers' names under our names: the inverse of `huggingface_tensors`.

    The result is exact except for the fp32 rounding of tensors that were scaled.

    Args:
        theirs: tensors under transformers' names.
        trunk: our names of the trunk's tensors, with their shapes.

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
    """Return crop side / resized short side of the evaluation transform, for timm's `crop_pct`.

    The fraction is lowered by a factor of 1 − 1e-9, because timm truncates size / fraction to an integer.
    """
    size = config.data.global_crops.size
    return size / evaluation_side(size) * (1 - 1e-9)
