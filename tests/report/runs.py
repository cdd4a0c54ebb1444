"""A run dir that no training made."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from esvit_scale import config as configs
from esvit_scale.data import shard_writer

EVIL = 'cat <script>alert("x")</script> & co'


def photographs(root: Path) -> Path:
    """A folder of two classes, one of an evil name."""
    rng = np.random.default_rng(0)
    for c, name in enumerate((EVIL.replace("/", "-"), "dog")):
        (root / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 80, (40, 40, 3)) + 150 * c
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def whole_run(run: Path, photographs: Path) -> Path:
    """A run dir with everything in it."""
    run.mkdir()
    shard_writer.create(photographs, run / "shards")
    crops = "data.global_crops.size=32"
    overrides = [crops, f"data.train={run / 'shards'}", "data.local_crops.0.count=3", "name=named-run"]
    (run / "config.yaml").write_text(configs.dump(configs.resolve("swin_t", overrides)))
    rows = [
        {"step": i, "images_seen": 64 * i, "loss": 6.5, "loss_view": 6.4, "lr": 1e-3, "drift": i / 2}
        for i in range(1, 9)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 9, "lo')
    (run / "summary.json").write_text(json.dumps({"finished": True, "nested": {"key": EVIL}}))
    (run / "environment.json").write_text(json.dumps({"host": EVIL}))
    (run / "knn.json").write_text(json.dumps(knn_result(run / "shards", photographs)))
    return run


def knn_result(train: Path, test: Path) -> dict:
    from esvit_scale.evaluate.features import raw_pixels
    from esvit_scale.evaluate.knn import evaluate, with_class_names

    sets = [with_class_names(raw_pixels(source, 16, workers=0), source) for source in (train, test)]
    return {"checkpoint": "x", "step": 8, "train": str(train), "test": str(test)} | evaluate(*sets)
