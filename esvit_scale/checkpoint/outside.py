"""Reading networks that other people trained: a network of timm with a file of its weights, and folders of Hugging Face.

| source | what is read | network |
|---|---|---|
| `timm:NAME@FILE` | a file of weights as timm, OpenAI's CLIP or open_clip name them (safetensors or torch.save) | `timm:NAME` |
| `timm:NAME` | timm's published weights, if they are in this machine's Hugging Face cache | `timm:NAME` |
| `hf:FOLDER` with timm's config.json | model.safetensors or pytorch_model.bin | `timm:` and its architecture |
| `hf:FOLDER` with a CLIP of transformers | the image tower; text_tower.py reads the text tower | the same tower in timm |
| `hf:FOLDER` that `esvit-scale convert` wrote | as `exported_folder.read` does | its trunk |

Nothing is downloaded and nothing is unpickled unsafely. Every tensor of the network must be in the file with its shape;
the classifier or projection behind the features is left out. The config that comes with the weights has their image
size, mean and standard deviation.
"""

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.checkpoint import exported_folder, official, official_trunks
from esvit_scale.checkpoint.weights import TRUNK, Weights, check_shapes, shapes_of
from esvit_scale.config import Config
from esvit_scale.errors import UserError, first_line, nearest
from esvit_scale.models.registry import build_trunk

log = logging.getLogger(__name__)

TIMM, FOLDER = "timm:", "hf:"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# (width, blocks, heads, patch, image size) of CLIP's image towers → timm's name, with {} for `quickgelu_`
CLIP_TOWERS = {
    (256, 10, 4, 16, 224): "vit_xsmall_patch16_clip_{}224",
    (768, 12, 12, 32, 224): "vit_base_patch32_clip_{}224",
    (768, 12, 12, 16, 224): "vit_base_patch16_clip_{}224",
    (1024, 24, 16, 14, 224): "vit_large_patch14_clip_{}224",
    (1024, 24, 16, 14, 336): "vit_large_patch14_clip_{}336",
    (1280, 32, 16, 14, 224): "vit_huge_patch14_clip_{}224",
    (1408, 40, 16, 14, 224): "vit_giant_patch14_clip_{}224",
    (1664, 48, 16, 14, 224): "vit_gigantic_patch14_clip_{}224",
}
ACTIVATIONS = {"gelu": "", "quick_gelu": "quickgelu_"}  # of transformers' `hidden_act` → part of timm's name
# parts of transformers' names of a CLIP's image tower → timm's
CLIP_NAMES = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm": "norm_pre",
    "post_layernorm": "norm",
    "encoder.layers.": "blocks.",
    "layer_norm": "norm",
    "self_attn.out_proj": "attn.proj",
}


class Images(NamedTuple):
    """What a network expects of its images: the side in pixels, and the statistics that normalise them."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def is_outside(source: str) -> bool:
    """Return whether a source of weights is named as `timm:…` or `hf:…`, not by a path."""
    return source.startswith((TIMM, FOLDER))


def read(source: str) -> Weights:
    """Return the network that a source (`timm:NAME@FILE`, `timm:NAME` or `hf:FOLDER`) names, as a teacher.

    Raises:
        UserError: timm has no such network, the weights are not on this machine, they are of another architecture, or
            the folder holds no network that can be read.
    """
    if source.startswith(FOLDER):
        return _read_folder(folder_of(source))
    name, _, file = source.removeprefix(TIMM).partition("@")
    images = _images_of_timm(name)
    return _of_timm(name, Path(file).expanduser() if file else _cached_file(name), images)


def folder_of(source: str) -> Path:
    """Return the folder that `hf:FOLDER` names."""
    return Path(source.removeprefix(FOLDER)).expanduser()


def is_clip(folder: Path) -> bool:
    """Return whether a folder holds a CLIP of transformers, which has an image and a text tower."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") == "clip"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UserError: the file cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with the settings of a network")
    return content


def weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder of Hugging Face.

    Raises:
        UserError: there is none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has a config.json but no weights ({' or '.join(WEIGHT_FILES)})")


