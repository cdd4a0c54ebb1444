"""Continued pretraining at the demo's size: what happens to the k-NN accuracy of weights when new heads are trained on them.

    python benchmarks/from_weights.py [--rows NAME …] [--steps 200] [--seed 0] [--without-labels] [--out DIR] [--json]

The source is the teacher's trunk of the preset `demo` with SMALLER, which is trained first on the demo's training patches.
Each row continues from it with new heads on the same patches and the overrides below; the guard measures on the demo's
test patches, which are from the other halves of the photographs. It warns and does not end a run.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from esvit_scale import config as configs  # noqa: E402
from esvit_scale import demo  # noqa: E402
from esvit_scale.checkpoint.convert import convert  # noqa: E402
from esvit_scale.config import Config  # noqa: E402
from esvit_scale.data import samples, shard_writer, stream  # noqa: E402
from esvit_scale.train import pretraining  # noqa: E402
from esvit_scale.train.row_file import read_rows  # noqa: E402

SMALLER = [
    *("data.global_crops.size=32", "data.local_crops.0.size=16", "data.local_crops.0.count=2"),
    *("model.depths=[1,1,2]", "model.heads=[1,2,4]"),
]
SOURCE_STEPS = 300
ROWS: dict[str, list[str]] = {
    "plain": [],
    "ten times the rate": ["optim.lr=4e-2"],
    "lower rate": ["optim.lr=4e-4"],
    "frozen first": ["optim.freeze_trunk_steps=50"],
    "recipe": ["optim.lr=4e-4", "optim.layer_decay=0.75", "optim.freeze_trunk_steps=50"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-labels", action="store_true", help="the guard's other measures, on the same images")
    parser.add_argument("--out", type=Path, help="keeps the runs; the same command goes on with them")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of all rows; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = (options.out or Path(scratch)).resolve()
        rows = measure(out, options.rows, options.steps, options.seed, options.override, not options.without_labels)
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def measure(
    out: Path, names: list[str], steps: int, seed: int, overrides: list[str], labels: bool = True
) -> list[dict[str, Any]]:
    """Train the source if it is not there, and continue from it; return one row per name and measure with its curve."""
    precision = "bf16" if demo.has_fast_bf16() else "fp32"
    common = [
        f"seed={seed}",
        f"train.precision={precision}",
        *SMALLER,
        f"data.train={out / 'source' / 'shards' / 'train'}",
    ]
    config = configs.resolve("demo", [*common, f"run_dir={out / 'source'}", f"train.steps={SOURCE_STEPS}"])
    _, test = demo.write_shards(out / "source" / "shards", config)
    pretraining.pretrain(config)
    trunk = out / "trunk.safetensors"
    if not trunk.exists():
        convert(out / "source", trunk, "esvit-scale", "safetensors")
    if not labels:
        test = without_labels(out / "unlabelled", config)
    rows = []
    for name in names:
        run = out / (name.replace(" ", "-") + ("" if labels else "-without-labels"))
        given = [
            *common,
            *(f"run_dir={run}", f"data.held_out={test}", f"model.init_from={trunk}", f"train.steps={steps}"),
            *("train.knn_every=20", "train.guard=warn", *ROWS[name], *overrides),
        ]
        pretraining.pretrain(configs.resolve("demo", given))
        measured = [row for row in read_rows(run / "metrics.jsonl") if "guard_below" in row]
        for field in ("knn_top1",) if labels else ("held_out_rank", "neighbours_kept"):
            values = [row[field] for row in measured]
            rows.append(
                {
                    "row": name,
                    "overrides": ROWS[name],
                    "measure": field,
                    **{"start": values[0], "lowest": min(values), "end": values[-1]},
                    "most_below": max(row["guard_below"] for row in measured),
                    "curve": [[row["step"], row[field]] for row in measured],
                }
            )
    return rows


def without_labels(folder: Path, config: Config) -> Path:
    """Write the demo's test patches without their classes as a shard set; return its folder."""
    _, patches = samples.demo_samples(stream.evaluation_side(config.data.global_crops.size))
    shard_writer.write_samples(
        [patch._replace(label=None) for patch in patches], folder, source="patches without labels"
    )
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| continued with | measure | start | lowest | end | measurements in a row that the guard found too low |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        figures = " | ".join(f"{row[key]:.3f}" for key in ("start", "lowest", "end"))
        overrides = " ".join(row["overrides"]) or "nothing"
        lines.append(f"| {row['row']} ({overrides}) | {row['measure']} | {figures} | {row['most_below']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
