"""The paper's table of trunks in one run: parameters, speed and memory of each, beside the published figures.

    python benchmarks/trunks.py [--trunks deit_s resnet50 timm:convnext_tiny …] [--batch N] [--inference-batch N]
                                [--prototypes 65536] [--precision bf16] [--steps 3] [--json]

Inference is the trunk's forward at 224. Training is a whole optimizer step (step.py) of EsViT's view and region losses
on 2 × 224 + 8 × 96 crops; crops are random pixels, so neither decoding nor augmentation is timed. Every trunk takes
turns with Swin-T in a process of the two, so that a machine whose speed drifts favours neither: "× Swin-T" is the ratio
of their median times there. Peaks are those of training in a process of its own. The GPU is used when there is one.

Published figures: EsViT (Li et al. 2021), table 2: ImageNet-1K, 300 epochs, images/s of inference on one GPU of then.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from step import child, machine, our_step, peak_mb, random_crops, seconds

REFERENCE = "swin_t"


class Published(NamedTuple):
    millions: int
    images_per_s: int
    view: str  # linear / k-NN accuracy, %
    view_and_region: str = "–"


PAPER = {
    "swin_t": Published(28, 808, "77.1 / 73.7", "77.6 / 75.4"),
    "deit_s": Published(21, 1007, "75.9 / 73.2"),
    "resnet50": Published(23, 1237, "75.0 / 69.3", "75.7 / 71.2"),
    "vil_2262": Published(28, 386, "77.3 / 73.9", "77.5 / 74.5"),
    "cvt_s1": Published(29, 848, "77.6 / 74.8", "78.5 / 76.7"),
}
OTHERS = ("focal_t", "vit_s_moco")  # of the same size, without a published figure in that table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trunks", nargs="+", help="names of the registry (default: the paper's, and others that size)"
    )
    parser.add_argument("--batch", type=int, help="images of a training step (default: 64 on a GPU, 2 on a CPU)")
    parser.add_argument("--inference-batch", type=int, help="default: 256 on a GPU, 8 on a CPU")
    parser.add_argument("--prototypes", type=int, default=65536, help="K of either head")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run_cell(json.loads(options.cell))))
        return
    import torch

    from esvit_scale.models.registry import TRUNKS

    gpu = torch.cuda.is_available()
    common = {
        "batch": options.batch or (64 if gpu else 2),
        "inference_batch": options.inference_batch or (256 if gpu else 8),
        "prototypes": options.prototypes,
        "precision": options.precision or ("bf16" if gpu else "fp32"),
        "steps": options.steps,
    }
    names = options.trunks or [name for name in (*PAPER, *OTHERS) if name in TRUNKS]
    rows = []
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows.append({"trunk": name} | measure(name, common))
    found = {"machine": machine(), **common, "rows": rows}
    print(json.dumps(found, indent=2) if options.json else table(found))


def measure(trunk: str, common: dict[str, Any]) -> dict[str, Any]:
    """Times in turns with the reference, the peak alone; or why the trunk cannot be measured."""
    from esvit_scale.errors import UserError
    from esvit_scale.objective import costs

    try:
        row: dict[str, Any] = {"parameters": costs.parameters(config_of(trunk, common)).trunk}
        for part in ("inference", "training"):
            row |= child(common | {"trunks": list(dict.fromkeys([REFERENCE, trunk])), "part": part}, __file__)
        alone = child(common | {"trunks": [trunk], "part": "training", "steps": 1}, __file__)
    except UserError as error:
        return {"failed": str(error)}
    except subprocess.CalledProcessError:
        return {"failed": "its process failed; the reason is above the table"}
    return row | {"peak_mb": alone["peak_mb"]}


def config_of(trunk: str, cell: dict[str, Any]) -> Any:
    from esvit_scale import config as configs

    keys = {"train.global_batch": "batch", "train.precision": "precision", "objective.prototypes": "prototypes"}
    return configs.resolve(REFERENCE, [f"model.trunk={trunk}", *(f"{key}={cell[name]}" for key, name in keys.items())])


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Rates of the last of `cell["trunks"]`, the others taking turns with it."""
    from esvit_scale.parallel import world as worlds

    world = worlds.start()
    part, device = cell["part"], world.device
    found = [config_of(trunk, cell) for trunk in cell["trunks"]]
    if part == "inference":
        images, sides = cell["inference_batch"], [inference(c, cell["inference_batch"], device) for c in found]
    else:
        crops = random_crops(found[-1], cell["batch"], device)
        images, sides = cell["batch"], [our_step(config, world, crops) for config in found]
    row = rates(part, sides, images, cell["steps"], device) | {"peak_mb": peak_mb(device)}
    worlds.stop()
    return row


def rates(what: str, sides: list[Callable[[], object]], images: int, steps: int, device: Any) -> dict[str, float]:
    """Images/s of the last side, and its speed over the first one's, the sides taking turns."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(steps + 1):
        for side, found in zip(sides, times, strict=True):
            found.append(seconds(side, device))
    first, last = (statistics.median(found[1:]) for found in (times[0], times[-1]))
    return {f"{what}_images_per_s": images / last, f"{what}_ratio": first / last}


def inference(config: Any, images: int, device: Any) -> Callable[[], object]:
    import torch

    from esvit_scale.models.initialize import initialize
    from esvit_scale.models.registry import build_trunk

    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    trunk = build_trunk(config).eval()
    initialize(trunk, 0)
    trunk.to(device, dtype)
    size = config.data.global_crops.size
    batch = torch.randn(images, 3, size, size, device=device, dtype=dtype)

    def forward() -> object:
        with torch.inference_mode():
            return trunk([batch])

    return forward


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['machine']}, {found['precision']}; inference at 224 on {found['inference_batch']} images, "
        f"training on {found['batch']}, K = {found['prototypes']}; published figures in brackets",
        "",
        "| trunk | parameters, M | inference, images/s | × Swin-T | V+R training, images/s | × Swin-T | peak, MB "
        "| V: linear / k-NN | V+R: linear / k-NN |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line(row) for row in found["rows"])])


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['trunk']} | {row['failed']} |||||||"
    cells = [
        row["trunk"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['inference_images_per_s']:.1f}",
        f"{row['inference_ratio']:.2f}",
        f"{row['training_images_per_s']:.2f}",
        f"{row['training_ratio']:.2f}",
        f"{row['peak_mb']:.0f}",
    ]
    if paper := PAPER.get(row["trunk"]):
        ratio = paper.images_per_s / PAPER[REFERENCE].images_per_s
        for i, published in enumerate((paper.millions, paper.images_per_s, f"{ratio:.2f}"), start=1):
            cells[i] += f" ({published})"
    cells += [paper.view, paper.view_and_region] if paper else ["–", "–"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