# --- folders ---------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Weights:
    if not folder.is_dir():
        raise UserError(f"{FOLDER}{folder}: no such folder; give one with config.json and {WEIGHT_FILES[0]}")
    if (folder / exported_folder.ORIGIN_FILE).is_file():
        return exported_folder.read(folder)
    if not (folder / "config.json").is_file():
        if (folder / "open_clip_config.json").is_file():
            raise UserError(
                f"{folder}: a folder of open_clip; name timm's network and the file: "
                f"{TIMM}vit_base_patch32_clip_224@{folder / 'open_clip_model.safetensors'}"
            )
        raise UserError(f"{folder}: has no config.json; give a folder as timm or transformers' CLIP saves it")
    about = read_json(folder / "config.json")
    if "architecture" in about:
        return _read_timm_folder(folder, about)
    if about.get("model_type") == "clip":
        return _read_clip(folder, about)
    raise UserError(
        f"{folder / 'config.json'}: a network of type {about.get('model_type', 'unknown')!r}; can be read: clip of "
        f"transformers, or a folder of timm (with an architecture). For others, give {TIMM}NAME@FILE"
    )


def _read_timm_folder(folder: Path, about: dict[str, Any]) -> Weights:
    name = str(about["architecture"])
    images, theirs = _images_of_timm(name), about.get("pretrained_cfg", {})
    size = int((theirs.get("input_size") or (3, images.size))[1])
    found = Images(size, tuple(theirs.get("mean", images.mean)), tuple(theirs.get("std", images.std)))
    path, network = weights_in(folder), _network(_config(name, found))
    for key, value in (about.get("model_args") or {}).items():
        # timm also records arguments that are as in the plain network, such as its pooling.
        if key not in ("img_size", "num_classes") and getattr(network, key, None) != value:
            raise UserError(
                f"{folder / 'config.json'}: model_args: {key} cannot be set here; a plain {name} can be read"
            )
    return _of_timm(name, path, found)


def _read_clip(folder: Path, about: dict[str, Any]) -> Weights:
    vision = {"hidden_act": "quick_gelu", "image_size": 224, "patch_size": 32} | about.get("vision_config", {})
    vision = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12} | vision
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    shape = tuple(vision[key] for key in keys)
    name, act = CLIP_TOWERS.get(shape), ACTIVATIONS.get(vision["hidden_act"])
    if name is None or act is None:
        likest = min(CLIP_TOWERS, key=lambda known: sum(a != b for a, b in zip(known, shape, strict=True)))
        raise UserError(
            f"{folder / 'config.json'}: vision_config: no known image tower of CLIP "
            f"({', '.join(f'{key} {value}' for key, value in zip(keys, shape, strict=True))}, {vision['hidden_act']}); "
            f"nearest: {', '.join(map(str, likest))} with gelu or quick_gelu"
        )
    file = folder / "preprocessor_config.json"
    pixels = read_json(file) if file.is_file() else {}
    images = Images(shape[-1], tuple(pixels.get("image_mean", CLIP_MEAN)), tuple(pixels.get("image_std", CLIP_STD)))
    path = weights_in(folder)
    config = _config(name.format(act), images)
    return _checked(path, config, clip_to_timm(official.read_network(path)))


def clip_to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the image tower of a CLIP of transformers under timm's names: queries, keys and values become one matrix.

    Args:
        tensors: the CLIP's tensors; those of the text tower and the projections are left out.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not name.startswith("vision_model.") or name.endswith("position_ids"):
            continue
        name = name.removeprefix("vision_model.")
        for theirs, timms in CLIP_NAMES.items():
            name = name.replace(theirs, timms)
        found[name] = tensor
    if "cls_token" in found and "pos_embed" in found:
        found["cls_token"], found["pos_embed"] = found["cls_token"].view(1, 1, -1), found["pos_embed"][None]
    for query in [name for name in found if ".self_attn.q_proj." in name]:
        parts = [found.pop(query.replace("q_proj", f"{part}_proj"), None) for part in "qkv"]
        if all(part is not None for part in parts):
            found[query.replace("self_attn.q_proj", "attn.qkv")] = torch.cat([p for p in parts if p is not None])
    return found


# --- timm ------------------------------------------------------------------------------------------------------------


