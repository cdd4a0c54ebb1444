"""What training learns on small labelled sets: raw pixels, an untrained trunk, the official EsViT code, and this project.

    python benchmarks/learning.py --set fashion --source FOLDER --official CLONE [--recipe NAME …] [--seeds 0 1 2]
                                  [--half validation] [--steps 1200] [--points 6] [--out DIR]

For every recipe and seed, the official modules and ours start from the same weights and see the same crops in the same
order. At --points steps along the way k-NN (k = 10) on the teacher's view features is measured, at the first and the last
also a logistic probe. At the end a table is printed, and with --out curves are drawn against images seen, FLOPs and time.
The time is that of the training steps, without the loading of crops, which both sides share, and without evaluation. Run it with OMP_NUM_THREADS=1 and read processor time on
a machine that others use.

A finished curve is a file in --out, so the same command goes on where it was stopped. learning_sets.py has the sets.
`--recipe` names a preset, a YAML file, or one of RECIPES: `official` has the published settings, `tutorial` those of
docs/tutorial.md. `--official` is a clone of the official code; without it that side is left out.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import learning_sets  # noqa: E402
from official import OfficialStep  # noqa: E402
from step import where  # noqa: E402

from esvit_scale import config as configs  # noqa: E402
from esvit_scale.checkpoint import official  # noqa: E402
from esvit_scale.checkpoint.weights import Weights  # noqa: E402
from esvit_scale.config import Config  # noqa: E402
from esvit_scale.data import stream  # noqa: E402
from esvit_scale.data.evaluation import evaluation_batches  # noqa: E402
from esvit_scale.evaluate import knn, logistic  # noqa: E402
from esvit_scale.evaluate.features import raw_pixels, stage_cells  # noqa: E402
from esvit_scale.evaluate.labels import split_held_out  # noqa: E402
from esvit_scale.evaluate.metrics import accuracy, mean_interval, wilson_interval  # noqa: E402
from esvit_scale.models.initialize import initialize  # noqa: E402
from esvit_scale.models.registry import build_trunk  # noqa: E402
from esvit_scale.objective import costs  # noqa: E402
from esvit_scale.objective.network import build_network  # noqa: E402
from esvit_scale.objective.schedules import Schedules  # noqa: E402
from esvit_scale.parallel import world as worlds  # noqa: E402
from esvit_scale.train.trainer import Trainer  # noqa: E402

Json = dict[str, Any]
K = 10  # fixed in advance
KS = (3, 5, K, 20)  # all are recorded, so that both sides can be compared at the best
BATCH_OF_EVALUATION = 64
SEARCHED_ON = 10_000  # training images at most that the probe's penalty is chosen on: ten fits

# The trunk and the crops that the recipes share. Mean and deviation are those of `shards stats`; a picture that has
# meaning left to right is not mirrored.
SMALL = [
    "train.global_batch=64",
    "train.precision=fp32",
    "model.embed_dim=32",
    "model.depths=[1, 1, 2]",
    "model.heads=[1, 2, 4]",
    "model.window=4",
    "data.global_crops.size=32",
    "data.local_crops=[{size: 24, count: 2, scale: [0.2, 0.6], augment: {blur: 0}}]",
]
FASHION = ["data.flip=0", "data.mean=[0.292, 0.292, 0.292]", "data.std=[0.352, 0.352, 0.352]"]
OF_SET = {
    "fashion": FASHION,
    "fashion-all": FASHION,
    "digits": ["data.flip=0"],
    "stamps": ["data.global_crops.augment.hue=0.02", "data.local_crops.0.augment.hue=0.02"],
    "demo": [],
}
RECIPES: dict[str, list[str]] = {
    # EsViT's settings of ImageNet, with the tutorial's trunk and crop sizes; dropped branches are random, so none are.
    "official": ["model.drop_path=0", "train.epochs=300"],
    "tutorial": [
        "model.drop_path=0",
        "data.global_crops.scale=[0.5, 1.0]",
        "data.global_crops.augment.blur=[0, 0]",
        "data.global_crops.augment.solarize=[0, 0]",
        "objective.prototypes=256",
        "objective.head_hidden=512",
        "objective.teacher_temp_end=0.04",
        "objective.teacher_temp_warmup_epochs=0",
        "objective.ema_momentum=0.98",
        "optim.lr=0.004",
        "optim.lr_end=0.00001",
        "optim.warmup_epochs=2",
        "optim.weight_decay_end=0.04",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=learning_sets.NAMES, default="digits")
    parser.add_argument("--source", type=Path, help="folder in which the set's Debian package was unpacked")
    parser.add_argument("--half", choices=("validation", "test"), default="test", help="what is measured on")
    parser.add_argument("--official", type=Path, help="a clone of the official EsViT repository")
    parser.add_argument("--recipe", nargs="+", default=["tutorial"], help="names of RECIPES, presets or YAML files")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="config value to change in all recipes; repeatable",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--points", type=int, default=6, help="measurements along a run, beside that at step 0")
    parser.add_argument("--most", type=int, help="largest number of images of a half, for trying the script out")
    parser.add_argument("--whole", action="store_true", help="measure on whole pictures instead of the centre crop")
    parser.add_argument("--no-probe", action="store_true", help="k-NN alone, for a search: the probe takes minutes")
    parser.add_argument("--sides", nargs="+", choices=("ours", "official"), default=["ours", "official"])
    parser.add_argument("--out", type=Path, help="keeps sets and curves; the same command goes on with them")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = (options.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        sets = learning_sets.shards(options.set, options.half, options.source, out / "sets", options.most)
        world = worlds.start()  # the official loss needs a process group, too
        try:
            curves = list(measure(options, out, sets, world))
        finally:
            worlds.stop()
        if options.out:
            plot(curves, out / f"{options.set}.png")
    found = {"where": where(), "set": options.set, "half": options.half, "curves": curves}
    print(json.dumps(found, indent=2) if options.json else table(curves))


def measure(options: argparse.Namespace, out: Path, sets: tuple[Path, Path], world: Any) -> Iterator[Json]:
    """Yield the curve of every recipe, seed and side; those that --out has are read, not made again."""
    sides = [side for side in options.sides if side == "ours" or options.official]
    pixels: Json | None = None
    for name in options.recipe:
        for seed in options.seeds:
            config = recipe(name, options.set, seed, options.steps, sets[0], options.override)
            if pixels is None:
                pixels = {"side": "raw pixels", "recipe": "", "seed": 0}
                train, test = (
                    raw_pixels(path, config.data.global_crops.size, workers=0, whole=options.whole) for path in sets
                )
                yield pixels | {"points": [{"step": 0, "images": 0} | scores(train, test, not options.no_probe)]}
            for side in sides:
                if side == "official" and config.objective.name != "esvit":
                    continue
                how = ("-whole" if options.whole else "") + ("-no-probe" if options.no_probe else "")
                points = f"-{options.most}-{options.steps}-{options.points}{how}.json"
                path = out / f"{options.set}-{options.half}-{Path(name).stem}-{seed}-{side}{points}"
                if not resumable(path, config):
                    step = OurSide(config, world) if side == "ours" else OfficialSide(options.official, config)
                    points_of_curve = list(curve(step, config, sets, options))
                    whole = {"side": side, "recipe": name, "seed": seed, "config": configs.dump(config)}
                    path.write_text(json.dumps(whole | {"points": points_of_curve}, indent=1) + "\n")
                yield json.loads(path.read_text())


def resumable(path: Path, config: Config) -> bool:
    """Return whether the file holds this config's curve; one of another config is made again."""
    return path.is_file() and json.loads(path.read_text())["config"] == configs.dump(config)


