"""Sparse trunks: speed beside the dense trunk, and accuracy against FLOPs and speed on Fashion-MNIST.

    python benchmarks/sparsify.py speed [--trunk deit_s] [--keep 0.7] [--batch 8] [--repeat 10]
    python benchmarks/sparsify.py fashion --source FOLDER --out DIR [--seeds 0 1 2] [--keep 0.9 0.7 0.5]

Images per second are of processor time, on one thread, so that other work on the machine hardly counts: trunks take turns
in one process, and the fastest repeat of each is taken. `speed` does so with random weights.

`fashion` trains a small ViT on 2,000 labelled pictures (Debian's dataset-fashion-mnist, unpacked in FOLDER, enlarged to 64
pixels), sparsifies it without labels, and measures k-NN (k = 10) and a logistic probe on 2,000 test pictures. It writes
DIR/sparsify.csv and DIR/sparsify.png. The same command goes on with what is there.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import learning  # noqa: E402
import learning_sets  # noqa: E402

from esvit_scale import config as configs  # noqa: E402
from esvit_scale.config import Config  # noqa: E402
from esvit_scale.evaluate import features  # noqa: E402
from esvit_scale.models.initialize import initialize  # noqa: E402
from esvit_scale.models.registry import build_trunk  # noqa: E402
from esvit_scale.models.trunk import Trunk  # noqa: E402
from esvit_scale.objective import costs  # noqa: E402
from esvit_scale.train import finetuning, pretraining, sparsifying  # noqa: E402

SIZE = 64  # pixels: 16 patches
MOST = 2000  # pictures to train on, and to measure on
DENSE_STEPS, SPARSE_STEPS = 200, 24  # of 64 pictures
SHAPE = ["model.trunk=deit_s", "model.embed_dim=64", "model.depths=[8]", "model.heads=[4]", "model.drop_path=0"]
BOTH = [
    *("data.workers=0", f"data.global_crops.size={SIZE}", "data.global_crops.scale=[0.5,1.0]"),
    *("train.global_batch=64", "train.precision=fp32", "train.log_every=20", "train.checkpoint_every=1000"),
]
COLUMNS = ("keep", "seed", "mflops", "images_per_s", "knn", "linear")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    speed = modes.add_parser("speed")
    speed.add_argument("--trunk", default="deit_s")
    speed.add_argument("--keep", type=float, default=0.7)
    speed.add_argument("--size", type=int, default=224)
    speed.add_argument("--batch", type=int, default=8)
    speed.add_argument("--repeat", type=int, default=10)
    fashion = modes.add_parser("fashion")
    fashion.add_argument("--source", type=Path, required=True)
    fashion.add_argument("--out", type=Path, required=True)
    fashion.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    fashion.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.mode == "speed":
        show_speed(options)
    else:
        on_fashion(options.source, options.out.resolve(), options.keep, options.seeds)


# --- speed -----------------------------------------------------------------------------------------------------------


def show_speed(options: argparse.Namespace) -> None:
    dense, sparse = (
        configs.validate(
            {"model": {"trunk": name, **own}, "data": {"global_crops": {"size": options.size}, "local_crops": []}}, name
        )
        for name, own in ((options.trunk, {}), (f"sparse:{options.trunk}", {"keep": options.keep}))
    )
    trunks = [build_trunk(config).eval() for config in (dense, sparse)]
    for trunk in trunks:
        initialize(trunk, 0)
    rates = images_per_s(trunks, options.size, options.batch, options.repeat)
    for config, rate in zip((dense, sparse), rates, strict=True):
        gflops = costs.crop_flops(config, options.size, "executed") / 1e9
        print(f"{config.model.trunk:<16} {gflops:6.2f} GFLOPs  {rate:7.2f} images/s")
    print(f"sparse / dense: {rates[1] / rates[0]:.2f} × images/s at batch {options.batch}, one thread, processor time")


@torch.no_grad()
def images_per_s(trunks: list[Trunk], size: int, batch: int, repeat: int) -> list[float]:
    """Return the images per second of processor time of each trunk, its fastest repeat; the trunks take turns."""
    torch.set_num_threads(1)
    images = torch.randn(batch, 3, size, size)
    fastest = [float("inf")] * len(trunks)
    for i in range(repeat + 1):
        for j, trunk in enumerate(trunks):
            start = time.process_time()
            trunk([images])
            if i:  # the first is a warm-up
                fastest[j] = min(fastest[j], time.process_time() - start)
    return [batch / seconds for seconds in fastest]


# --- Fashion-MNIST ---------------------------------------------------------------------------------------------------


def on_fashion(source: Path, out: Path, keeps: list[float], seeds: list[int]) -> None:
    sets = learning_sets.shards("fashion", "test", source, out / "shards", MOST)
    runs = {("dense", 0): train(dense_config(out, sets[0]))}
    for seed in seeds:
        for keep in keeps:
            runs[str(keep), seed] = train(sparse_config(out, sets[0], keep, seed))
    trunks = {key: cast(Trunk, features.load_frozen_trunk(run).trunk) for key, run in runs.items()}
    timed = {name: trunk for (name, _), trunk in trunks.items()}
    rates = dict(zip(timed, images_per_s(list(timed.values()), SIZE, 64, 20), strict=True))
    rows = []
    for (name, seed), run in runs.items():
        config = configs.load(run / "config.yaml")
        found = learning.of_trunk(trunks[name, seed], SIZE, sets, True, True)
        mflops = costs.crop_flops(config, SIZE, "executed") / 1e6
        accuracies = [round(found[measure], 2) for measure in ("knn", "linear")]
        rows.append(dict(zip(COLUMNS, (name, seed, round(mflops, 2), round(rates[name], 1), *accuracies), strict=True)))
        print(rows[-1], flush=True)
    with (out / "sparsify.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "sparsify.png")
    print(table(rows))


def dense_config(out: Path, data: Path) -> Config:
    """Return the config of the dense ViT: classification, from random weights."""
    own = [
        f"data.train={data}",
        f"run_dir={out / 'dense'}",
        f"train.steps={DENSE_STEPS}",
        "data.mixup=0",
        "data.cutmix=0",
    ]
    own += ["optim.lr=4e-3", "optim.warmup_epochs=0.5", "optim.layer_decay=1", "data.global_crops.augment.jitter=0"]
    own += ["objective.ema_momentum=0.98", "objective.ema_momentum_end=0.98"]
    classes = finetuning.class_names(configs.validate({"data": {"train": str(data)}}, "data").data)
    learned = {"objective": {"classes": len(classes), "class_names": list(classes)}}
    return configs.resolve("classify", [*SHAPE, *BOTH, *own], above=learned)


def sparse_config(out: Path, data: Path, keep: float, seed: int) -> Config:
    """Return the config of a sparsification of the dense ViT."""
    own = [
        f"data.train={data}",
        f"run_dir={out / f'keep-{keep}-{seed}'}",
        f"seed={seed}",
        f"train.steps={SPARSE_STEPS}",
    ]
    own += ["optim.lr=8e-3", "optim.trunk_rate=0.1", "optim.warmup_epochs=0.05", "data.global_crops.augment.jitter=0"]
    return sparsifying.resolve(str(out / "dense"), "sparsify", [*BOTH, *own], keep)


def train(config: Config) -> Path:
    pretraining.pretrain(config)
    return config.run_path


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds, with the range of seeds, as a table in Markdown."""
    lines = ["| keep | MFLOPs | images/s | k-NN | linear |", "|---|---|---|---|---|"]
    for keep in dict.fromkeys(row["keep"] for row in rows):
        of = [row for row in rows if row["keep"] == keep]
        cells = [keep, f"{of[0]['mflops']:.1f}", f"{of[0]['images_per_s']:.0f}"]
        for measure in ("knn", "linear"):
            values = [row[measure] for row in of]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f} %{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw k-NN and linear accuracy against FLOPs and images/s: a mark for each seed, lines through their means."""
    from esvit_scale.report.plots import blank_figure, png, style

    figure = blank_figure(9, 3.2)
    scales = {"mflops": "MFLOPs per image", "images_per_s": "images/s (batch 64, one thread)"}
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), scales.items(), strict=True):
        for measure, colour in (("knn", "#38bdf8"), ("linear", "#f59e0b")):
            axes.scatter([row[key] for row in rows], [row[measure] for row in rows], s=14, color=colour, alpha=0.6)
            means = [
                tuple(statistics.mean(row[column] for row in rows if row["keep"] == keep) for column in (key, measure))
                for keep in keeps
            ]
            axes.plot(*zip(*sorted(means), strict=True), color=colour, label={"knn": "k-NN"}.get(measure, measure))
        for keep in keeps:
            at = next(row for row in rows if row["keep"] == keep)
            axes.annotate(
                keep, (at[key], at["linear"]), fontsize=8, color="#888888", xytext=(3, 4), textcoords="offset points"
            )
        style(axes)
        axes.set_xlabel(label, color="#888888", fontsize=8.5)
    figure.axes[0].set_ylabel("accuracy, %", color="#888888", fontsize=8.5)
    figure.axes[0].legend(fontsize=8, frameon=False, labelcolor="#888888")
    path.write_bytes(png(figure))


if __name__ == "__main__":
    main()
