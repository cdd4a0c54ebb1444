"""Writing the model card (README.md) of exported weights: description, code to load them, training and results."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from esvit_scale import __version__
from esvit_scale.checkpoint import card_results, libraries
from esvit_scale.checkpoint.weights import OBJECTIVE, Weights
from esvit_scale.config import Config
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective.network import build_network

_OPTIMIZER = {"adamw": "AdamW", "sgd": "SGD", "lamb": "LAMB", "lars": "LARS", "muon": "Muon"}
_LIBRARY = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx", "safetensors": "esvit-scale"}


def text(weights: Weights, network: str, form: str, source: Path, name: str) -> str:
    """Return the model card as Markdown with the header that model hubs read; omit what the source does not record."""
    config = weights.config
    with torch.device("meta"):
        network_built = build_network(config)
    trunk, of_objective = network_built.trunk, network_built.objective.card()
    of_trunk = trunk.card()
    parameters = sum(p.numel() for p in trunk.parameters())
    run = _run_of(source.resolve())
    summary = _json(run / "summary.json") if run else {}
    parts = [
        _header(config, form, of_trunk.tag),
        f"# {name if config.name in ('run', 'converted') else config.name}",
        f"A {of_trunk.description} backbone ({parameters:,} parameters), {_learned(config, of_objective.method)} with "
        f"esvit-scale {__version__}. These are the {network}'s weights"
        f"{' (an exponential moving average of the student)' if network == 'teacher' else ''}; "
        f"{_classifier(weights.networks[network])}.",
        "## Use\n\n" + _use(config, trunk, form, name),
        "## Input\n\n" + _input(config, form, of_trunk.input_sizes),
        "## Training\n\n" + _training(config, summary, source, of_objective.rows),
    ]
    results = card_results.table(run) if run else ""
    if results:
        parts.append("## Evaluation\n\n" + results)
    parts.append(
        "## Limits\n\nThe weights know what their training images showed; nothing was done against biases in them. "
        "Figures hold for the data named above, measured as this card says. The licence of the weights is their author's to state."
    )
    if of_objective.citation:
        parts.append(f"Method: {of_objective.citation}")
    return "\n\n".join(parts) + "\n"


def _learned(config: Config, method: str) -> str:
    """Return how the weights were trained, as it follows "a backbone"."""
    if classes := config.objective.classes:
        return f"fine-tuned with labels of {classes:,} classes"
    return f"pretrained without labels by {method or f'the objective {config.objective.name}'}"


def _classifier(tensors: Collection[str]) -> str:
    """Return whether weights with tensors of these names hold a classifier, as a clause."""
    there = any(name.startswith(f"{OBJECTIVE}classifier.") for name in tensors)
    return "`esvit_scale.load_classifier` also loads the classifier" if there else "there is no classifier"


def _header(config: Config, form: str, kind: str) -> str:
    learned = "fine-tuned" if config.objective.classes else "self-supervised"
    tags = "\n".join(f"- {tag}" for tag in ("image-feature-extraction", learned, config.objective.name, kind))
    return f"---\nlibrary_name: {_LIBRARY[form]}\npipeline_tag: image-feature-extraction\ntags:\n{tags}\n---"


def _use(config: Config, trunk: Trunk, form: str, name: str) -> str:
    code, note = _CODE[form](config, trunk, name)
    return f"```python\n{code}\n```" + (f"\n\n{note}" if note else "")


def _safetensors_code(config: Config, trunk: Trunk, name: str) -> tuple[str, str]:
    pyramid = "; model.pyramid(images) gives a map a stage" if trunk.reductions else ""
    return (
        f'from esvit_scale import load_backbone\n\nmodel = load_backbone("{name}")\n'
        f"features = model(images)  # [B, {config.data.channels}, H, W] → [B, C]{pyramid}",
        "",
    )


def _timm_code(config: Config, trunk: Trunk, name: str) -> tuple[str, str]:
    form, size = libraries.timm_form(config), config.data.global_crops.size
    imports, norm = "import timm\n", ""
    if form.norm_eps:
        imports = "from functools import partial\n\nimport timm\nfrom torch import nn\n"
        norm = f", norm_layer=partial(nn.LayerNorm, eps={form.norm_eps})"
    if form.imports:
        imports = f"import timm\n\nimport {form.imports}\n"
    return (
        f'{imports}\nmodel = timm.create_model("local-dir:{name}", pretrained=True{norm}).eval()\n'
        f"features = model(images)  # [B, {config.data.channels}, {size}, {size}] → [B, C]",
        form.note,
    )


def _huggingface_code(config: Config, trunk: Trunk, name: str) -> tuple[str, str]:
    return (
        "from transformers import AutoImageProcessor, AutoModel\n\n"
        f'processor, model = AutoImageProcessor.from_pretrained("{name}"), AutoModel.from_pretrained("{name}")\n'
        'features = model(**processor(image, return_tensors="pt")).pooler_output  # [B, C]',
        libraries.huggingface_form(config).note,
    )


def _onnx_code(config: Config, trunk: Trunk, name: str) -> tuple[str, str]:
    outputs, shapes = ("features, regions", "[B, C], [B, T, C]") if trunk.has_regions else ("[features]", "[B, C]")
    return (
        f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{name}/model.onnx")\n'
        f'{outputs} = session.run(None, {{"images": images}})  # float32 [B, {config.data.channels}, S, S] → {shapes}',
        "",
    )


_CODE = {
    "safetensors": _safetensors_code,
    "timm": _timm_code,
    "huggingface": _huggingface_code,
    "onnx": _onnx_code,
}  # format → function that returns example code and a note about the format


def _input(config: Config, form: str, other_sizes: str) -> str:
    size = config.data.global_crops.size
    if form == "safetensors":
        only = other_sizes
    elif form == "timm":
        only = libraries.timm_form(config).size_note
    elif form == "onnx":
        only = f"The graph is for {size} pixels, at any batch size."
    else:
        only = libraries.huggingface_form(config).size_note + (
            " Where the resized side less the crop is odd, transformers may crop one pixel beside; it neither turns pictures "
            "by their EXIF orientation nor takes 16-bit ones (it clips them): hand it 8-bit, upright pictures."
        )
    pixels = pixel_format(config.data)
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (pixels.mean, pixels.std))
    return (
        f"{'RGB' if pixels.is_rgb8 else pixels}, short side resized to {round(size * 256 / 224)} pixels (bicubic), centre crop "
        f"of {size}, divided by {pixels.largest}, then mean ({mean}) and standard deviation ({std}). {only}"
    ).rstrip()


def _data(config: Config) -> str:
    sets = [f"`{Path(mixed.urls).name}` (weight {mixed.weight:g})" for mixed in config.data.mix]
    return " and ".join(sets) or (f"`{Path(config.data.train).name}`" if config.data.train else "not recorded")


def _training(config: Config, summary: dict[str, Any], source: Path, of_objective: tuple[tuple[str, str], ...]) -> str:
    if config.name == "converted":
        return f"Converted from `{source.name}`; the file does not say how it was trained."
    train = config.train
    crops = " + ".join(
        [
            f"{config.data.global_crops.count}×{config.data.global_crops.size}",
            *(f"{g.count}×{g.size}" for g in config.data.local_crops),
        ]
    )
    rows = [
        ("data", _data(config)),
        ("length", f"{train.steps:,} steps" if train.steps else f"{train.epochs} epochs"),
        ("images seen", f"{summary['images_seen']:,}" if "images_seen" in summary else None),
        ("global batch", str(train.global_batch)),
        ("crops", crops),
        *of_objective,
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
    """Return the run dir if `source` is a run dir or one of its step folders; None for any other source."""
    candidates = (source, source.parent.parent) if source.parent.name == "checkpoints" else (source,)
    return next((folder for folder in candidates if (folder / "config.yaml").is_file()), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
