"""README.md beside exported weights: what they are, how they were trained, what they reach, how to use them."""

import json
from pathlib import Path
from typing import Any

import torch

from esvit_scale import __version__
from esvit_scale.checkpoint import card_results
from esvit_scale.checkpoint.weights import Weights
from esvit_scale.config import Config
from esvit_scale.models.registry import SHAPES, build_trunk, trunk_shape
from esvit_scale.models.trunk import Trunk

PAPER = "https://arxiv.org/abs/2106.09785"
_OPTIMIZER = {"adamw": "AdamW", "sgd": "SGD", "lamb": "LAMB", "lars": "LARS"}
_LIBRARY = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx", "safetensors": "esvit-scale"}


def text(weights: Weights, network: str, form: str, source: Path, name: str) -> str:
    """The card, in Markdown with the header that model hubs read. What the source does not tell is left out."""
    config = weights.config
    with torch.device("meta"):
        trunk = build_trunk(config)
    parameters = sum(p.numel() for p in trunk.parameters())
    run = _run_of(source.resolve())
    summary = _json(run / "summary.json") if run else {}
    parts = [
        _header(config, form),
        f"# {name if config.name in ('run', 'converted') else config.name}",
        f"A {_trunk_name(config, trunk)} backbone ({parameters:,} parameters), pretrained without labels by "
        f"{_objective(config)} with esvit-scale {__version__}. These are the {network}'s weights"
        f"{' (an exponential moving average of the student)' if network == 'teacher' else ''}; there is no classifier.",
        "## Use\n\n" + _use(config, trunk, form, name),
        "## Input\n\n" + _input(config, form),
        "## Training\n\n" + _training(config, summary, source),
    ]
    results = card_results.table(run) if run else ""
    if results:
        parts.append("## Evaluation\n\n" + results)
    parts.append(
        "## Limits\n\nThe weights know what their training images showed; nothing was done against biases in them. "
        "Figures hold for the data named above, measured as this card says. The licence of the weights is their author's to state."
    )
    if config.objective.name == "esvit":
        parts.append(
            "Method: Li et al., *Efficient Self-supervised Vision Transformers for Representation Learning*, ICLR 2022."
        )
    return "\n\n".join(parts) + "\n"


def _header(config: Config, form: str) -> str:
    kind = "swin" if config.model.trunk in SHAPES else config.model.trunk.removeprefix("timm:")
    tags = "\n".join(f"- {tag}" for tag in ("image-feature-extraction", "self-supervised", config.objective.name, kind))
    return f"---\nlibrary_name: {_LIBRARY[form]}\npipeline_tag: image-feature-extraction\ntags:\n{tags}\n---"


def _objective(config: Config) -> str:
    if config.objective.name != "esvit":
        return f"the objective {config.objective.name}"
    return f"[EsViT]({PAPER})'s {'view and region losses' if config.objective.regions else 'view loss'}"


def _trunk_name(config: Config, trunk: Trunk) -> str:
    if config.model.trunk not in SHAPES:
        depths = "-".join(map(str, trunk.depths))
        return f"{config.model.trunk} (features of width {trunk.dim}, {depths} blocks)"
    shape = trunk_shape(config)
    widths = f"width {shape.embed_dim}, depths {'-'.join(map(str, shape.depths))}"
    return f"Swin{' V2' if shape.version == 2 else ''} ({config.model.trunk}: {widths}, window {config.model.window})"


