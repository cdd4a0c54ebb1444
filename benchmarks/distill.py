"""Distillation at the demo's size: a student taught by a larger teacher, beside the same student pretrained alone.

    python benchmarks/distill.py --out DIR [--only ROW …] [--seeds 0 1 2] [--steps 100] [--override KEY=VALUE …] [--json]

The student is the network of the preset `demo` (width 32) on its patches of 20 photographs with batch 64. The teacher
is the same network twice as wide, which has four times the parameters, pretrained with EsViT by the preset's recipe (seed
0, 400 steps), as it is after 200 of its steps. Every row trains the student for the same number of steps on the same
batches; accuracies are those of k-NN with k = 10, of the student and of its EMA. Runs stay in DIR, and the same command
goes on with them.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from objectives import top1  # noqa: E402

from esvit_scale import config as configs  # noqa: E402
from esvit_scale import demo  # noqa: E402
from esvit_scale.checkpoint import convert  # noqa: E402
from esvit_scale.config import Config  # noqa: E402
from esvit_scale.objective import costs  # noqa: E402
from esvit_scale.train import pretraining  # noqa: E402

TEACHER = ["model.embed_dim=64", "model.heads=[2,4,8,16]", "train.keep_every=200"]
TEACHER_STEPS, TAKEN = 400, "teacher/checkpoints/step-00000200"
SHORT = ["optim.warmup_epochs=0.5"]  # the share of the preset's 400 steps that its 2 epochs are
DISTILL = [*SHORT, "objective.name=distill", f"objective.teacher={{out}}/{TAKEN}", "objective.regions=true"]
ROWS: dict[str, list[str]] = {
    "alone": SHORT,
    "prototypes": DISTILL,
    "cosine": [*DISTILL, "objective.targets=cosine"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="of the student")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of all rows; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    out = options.out.resolve()
    of_teacher = recipe(out, "teacher", 0, TEACHER_STEPS, TEACHER)
    if not (out / TAKEN).exists():
        train(of_teacher, out)
    teacher = accuracies(of_teacher, out, out / TAKEN)
    rows: dict[str, list[dict[str, Any]]] = {row: [] for row in options.only}
    for seed in options.seeds:
        for row, measured in rows.items():
            overrides = [*ROWS[row], *options.override]
            config = recipe(out, f"{row}-{seed}", seed, options.steps, overrides)
            measured.append(accuracies(train(config, out), out, config.run_path))
    found = {"teacher": teacher, "seeds": options.seeds, "rows": rows}
    print(json.dumps(found, indent=2) if options.json else table(teacher, options.seeds, rows))


def recipe(out: Path, run: str, seed: int, steps: int, overrides: list[str]) -> Config:
    """Return the config of a run in `out`; `{out}` in an override is this folder."""
    base = demo.demo_config(out, seed)
    own = [f"name={run}", f"run_dir={out / run}", f"seed={seed}", f"train.steps={steps}", "train.checkpoint_every=50"]
    data = [f"data.train={base.data.train}", f"train.precision={base.train.precision}"]
    return configs.resolve("demo", [*own, *data, *(value.format(out=out) for value in overrides)])


def train(config: Config, out: Path) -> Config:
    """Train a run, or go on with it, and return its config with what is known of the teacher."""
    demo.write_shards(out / "shards", config)
    pretraining.pretrain(config)
    return configs.load(config.run_path / "config.yaml")


def accuracies(config: Config, out: Path, checkpoint: Path) -> dict[str, Any]:
    """Return the k-NN accuracies in % of a run's untrained network, and of student and EMA in a checkpoint; kept in `out`."""
    kept = out / f"{config.name}-{config.train.steps}.json"
    if not kept.exists():
        sets = demo.write_shards(out / "shards", config)
        found: dict[str, Any] = {"trunk": costs.parameters(config).trunk}
        if not config.objective.teacher:  # a taught student starts as the same student alone does
            found["untrained"] = top1(demo.untrained_result(config, *sets))
        for role in ("student", "teacher"):
            with tempfile.TemporaryDirectory() as folder:
                weights = Path(folder) / "weights.safetensors"
                convert.convert(checkpoint, weights, "esvit-scale", "safetensors", role)
                found["EMA" if role == "teacher" else role] = top1(demo.trained_result(weights, config, *sets))
        rows = (config.run_path / "metrics.jsonl").read_text().splitlines()
        found["images_per_s"] = statistics.median(json.loads(row)["images_per_s"] for row in rows)
        kept.write_text(json.dumps(found))
    found = json.loads(kept.read_text())
    print(f"{config.name}: {found}", file=sys.stderr, flush=True)
    return found


def table(teacher: dict[str, Any], seeds: list[int], rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the accuracies as a table in Markdown, and the teacher's below it."""
    columns = [*(f"seed {seed}" for seed in seeds), "mean"]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    parts = {"untrained": [row["untrained"] for row in rows.get("alone", [])]}
    for role in ("student", "EMA"):
        parts |= {f"`{name}`, {role}": [row[role] for row in found] for name, found in rows.items()}
    for name, values in parts.items():
        if values:
            lines.append(f"| {name} | {' | '.join(f'{value:.1f} %' for value in (*values, statistics.mean(values)))} |")
    of_teacher = f"{teacher['untrained']:.1f} → {teacher['EMA']:.1f} %, {teacher['trunk']:,} parameters in the trunk"
    return "\n".join([*lines, f"\nteacher (EMA): {of_teacher}"])


if __name__ == "__main__":
    main()
