"""README.md beside exported weights: what they are, how they were trained, what they reach, how to use them."""

import json
from pathlib import Path
from typing import Any

from esvit_scale import __version__
from esvit_scale.checkpoint.weights import TRUNK, Weights
from esvit_scale.config import Config
from esvit_scale.models.registry import trunk_shape

PAPER = "https://arxiv.org/abs/2106.09785"
_LIBRARY = {"timm": "timm", "huggingface": "transformers", "onnx": "onnx", "safetensors": "esvit-scale"}


def text(weights: Weights, network: str, form: str, source: Path, name: str) -> str:
    """The card, in Markdown with the header that model hubs read. What the source does not tell is left out."""
    config = weights.config
    parameters = sum(t.numel() for n, t in weights.networks[network].items() if n.startswith(TRUNK))
    run = source if (source / "config.yaml").is_file() else None
    summary = _json(run / "summary.json") if run else {}
    parts = [
        _header(form),
        f"# {name if config.name in ('run', 'converted') else config.name}",
        f"A {_trunk_name(config)} backbone ({parameters:,} parameters), pretrained without labels by "
        f"[EsViT]({PAPER})'s {'view and region losses' if config.objective.regions else 'view loss'} with "
        f"esvit-scale {__version__}. These are the {network}'s weights"
        f"{' (an exponential moving average of the student)' if network == 'teacher' else ''}; there is no classifier.",
        "## Use\n\n" + _use(config, form, name),
        "## Input\n\n" + _input(config, form),
        "## Training\n\n" + _training(config, summary, source),
    ]
    results = _results(run) if run else ""
    if results:
        parts.append("## Evaluation\n\n" + results)
    parts.append(
        "## Limits\n\nThe weights know what their training images showed; nothing was done against biases in them. "
        "Figures hold for the data named above, measured as this card says. The licence of the weights is their author's to state.\n\n"
        "Method: Li et al., *Efficient Self-supervised Vision Transformers for Representation Learning*, ICLR 2022."
    )
    return "\n\n".join(parts) + "\n"


def _header(form: str) -> str:
    tags = "\n".join(f"- {tag}" for tag in ("image-feature-extraction", "self-supervised", "esvit", "swin"))
    return f"---\nlibrary_name: {_LIBRARY[form]}\npipeline_tag: image-feature-extraction\ntags:\n{tags}\n---"


def _trunk_name(config: Config) -> str:
    shape = trunk_shape(config)
    widths = f"width {shape.embed_dim}, depths {'-'.join(map(str, shape.depths))}"
    return f"Swin{' V2' if shape.version == 2 else ''} ({config.model.trunk}: {widths}, window {config.model.window})"


def _use(config: Config, form: str, name: str) -> str:
    size = config.data.global_crops.size
    eps = trunk_shape(config).version == 1
    code = {
        "safetensors": f'from esvit_scale import load_backbone\n\nmodel = load_backbone("{name}")\n'
        "features = model(images)  # [B, 3, H, W] → [B, C]; model.pyramid(images) gives a map a stage",
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
        'features, regions = session.run(None, {"images": images})  # float32 [B, 3, S, S] → [B, C], [B, T, C]',
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
    size = config.data.global_crops.size
    only = {
        "safetensors": "Any other size works too; windows are padded as in training.",
        "timm": f"Use {size} pixels: elsewhere timm shifts windows before it pads them, EsViT after, and features differ.",
        "huggingface": f"Use {size} pixels: elsewhere transformers shifts windows before it pads them, EsViT after, and "
        "features differ.",
        "onnx": f"The graph is for {size} pixels, at any batch size.",
    }[form]
    return (
        f"RGB, short side resized to {round(size * 256 / 224)} pixels (bicubic), centre crop of {size}, divided by 255, "
        f"then mean (0.485, 0.456, 0.406) and standard deviation (0.229, 0.224, 0.225). {only}"
    )


def _training(config: Config, summary: dict[str, Any], source: Path) -> str:
    if config.name == "converted":
        return f"Converted from `{source.name}`; the file does not say how it was trained."
    train, objective = config.train, config.objective
    crops = " + ".join(
        [f"2×{config.data.global_crops.size}", *(f"{g.count}×{g.size}" for g in config.data.local_crops)]
    )
    rows = [
        ("data", f"`{Path(config.data.train).name}`" if config.data.train else "not recorded"),
        ("length", f"{train.steps:,} steps" if train.steps else f"{train.epochs} epochs"),
        ("images seen", f"{summary['images_seen']:,}" if "images_seen" in summary else None),
        ("global batch", str(train.global_batch)),
        ("crops", crops),
        ("prototypes", f"{objective.prototypes:,}"),
        (
            "peak learning rate",
            f"{config.peak_lr:.3g} (AdamW, {config.optim.warmup_epochs:g} epochs of warm-up, cosine)",
        ),
        ("weight decay", f"{config.optim.weight_decay:g} → {config.optim.weight_decay_end:g}"),
        ("precision, seed", f"{train.precision}, {config.seed}"),
        ("started from", f"`{Path(config.model.init_from).name}`" if config.model.init_from else None),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows if value)])


def _results(run: Path) -> str:
    """Top-1 figures of the evaluations that lie in the run dir or one folder below."""
    rows = []
    for path in sorted([*run.glob("*.json"), *run.glob("*/*.json")]):
        result = _json(path)
        best = result.get("best")
        if path.name.startswith("knn") and isinstance(best, dict) and result.get("step"):
            train, test = (Path(str(result.get(split, "?"))).name for split in ("train", "test"))
            rows.append((f"k-NN, k = {best['k']}, step {result['step']}", f"{best['top1']:.1f} %", f"{train} → {test}"))
        measures = result.get("measures")
        if path.name == "correspondence.json" and isinstance(measures, dict):
            for name, found in measures.items():
                data = Path(str(result.get("data", "?"))).name if name != "stereo" else "stereo_motorcycle"
                rows.append((f"correspondence, {name}, 10 most similar", f"{found['top_accuracy']:.1f} %", data))
    if not rows:
        return ""
    return "\n".join(["| measure | | data |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
