"""Make a folder of the model zoo from a finished run: weights, curve, environment, commands, accuracies on the test half.

    python benchmarks/learning_sets.py fashion --source FOLDER --half validation --out shards
    python benchmarks/learning_sets.py fashion --source FOLDER --out shards
    esvit-scale pretrain small …                  (the command of the row in docs/zoo.md)
    python benchmarks/learning_zoo.py runs/fashion --set fashion --shards shards --out esvit_scale/zoo/fashion

Accuracies are those of whole pictures (`--whole`), beside raw pixels and the untrained trunk, at the same k.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import learning  # noqa: E402
import learning_sets  # noqa: E402

from esvit_scale.checkpoint import convert  # noqa: E402
from esvit_scale.evaluate import features  # noqa: E402

Json = dict[str, Any]
CURVE = ("step", "images_seen", "loss", "lr", "grad_norm", "knn_top1", "knn_top1_pixels")
SOURCES = {
    "fashion": ("Fashion-MNIST (Zalando Research), from Debian's dataset-fashion-mnist", "MIT"),
    "stamps": (
        "Tux Paint's stamps (2002-2022 Bill Kendrick and contributors), from Debian's tuxpaint-stamps-default",
        "GPL-2",
    ),
    "digits": (
        "scikit-learn's load_digits (UCI optical recognition of handwritten digits)",
        "that of scikit-learn, BSD-3-Clause",
    ),
    "demo": (
        "patches of the photographs that scikit-image and scikit-learn bring",
        "as the two packages state for each: mostly public domain or CC0, scikit-learn's two CC BY 2.0",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="finished run")
    parser.add_argument("--set", choices=learning_sets.NAMES, required=True)
    parser.add_argument("--shards", type=Path, required=True, help="folder that learning_sets.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; its name is that in zoo:NAME")
    options = parser.parse_args()
    convert.convert(options.run, options.out, "esvit-scale", "safetensors")
    card = options.out / "README.md"
    card.write_text(
        card.read_text().replace(f'load_backbone("{options.out.name}")', f'load_backbone("zoo:{options.out.name}")')
    )
    (options.out / "metrics.jsonl").write_text(curve(options.run))
    environment = json.loads((options.run / "environment.json").read_text())
    environment |= {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    write(options.out / "environment.json", {key: value for key, value in environment.items() if key != "host"})
    write(options.out / "about.json", about(options.run, options.set, options.shards))


def curve(run: Path) -> str:
    """Return the run's metrics with the fields of CURVE alone, a line a row."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return "".join(json.dumps({key: row[key] for key in CURVE if key in row}) + "\n" for row in rows)


def command(run: Path) -> str:
    """Return the command that the header in the run's log.txt names."""
    given = re.search(r"config {5}(.*)", (run / "log.txt").read_text())
    assert given
    return f"OMP_NUM_THREADS=1 esvit-scale pretrain {shlex.join(given[1].split())}"


def about(run: Path, name: str, shards: Path) -> Json:
    """Return what the images are, the command, accuracies, and features of a computed picture."""
    sets = (shards / f"{name}-train", shards / f"{name}-test")
    frozen = features.load_frozen_trunk(run)
    untrained = features.load_frozen_trunk(Path(f"untrained:{run}"))
    pixels = [features.raw_pixels(path, frozen.size, workers=0, whole=True) for path in sets]
    source, licence = SOURCES[name]
    return {
        "images": source,
        "licence_of_images": licence,
        "command": command(run),
        "test": {
            "trained": learning.of_trunk(frozen.trunk, frozen.size, sets, True, True, True),
            "untrained": learning.of_trunk(untrained.trunk, frozen.size, sets, True, True, True),
            "raw pixels": learning.scores(pixels[0], pixels[1], False),
            "raw pixels, mean picture subtracted": learning.scores(*centred(*pixels), False),
        },
        "features": of_pattern(frozen.trunk, frozen.size)[0, :8].tolist(),
    }


def centred(train: Any, test: Any) -> tuple[learning.Measured, learning.Measured]:
    """Return both sets with the training set's mean picture subtracted, which matters where most of a picture is white."""
    mean = train.features.float().mean(0)
    first, second = (learning.Measured(part.features.float() - mean, part.labels) for part in (train, test))
    return first, second


@torch.no_grad()
def of_pattern(trunk: torch.nn.Module, size: int) -> Tensor:
    """Return the view features [1, C] of a picture that is computed: the sine of the numbers of its values."""
    picture = torch.arange(3 * size * size, dtype=torch.float32).sin().view(1, 3, size, size)
    found: Tensor = trunk.eval()([picture]).view
    return found


def write(path: Path, content: Json) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
