"""Every objective at the demo's size: k-NN accuracy before and after, and images/s.

    python benchmarks/objectives.py [--only NAME …] [--seed 0] [--steps 300] [--out DIR] [--override KEY=VALUE …]

Each row is the preset `demo` (its trunk of width 32, its patches of 20 photographs, batch 64) with the overrides below,
chosen by hand with this k-NN in view. So the table says that each objective learns here, not which one is the best.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from esvit_scale import config as configs  # noqa: E402
from esvit_scale import demo  # noqa: E402
from esvit_scale.config import Config  # noqa: E402
from esvit_scale.train import pretraining  # noqa: E402
from esvit_scale.train.run_records import read_summary  # noqa: E402

TWO_VIEWS = ["data.local_crops=[]", "data.global_crops.scale=[0.2, 1.0]", "objective.bottleneck=128"]
NO_TEACHER = ["objective.ema_momentum=0", "objective.ema_momentum_end=0"]
RECIPES: dict[str, list[str]] = {
    "esvit": [],
    "esvit sinkhorn": ["objective.centering=sinkhorn"],
    "dino": ["objective.name=dino"],
    "dino sinkhorn": ["objective.name=dino", "objective.centering=sinkhorn"],
    "moco_v3": ["objective.name=moco_v3", *TWO_VIEWS, "objective.student_temp=0.2"],
    "byol": ["objective.name=byol", *TWO_VIEWS, "optim.lr=8e-3", "objective.ema_momentum=0.9"],
    "simsiam": [
        "objective.name=simsiam",
        *TWO_VIEWS,
        *NO_TEACHER,
        "objective.bottleneck=512",
        "objective.predictor_hidden=128",
        "optim.lr=1e-3",
    ],
    "simclr": ["objective.name=simclr", *TWO_VIEWS, *NO_TEACHER, "objective.student_temp=0.2"],
    "swav": [
        "objective.name=swav",
        *NO_TEACHER,
        "objective.bottleneck=128",
        "objective.prototypes=128",
        "objective.teacher_temp=0.05",
        "objective.teacher_temp_end=0.05",
    ],
    "triplet": ["objective.name=triplet", *TWO_VIEWS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, help="keeps the runs; the same command goes on with them")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="of all rows; repeatable")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = (options.out or Path(scratch)).resolve()
        rows = measure(out, options.only, options.seed, options.steps, options.override)
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def measure(out: Path, names: list[str], seed: int, steps: int, overrides: list[str]) -> list[dict[str, Any]]:
    """k-NN top-1 at k = 10 of the untrained and of each trained teacher, in %."""
    rows, before = [], None
    for name in names:
        config = recipe(out, name, seed, steps, overrides)
        train, test = demo.write_shards(out / "shards", config)
        if before is None:
            before = top1(demo.untrained_result(config, train, test))
        pretraining.pretrain(config)
        after = top1(demo.trained_result(config.run_path, config, train, test))
        logged = [json.loads(row) for row in (config.run_path / "metrics.jsonl").read_text().splitlines()]
        rate = read_summary(config.run_path)["images_per_s"]
        spread = logged[-1]["feature_std"]
        rows.append({"name": name, "before": before, "after": after, "feature_std": spread, "images_per_s": rate})
        print(f"{name}: {before:.1f} → {after:.1f}", file=sys.stderr, flush=True)
    return rows


def recipe(out: Path, name: str, seed: int, steps: int, overrides: list[str]) -> Config:
    base = demo.demo_config(out, seed)
    run = f"{name.replace(' ', '_')}-{seed}"
    own = [f"name={run}", f"run_dir={out / run}", f"seed={seed}", f"train.steps={steps}"]
    data = [f"data.train={base.data.train}", f"train.precision={base.train.precision}"]
    return configs.resolve("demo", [*own, *data, *RECIPES[name], *overrides])


def top1(result: dict[str, Any]) -> float:
    accuracy: float = result["results"][str(demo.K)]["top1"]
    assert math.isfinite(accuracy)
    return accuracy


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| objective | k-NN before | after | gain | feature_std | images/s |", "|---|---|---|---|---|---|"]
    for r in rows:
        gain = r["after"] - r["before"]
        cells = [r["name"], *(f"{v:.1f} %" for v in (r["before"], r["after"])), f"{gain:+.1f}"]
        lines.append(f"| {' | '.join([*cells, format(r['feature_std'], '.2f'), format(r['images_per_s'], '.0f')])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