def recipe(name: str, of_set: str, seed: int, steps: int, train: Path, overrides: list[str]) -> Config:
    """Return the config of a recipe for a set."""
    own = [f"data.train={train}", "data.workers=0", f"seed={seed}", f"train.steps={steps}", "name=learning"]
    if name in RECIPES:
        return configs.resolve("", [*SMALL, *OF_SET[of_set], *RECIPES[name], *own, *overrides])
    no_local = not configs.resolve(name).data.local_crops
    about_set = [line for line in OF_SET[of_set] if not (no_local and "local_crops" in line)]
    return configs.resolve(name, [*about_set, *own, *overrides])


# --- the two sides ---------------------------------------------------------------------------------------------------


class OurSide:
    """The trainer's own step, as in a run."""

    def __init__(self, config: Config, world: Any) -> None:
        steps = stream.steps_per_epoch(config, stream.open_data(config))
        self.trainer = Trainer(config, world, Schedules(config, steps))

    def step(self, micro: stream.MicroBatch) -> float:
        """Take a step; return its loss."""
        return float(self.trainer.train_step([micro]).logs["loss"])

    def trunk(self) -> torch.nn.Module:
        """Return the trunk that evaluation reads: the teacher's."""
        trunk: torch.nn.Module = self.trainer.engines.teacher.network.trunk
        return trunk


