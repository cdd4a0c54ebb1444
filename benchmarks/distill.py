"""Distillation at the demo's size: a student taught by a larger teacher, beside the same student pretrained alone.

    python benchmarks/distill.py --out DIR [--only ROW …] [--seeds 0 1 2] [--steps 200] [--override KEY=VALUE …] [--json]

The student is the network of the preset `demo` (width 32) on its patches of 20 photographs with batch 64. The teacher
is the same network twice as wide, which has four times the parameters, pretrained with EsViT by the preset's recipe (seed
0, 400 steps). Every row trains the student for the same number of steps on the same batches; the accuracy is that of
k-NN with k = 10 on the EMA of the student, as in the demo. Runs stay in DIR, and the same command goes on with them.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from objectives import top1  # noqa: E402

from esvit_scale import config as configs  # noqa: E402
from esvit_scale import demo  # noqa: E402
from esvit_scale.config import Config  # noqa: E402
from esvit_scale.objective import costs  # noqa: E402
from esvit_scale.train import pretraining  # noqa: E402

TEACHER = ["model.embed_dim=64", "model.heads=[2,4,8,16]"]
TEACHER_STEPS = 400  # the preset's own length
DISTILL = ["objective.name=distill", "objective.teacher={out}/teacher", "objective.regions=true"]
ROWS: dict[str, list[str]] = {
    "alone": [],
    "prototypes": DISTILL,
    "cosine": [*DISTILL, "objective.targets=cosine"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of the student")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of all rows; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    out = options.out.resolve()
    teacher = measure(recipe(out, "teacher", 0, TEACHER_STEPS, TEACHER), out)
    rows: dict[str, list[dict[str, Any]]] = {row: [] for row in options.only}
    for seed in options.seeds:
        for row, measured in rows.items():
            overrides = [*ROWS[row], *options.override]
            measured.append(measure(recipe(out, f"{row}-{seed}", seed, options.steps, overrides), out))
    found = {"teacher": teacher, "seeds": options.seeds, "rows": rows}
    print(json.dumps(found, indent=2) if options.json else table(teacher, options.seeds, rows))


def recipe(out: Path, run: str, seed: int, steps: int, overrides: list[str]) -> Config:
    """Return the config of a run in `out`; `{out}` in an override is this folder."""
    base = demo.demo_config(out, seed)
    own = [f"name={run}", f"run_dir={out / run}", f"seed={seed}", f"train.steps={steps}", "train.checkpoint_every=50"]
    data = [f"data.train={base.data.train}", f"train.precision={base.train.precision}"]
    return configs.resolve("demo", [*own, *data, *(value.format(out=out) for value in overrides)])


def measure(config: Config, out: Path) -> dict[str, Any]:
    """Train a run, or go on with it, and return the k-NN accuracies in % of the untrained and the trained network."""
    train, test = demo.write_shards(out / "shards", config)
    pretraining.pretrain(config)
    of_run = configs.load(config.run_path / "config.yaml")  # with what is known of the teacher
    before, after = (
        top1(demo.untrained_result(of_run, train, test)),
        top1(demo.trained_result(config.run_path, of_run, train, test)),
    )
    last = json.loads((config.run_path / "metrics.jsonl").read_text().splitlines()[-1])
    print(f"{config.name}: {before:.1f} → {after:.1f} %", file=sys.stderr, flush=True)
    kept = {key: last[key] for key in ("feature_std", "images_per_s")}
    return {"before": before, "after": after, "trunk": costs.parameters(of_run).trunk, **kept}


def table(teacher: dict[str, Any], seeds: list[int], rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the accuracies as a table in Markdown, and the teacher's below it."""
    columns = [*(f"seed {seed}" for seed in seeds), "mean", "untrained", "images/s"]
    lines = [f"| row | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, found in rows.items():
        of = {key: [row[key] for row in found] for key in ("after", "before", "images_per_s")}
        cells = [
            f"{value:.1f} %" for value in (*of["after"], statistics.mean(of["after"]), statistics.mean(of["before"]))
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {statistics.median(of['images_per_s']):.0f} |")
    lines.append(
        f"\nteacher: {teacher['before']:.1f} → {teacher['after']:.1f} %, {teacher['trunk']:,} parameters in the trunk"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