def _images_of_timm(name: str) -> Images:
    """Return what timm's metadata say of the images of a network; print timm's note about its weights if there is one.

    Raises:
        UserError: timm has no network of this name, or no such weights of it.
    """
    import timm

    bare, _, tag = name.partition(".")
    if not timm.is_model(bare):
        close = nearest(bare, timm.list_models())
        raise UserError(f"{TIMM}{name}: timm has no network {bare!r}{close if 'did you mean' in close else ''}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{bare}.*")]
    if tag and tag not in tags:
        raise UserError(f"{TIMM}{name}: timm knows no weights {tag!r} of {bare}{nearest(tag, tags)}")
    about = timm.models.get_pretrained_cfg(name)
    if about is None:
        return Images(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if tag and about.notes:
        log.warning("%s%s: timm's note: %s", TIMM, name, "; ".join(about.notes))
    return Images(about.input_size[1], tuple(about.mean), tuple(about.std))


def _cached_file(name: str) -> Path:
    """Return the file of timm's published weights in the Hugging Face cache of this machine.

    Raises:
        UserError: it is not there; the message says how to bring it.
    """
    import timm
    from huggingface_hub import try_to_load_from_cache

    about = timm.models.get_pretrained_cfg(name)
    repository = about.hf_hub_id if about is not None else None
    if not repository:
        raise UserError(f"{TIMM}{name}: timm publishes no weights of it; name a file: {TIMM}{name}@FILE.safetensors")
    for file in WEIGHT_FILES:
        found = try_to_load_from_cache(repository, about.hf_hub_filename or file)
        if isinstance(found, str):
            return Path(found)
    raise UserError(
        f"{TIMM}{name}: its weights are not on this machine and nothing is downloaded; fetch them with `hf download "
        f"{repository}`, or name a file: {TIMM}{name}@FILE.safetensors"
    )


def _of_timm(name: str, path: Path, images: Images) -> Weights:
    """Return the weights of a timm network from a file, renamed by timm's own function for files of other projects."""
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file of weights' if path.is_dir() else 'no such file'}")
    tensors = official.read_network(path)
    config = _config(name, images)
    network = _network(config)
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        try:
            tensors = rename(dict(tensors), network)
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: no weights of {TIMM}{name}: {first_line(error)}") from None
    return _checked(path, config, tensors)


def _network(config: Config) -> Any:
    """Return timm's network of a config, on the meta device."""
    with torch.device("meta"):
        trunk: Any = build_trunk(config)
    return trunk.network


def _checked(path: Path, config: Config, tensors: dict[str, Tensor]) -> Weights:
    """Return tensors under timm's names as weights, without the classifier.

    Raises:
        UserError: tensors are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        trunk: Any = build_trunk(config)
    wanted = shapes_of(trunk)
    heads = trunk.network.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    found = {f"network.{n}": t for n, t in tensors.items() if not n.endswith(official_trunks.DERIVED)}
    found = {n: t for n, t in found.items() if n in wanted or not n.removeprefix("network.").startswith(heads)}
    missing = [n.removeprefix("network.") for n in wanted if n not in found]
    if len(missing) > len(wanted) / 2:
        raise UserError(
            f"{path}: no weights of {config.model.trunk}: it lacks {missing[0]} and {len(missing) - 1} more tensors; "
            f"it has {', '.join(list(tensors)[:3]) or 'none'}{_family_hint(tensors)}"
        )
    check_shapes(path, {name: list(tensor.shape) for name, tensor in found.items()}, wanted)
    return Weights(config, {"teacher": {TRUNK + n: t.detach().float().contiguous() for n, t in found.items()}}, {})


def _family_hint(tensors: dict[str, Tensor]) -> str:
    """Return where to give the file instead, if it is a trunk that can be read without `timm:`."""
    known = next((family.name for family in official_trunks.FAMILIES if family.signature in tensors), None)
    return f"; it looks like a {known}, whose file is given without {TIMM}NAME@" if known else ""


def _config(name: str, images: Images) -> Config:
    values = {
        "name": re.sub(r"[^A-Za-z0-9._-]", "-", name),
        "model": {"trunk": f"{TIMM}{name}", "drop_path": 0.0},
        "data": {
            "global_crops": {"size": images.size},
            "local_crops": [],
            "mean": list(images.mean),
            "std": list(images.std),
        },
    }
    return configs.validate(values, where=f"{TIMM}{name}")
