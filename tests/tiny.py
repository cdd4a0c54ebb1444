"""A run so small that it trains in seconds, on real files: shared by the tests of parallel/, checkpoint/ and train/."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data.shard_writer import Sample, write_samples

VALUES: dict[str, Any] = {
    "name": "tiny",
    "data": {"workers": 0, "global_crops": {"size": 32}, "local_crops": [{"size": 16, "count": 4}]},
    "model": {"embed_dim": 16, "depths": [1, 1, 2], "heads": [1, 2, 4], "window": 4},
    "objective": {"prototypes": 64, "head_hidden": 32, "bottleneck": 16},
    # A short warm-up, a rate and a clip at which everything moves; epoch 0 (4 steps) has the last layer frozen.
    "optim": {"lr": 1e-2, "warmup_epochs": 0.5, "clip": 0.3},
    "train": {
        "global_batch": 8,
        "precision": "fp32",
        "ds_config": "zero1",
        "steps": 20,
        "log_every": 1,
        "checkpoint_every": 10,
    },
}


def shards(folder: Path, samples: int = 36, first: int = 0, labelled: bool = True) -> Path:
    """A shard set of coloured noise, 36 images: 4 steps an epoch at batch 8, and 4 samples dropped.

    Another `first` gives other images.
    """
    images = []
    for i in range(samples):
        generator = np.random.default_rng(first + i)
        coarse = Image.fromarray(generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((40, 40))
        buffer = io.BytesIO()
        coarse.save(buffer, "PNG")
        images.append(Sample(f"image{i:03d}", i % 3 if labelled else None, "png", buffer.getvalue()))
    write_samples(images, folder, ("a", "b", "c") if labelled else (), 10, "tiny")
    return folder


def config(run_dir: Path, data: Path, **overrides: Any) -> Config:
    """`overrides` are dotted keys with __ for the dot: train__ds_config="zero0"."""
    values = json.loads(json.dumps(VALUES))
    values["run_dir"], values["data"]["train"] = str(run_dir), str(data)
    for key, value in overrides.items():
        *sections, leaf = key.split("__")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return configs.validate(values, where="tiny")


def model_config(model: dict[str, Any], size: int = 224) -> Config:
    """Return the default config with this `model` section and global crops of `size` pixels."""
    return configs.validate({"model": model, "data": {"global_crops": {"size": size}}}, where="tiny")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    from esvit_scale.train.metrics import TIME_FIELDS
    from esvit_scale.train.row_file import read_rows

    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_rows(run_dir / "metrics.jsonl")]


def write_config(path: Path, config: Config) -> Path:
    path.write_text(configs.dump(config))
    return path