class OfficialSide:
    """The official modules, with the order and the schedules of the official trainer."""

    def __init__(self, clone: Path, config: Config) -> None:
        self.config = config
        self.steps = stream.steps_per_epoch(config, stream.open_data(config))
        self.schedules = Schedules(config, self.steps)
        self.student, self.teacher, self.loss = OfficialStep.modules(clone, config, torch.device("cpu"))
        network = build_network(config)
        initialize(network, config.seed)
        tensors = {name: p.detach() for name, p in network.named_parameters()}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "initial.pth"
            official.write(file, Weights(config, {"student": tensors, "teacher": tensors}, {}))
            theirs = torch.load(file, weights_only=True)["teacher"]
        for module in (self.student, self.teacher):
            module.load_state_dict(theirs, strict=False)  # indices and masks are computed
        self.teacher.requires_grad_(False)
        named = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        bare = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
        decaying = [p for name, p in named if not (name.endswith(".bias") or p.ndim == 1)]
        groups: list[Json] = [{"params": decaying}, {"params": bare, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)
        self.done = 0

    def step(self, micro: stream.MicroBatch) -> float:
        """Take a step in the official order; return its loss."""
        step, schedules = self.done, self.schedules
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = schedules.lr(step)
            group["weight_decay"] = schedules.weight_decay(step) if i == 0 else 0.0
        images = len(micro.positions)
        views = [view for group in micro.crops for view in group.chunk(len(group) // images)]
        with torch.no_grad():
            targets = self.teacher(views[:2])
        loss = self.loss(self.student(views), targets, step // self.steps, None)
        self.optimizer.zero_grad()
        loss.backward()
        self._clip_and_freeze(schedules.last_layer_frozen(step))
        self.optimizer.step()
        momentum = schedules.ema_momentum(step)
        with torch.no_grad():
            for s, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                t.mul_(momentum).add_((1 - momentum) * s)
        self.done += 1
        return float(loss.detach())

    def _clip_and_freeze(self, frozen: bool) -> None:
        for name, p in self.student.named_parameters():
            if p.grad is None:
                continue
            if self.config.optim.clip:
                factor = self.config.optim.clip / (p.grad.norm(2).item() + 1e-6)
                if factor < 1:
                    p.grad.mul_(factor)
            if frozen and "last_layer" in name:
                p.grad = None

    def trunk(self) -> torch.nn.Module:
        """Return the teacher's trunk as one of ours, with the official weights."""
        trunk, _ = official.to_our_names(self.teacher.state_dict())
        ours = build_trunk(self.config)
        ours.load_state_dict(trunk)
        return ours


# --- curves ----------------------------------------------------------------------------------------------------------


def curve(side: Any, config: Config, sets: tuple[Path, Path], options: argparse.Namespace) -> Iterator[Json]:
    """Train, and yield what is measured at step 0 and at `options.points` steps to the last.

    Seconds are those of the steps; `all_cpu_seconds` has the loading of crops, too.
    """
    steps, batch, points, whole = config.train.steps or 0, config.train.global_batch, options.points, options.whole
    due = {round(steps * i / points) for i in range(points + 1)}
    flops = costs.image_flops(config)
    spent = {"seconds": 0.0, "cpu_seconds": 0.0, "all_cpu_seconds": 0.0}
    losses: list[float] = []
    ahead = stream.batches(config, stream.open_data(config), 0, 1, 0, steps)
    for done in range(steps + 1):
        if done in due:
            row = {"step": done, "images": done * batch, "flops": done * batch * flops, **spent}
            loss = {"loss": float(np.mean(losses))} if losses else {}
            probed = done in (0, steps) and not options.no_probe
            yield row | loss | of_trunk(side.trunk(), config.data.global_crops.size, sets, probed, whole, done == steps)
            losses.clear()
        if done < steps:
            cpu = time.process_time()
            micro = stream.micro_batches(config, next(ahead), torch.device("cpu"), torch.float32)[0]
            losses.append(timed(partial(side.step, micro), spent))
            spent["all_cpu_seconds"] += time.process_time() - cpu


def timed(step: Callable[[], float], spent: Json) -> float:
    """Return the step's loss, and add its wall and processor time to `spent`."""
    began, cpu = time.perf_counter(), time.process_time()
    loss = step()
    spent["seconds"] += time.perf_counter() - began
    spent["cpu_seconds"] += time.process_time() - cpu
    return loss


class Measured(NamedTuple):
    """Features [N, D] of a set and their labels [N]."""

    features: Tensor
    labels: Tensor


def of_trunk(
    trunk: Any, size: int, sets: tuple[Path, Path], probed: bool, whole: bool = False, maps: bool = False
) -> Json:
    """Return the scores of a trunk's view features, with the logistic probe if `probed`, and k-NN on `maps` of stages."""
    was = trunk.training
    trunk.eval()
    train, test = (measured(trunk, path, size, whole, maps) for path in sets)
    trunk.train(was)
    found = scores(train[0], test[0], probed)
    if maps:
        found["knn_by_stage"] = {str(s): by_k(train[s], test[s]) for s in range(1, len(train))}
    return found


@torch.no_grad()
def measured(trunk: Any, source: Path, size: int, whole: bool, maps: bool) -> list[Measured]:
    """Return the view features of a set's images and, if wanted, the cells of every stage's map, in one pass."""
    stages = range(1, len(trunk.depths) + 1) if maps else ()
    parts: list[list[Tensor]] = [[] for _ in (0, *stages)]
    labels: list[Tensor] = []
    for batch in evaluation_batches(source, size, BATCH_OF_EVALUATION, whole=whole):
        found = [trunk([batch.images]).view, *(stage_cells(trunk, batch.images, s) for s in stages)]
        for part, features in zip(parts, found, strict=True):
            part.append(features)
        labels.append(batch.labels)
    joined = []
    while parts:  # 60,000 maps of a stage are gigabytes: no second copy of all stages at once
        joined.append(Measured(torch.cat(parts.pop(0)), torch.cat(labels)))
    return joined


def by_k(train: Any, test: Any) -> dict[str, float]:
    """Return the k-NN accuracy in % for every k of KS."""
    found = knn.knn(train.features, train.labels, test.features, test.labels, ks=KS)
    return {str(k): found[k].top1 for k in KS}


def scores(train: Any, test: Any, probed: bool = True) -> Json:
    """Return k-NN, the logistic probe (if `probed`) and the effective rank of features, accuracies in % with 95 % intervals."""
    nearest = by_k(train, test)
    near = nearest[str(K)]
    n = len(test.labels)
    found: Json = {}
    if probed:
        linear = probe(train, test)
        found = {"linear": linear, "linear_interval": wilson_interval(linear, n)}
    return found | {
        "knn": near,
        "knn_interval": wilson_interval(near, n),
        "knn_by_k": nearest,
        "rank": effective_rank(test.features),
        "majority": 100 * float(torch.bincount(test.labels).max()) / n,
    }


def probe(train: Any, test: Any) -> float:
    """Return the accuracy of a logistic regression whose penalty is chosen on a part of the training images."""
    classes = int(train.labels.max()) + 1
    fit, chosen_on = split_held_out(train.labels[:SEARCHED_ON], 0)

    def rows(which: Tensor) -> logistic.LabelledFeatures:
        return logistic.LabelledFeatures(train.features, which, train.labels[which], classes)

    best, _ = logistic.search_penalty(rows(fit), rows(chosen_on))
    final = logistic.fit(rows(torch.arange(len(train.labels))), best.l2)
    return accuracy(final.scores(test.features), test.labels)


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the spectrum of centred unit rows: in how many directions features differ."""
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    energy = torch.linalg.svdvals(unit - unit.mean(0)).square()
    share = energy / energy.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))


# --- table and plot --------------------------------------------------------------------------------------------------


def table(curves: list[Json]) -> str:
    """Return a Markdown table of the last points, over seeds, and of how the two sides compare."""
    lines = [
        "| features | images seen | TFLOPs | step time, s | processor s | k-NN | 95 % | logistic | 95 % | rank |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, side), some in grouped(curves).items():
        last = [one["points"][-1] for one in some]
        rows = [(f"{side} {name}".strip(), last)]
        if side == "ours":
            rows.insert(0, (f"untrained {name}", [one["points"][0] for one in some]))
        for label, points in rows:
            p = points[0]
            cells = [label, f"{p['images']:,}", f"{p.get('flops', 0) / 1e12:.1f}"]
            cells += [f"{np.mean([q.get(key, 0.0) for q in points]):.0f}" for key in ("seconds", "cpu_seconds")]
            for key in ("knn", "linear"):
                if key not in p:  # --no-probe
                    cells += ["–", "–"]
                    continue
                mean, interval = mean_interval([q[key] for q in points])
                low, high = interval or p[f"{key}_interval"]
                cells += [f"{mean:.1f}", f"{low:.1f} to {high:.1f}"]
            lines.append(f"| {' | '.join([*cells, format(np.mean([q['rank'] for q in points]), '.1f')])} |")
    return "\n".join([*lines, "", *comparisons(curves)])


def comparisons(curves: list[Json]) -> list[str]:
    """Return a line for each recipe that both sides ran: the largest differences of their curves, and the time ratio."""
    lines, groups = [], grouped(curves)
    for name in dict.fromkeys(one["recipe"] for one in curves):
        ours, theirs = groups.get((name, "ours"), []), groups.get((name, "official"), [])
        if not ours or not theirs:
            continue
        pairs = [
            (a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x["points"], y["points"], strict=True)
        ]
        loss = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs if "loss" in a)
        near = max(abs(a["knn"] - b["knn"]) for a, b in pairs)
        spent = [
            sum(one["points"][-1][key] for one in side) for key in ("seconds", "cpu_seconds") for side in (theirs, ours)
        ]
        lines.append(
            f"{name}: mean losses between points differ by {loss:.1e} at most, k-NN by {near:.2f} points; the official "
            f"steps took {spent[0] / spent[1]:.2f} times our time, {spent[2] / spent[3]:.2f} times our processor time"
        )
    return lines


def grouped(curves: list[Json]) -> dict[tuple[str, str], list[Json]]:
    groups: dict[tuple[str, str], list[Json]] = {}
    for one in curves:
        groups.setdefault((one["recipe"], one["side"]), []).append(one)
    return groups


def plot(curves: list[Json], path: Path) -> None:
    """Draw k-NN against images seen, FLOPs and step time, one line per recipe and side (mean over seeds)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    scales = {"images": "images seen", "flops": "FLOPs", "seconds": "step time, s"}
    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), scales.items(), strict=True):
        for (name, side), some in grouped(curves).items():
            values = np.array([[p["knn"] for p in one["points"]] for one in some]).mean(0)
            if side == "raw pixels":
                axes.axhline(values[0], color="grey", linestyle=":", label=side)
            else:
                x = np.array([[p[key] for p in one["points"]] for one in some]).mean(0)
                axes.plot(x, values, marker=".", linestyle="--" if side == "official" else "-", label=f"{side} {name}")
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel(f"k-NN (k = {K}), %")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