def _use(config: Config, trunk: Trunk, form: str, name: str) -> str:
    size = config.data.global_crops.size
    eps = config.model.trunk in SHAPES and trunk_shape(config).version == 1
    pyramid = "; model.pyramid(images) gives a map a stage" if trunk.reductions else ""
    graph = ("features, regions", "[B, C], [B, T, C]") if trunk.has_regions else ("[features]", "[B, C]")
    code = {
        "safetensors": f'from esvit_scale import load_backbone\n\nmodel = load_backbone("{name}")\n'
        f"features = model(images)  # [B, 3, H, W] → [B, C]{pyramid}",
        "timm": ("from functools import partial\n\n" if eps else "")
        + "import timm\n"
        + ("from torch import nn\n" if eps else "")
        + f'\nmodel = timm.create_model("local-dir:{name}", pretrained=True'
        + (", norm_layer=partial(nn.LayerNorm, eps=1e-6)" if eps else "")
        + f").eval()\nfeatures = model(images)  # [B, 3, {size}, {size}] → [B, C]",
        "huggingface": "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'processor, model = AutoImageProcessor.from_pretrained("{name}"), AutoModel.from_pretrained("{name}")\n'
        'features = model(**processor(image, return_tensors="pt")).pooler_output  # [B, C]',
        "onnx": f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}/model.onnx")\n'
        f'{graph[0]} = session.run(None, {{"images": images}})  # float32 [B, 3, S, S] → {graph[1]}',
    }[form]
    notes = {
        "timm": "EsViT's norms have eps 1e-6, timm's default is 1e-5. " if eps else "",
        "huggingface": "EsViT's norms have eps 1e-6 where some of transformers' have a fixed 1e-5. So that features are the "
        "same, whatever a norm reads is stored √10 times as large: `hidden_states` are √10 times EsViT's, features are not."
        if eps
        else "",
    }.get(form, "")
    return f"```python\n{code}\n```" + (f"\n\n{notes.strip()}" if notes else "")


def _input(config: Config, form: str) -> str:
    size, swin = config.data.global_crops.size, config.model.trunk in SHAPES
    theirs = config.model.trunk.startswith("timm:")
    only = {
        "safetensors": "Any other size that timm's network takes works too."
        if theirs
        else f"Any other size works too{'; windows are padded as in training' if swin else ''}.",
        "timm": f"Use {size} pixels: elsewhere timm shifts windows before it pads them, EsViT after, and features differ."
        if swin
        else "",
        "huggingface": f"Use {size} pixels: elsewhere transformers shifts windows before it pads them, EsViT after, and "
        "features differ.",
        "onnx": f"The graph is for {size} pixels, at any batch size.",
    }[form]
    if form == "huggingface":
        only += (
            " Where the resized side less the crop is odd, transformers may crop one pixel beside; it neither turns pictures "
            "by their EXIF orientation nor takes 16-bit ones (it clips them): hand it 8-bit, upright pictures."
        )
    return (
        f"RGB, short side resized to {round(size * 256 / 224)} pixels (bicubic), centre crop of {size}, divided by 255, "
        f"then mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225). {only}"
    ).rstrip()


def _data(config: Config) -> str:
    sets = [f"`{Path(mixed.urls).name}` (weight {mixed.weight:g})" for mixed in config.data.mix]
    return " and ".join(sets) or (f"`{Path(config.data.train).name}`" if config.data.train else "not recorded")


def _training(config: Config, summary: dict[str, Any], source: Path) -> str:
    if config.name == "converted":
        return f"Converted from `{source.name}`; the file does not say how it was trained."
    train, objective = config.train, config.objective
    crops = " + ".join(
        [f"2×{config.data.global_crops.size}", *(f"{g.count}×{g.size}" for g in config.data.local_crops)]
    )
    rows = [
        ("data", _data(config)),
        ("length", f"{train.steps:,} steps" if train.steps else f"{train.epochs} epochs"),
        ("images seen", f"{summary['images_seen']:,}" if "images_seen" in summary else None),
        ("global batch", str(train.global_batch)),
        ("crops", crops),
        ("prototypes", f"{objective.prototypes:,}" if objective.name in ("esvit", "dino", "swav") else None),
        (
            "peak learning rate",
            f"{config.peak_lr:.3g} ({_OPTIMIZER.get(config.optim.name, config.optim.name)}, {config.optim.warmup_epochs:g} epochs of warm-up, cosine)",
        ),
        ("weight decay", f"{config.optim.weight_decay:g} → {config.optim.weight_decay_end:g}"),
        ("precision, seed", f"{train.precision}, {config.seed}"),
        ("started from", f"`{Path(config.model.init_from).name}`" if config.model.init_from else None),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows if value)])


def _run_of(source: Path) -> Path | None:
    """The run dir that weights came from: itself, or the one of a step folder; None for files and single folders."""
    candidates = (source, source.parent.parent) if source.parent.name == "checkpoints" else (source,)
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
