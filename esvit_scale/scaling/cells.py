"""The cells of a sweep: for each run its complete config, what it costs, and the reasons to refuse it."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from esvit_scale import config as configs
from esvit_scale.checkpoint import frozen_teacher
from esvit_scale.config import Config
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.remote import place
from esvit_scale.errors import UserError
from esvit_scale.objective import costs
from esvit_scale.objective.schedules import cooldown_start
from esvit_scale.scaling import plan as plans
from esvit_scale.scaling import shapes, subset
from esvit_scale.scaling.plan import GIB, Plan, Speed
from esvit_scale.scaling.shapes import Shape, Values
from esvit_scale.scaling.sweep_file import Sweep

SAVE_MINUTES = 30.0  # checkpoint_minutes of runs that otherwise save only at a branch point and at the end
WARM_UP_SHARE = 0.5  # largest fraction of a run that may be warm-up


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its config, its cost, and the reasons to refuse it."""

    index: int
    name: str
    config: Config
    shape: Shape | Values
    budget: float  # FLOPs asked for
    flops: float  # FLOPs of the run: the budget rounded to whole steps
    unique_images: int
    plan: Plan
    parent: "Cell | None" = None  # the shorter run from whose checkpoint this one continues
    problems: list[str] = field(default_factory=list)  # not empty: refused

    @property
    def path(self) -> Path:
        """Return the run dir."""
        return self.config.run_path

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps."""
        assert self.config.train.steps is not None
        return self.config.train.steps

    @property
    def branch_step(self) -> int:
        """Return the step at which the cooldown begins, from whose checkpoint longer runs continue."""
        return cooldown_start(self.steps, self.config.optim.cooldown)

    @property
    def gpu_hours(self) -> float | None:
        """Return the GPU hours of the steps that this cell trains itself, without its parent's; None: no known rate."""
        own, hours = self.steps - (self.parent.branch_step if self.parent else 0), self.plan.numbers["gpu_hours"]
        return None if hours is None else float(hours) * own / self.steps

    @property
    def images_seen(self) -> int:
        """Return the number of images that training reads, repeats counted."""
        return self.steps * self.config.train.global_batch

    @property
    def epochs(self) -> float:
        """Return how many times training sees each unique image."""
        return self.images_seen / self.unique_images


def cells(sweep: Sweep, where: str, speed: Speed | None) -> list[Cell]:
    """Return all cells of a sweep, ordered by size, budget, unique images and seed.

    The order is fixed, so that an index names the same cell as long as the sweep file does not change.

    Args:
        where: path of the sweep file, for errors.
        speed: the rate from which GPU hours are estimated; None: the cells have none.

    Raises:
        UserError: a size, the base config or its data do not fit, or two cells are the same run.
    """
    base = frozen_teacher.described_in(configs.resolve(sweep.base, list(sweep.overrides)))
    if base.stages:
        raise UserError(
            f"{where}: base: {sweep.base} has stages, and a sweep sets the length of each run itself; stages=[]"
        )
    configs.require_training_data(base)
    if base.data.mix:
        raise UserError(f"{where}: {sweep.base}: data.mix: a sweep needs one shard set; set data.train instead")
    if base.train.patience:
        raise UserError(f"{where}: {sweep.base}: train.patience: a sweep needs runs of their full length; leave it out")
    data = place.open_set(base.data.train, base.data)
    for source in (sweep.evaluate.train, sweep.evaluate.test) if sweep.evaluate else ():
        if not Path(source).is_dir():
            raise UserError(f"{where}: evaluate: {source}: no such folder")
    sizes = [(shapes.shape_of(size, base), size.budgets or sweep.budgets) for size in sweep.sizes]
    grid = [point for shape, budgets in sizes for point in product([shape], budgets, sweep.unique_images, sweep.seeds)]
    found = [_cell(i, sweep, where, base, data, speed, *point) for i, point in enumerate(grid)]
    names = [cell.name for cell in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: two cells are the same run: {', '.join(twice[:3])}")
    return _with_parents(found) if sweep.horizon == "branches" else found


def _with_parents(found: list[Cell]) -> list[Cell]:
    """Return the cells in the same order, each with its parent: the next shorter run of equal size, data and seed."""
    made: dict[int, Cell] = {}
    for cell in sorted(found, key=lambda c: c.budget):
        same = [
            c for c in made.values() if _line(c) == _line(cell) and not c.problems and c.branch_step < cell.branch_step
        ]
        made[cell.index] = replace(cell, parent=max(same, key=lambda c: c.branch_step, default=None))
    return [made[cell.index] for cell in found]


def _line(cell: Cell) -> tuple[object, ...]:
    """Return what cells must share for one to continue another: shape, unique images and seed."""
    return cell.shape, cell.unique_images, cell.config.seed


def _cell(
    index: int,
    sweep: Sweep,
    where: str,
    base: Config,
    data: Manifest,
    speed: Speed | None,
    shape: Shape | Values,
    budget: float,
    unique: int | None,
    seed: int,
) -> Cell:
    values = base.model_dump(mode="json")
    values["model"] |= shape.overrides
    values["seed"] = seed
    sized = configs.validate(values, where)
    params = costs.parameters(sized).trunk
    per_step = costs.image_flops(sized) * base.train.global_batch
    steps = max(1, round(budget / per_step))
    images = data.samples if unique is None else unique
    some = f"-u{images}" if len(sweep.unique_images) > 1 else ""
    name = f"n{_short(params)}-c{_short(budget)}{some}-s{seed}"
    values |= {"name": name, "run_dir": str(sweep.folder / "cells" / name)}
    values["optim"]["lr"] = _rate(sweep, base, params)
    values["train"]["steps"] = steps
    if unique is not None:
        values["data"]["train"] = str(subset.path_of(sweep, unique))
    if sweep.horizon == "scale":
        _scale_horizon(values, base, data, images, steps)
    elif sweep.horizon == "branches":
        # All runs warm up like the shortest one; otherwise a longer run could not continue a shorter one.
        _scale_horizon(values, base, data, images, max(1, round(min(sweep.budgets) / per_step)))
        branch = max(1, cooldown_start(steps, base.optim.cooldown))
        values["optim"]["schedule"] = "constant"
        values["train"] |= {"checkpoint_every": branch, "keep_every": branch}
        values["train"]["checkpoint_minutes"] = base.train.checkpoint_minutes or SAVE_MINUTES
    if sweep.evaluate and sweep.evaluate.checkpoints > 1:
        every = evaluated_every(steps, sweep)
        values["train"] |= {"checkpoint_every": every, "keep_every": every}
        values["train"]["checkpoint_minutes"] = base.train.checkpoint_minutes or SAVE_MINUTES
    config = configs.validate(values, where)
    planned = plans.plan(config, sweep.machine.gpus, int(sweep.machine.gpu_memory * GIB), images, speed)
    cell = Cell(index, name, config, shape, budget, float(steps * per_step), images, planned)
    cell.problems.extend(_problems(cell, sweep, data, unique))
    return cell


def evaluated_every(steps: int, sweep: Sweep) -> int:
    """Return after how many steps each a run of `steps` has a checkpoint that is evaluated."""
    return max(1, steps // sweep.evaluate.checkpoints) if sweep.evaluate else steps


def evaluated_steps(cell: Cell, sweep: Sweep) -> list[int]:
    """Return the steps whose checkpoints are evaluated; the last step of the run is the last of them."""
    every = evaluated_every(cell.steps, sweep)
    count = sweep.evaluate.checkpoints if sweep.evaluate else 1
    return [*(step for i in range(1, count) if (step := i * every) < cell.steps), cell.steps]


def _rate(sweep: Sweep, base: Config, params: int) -> float:
    """Return the learning rate that the sweep's rule gives a cell with `params` trunk parameters."""
    rule = sweep.lr
    value = base.optim.lr if rule.value is None else rule.value
    return value * (params / rule.at_params) ** rule.exponent if rule.at_params else value


def _scale_horizon(values: dict[str, Any], base: Config, data: Manifest, images: int, steps: int) -> None:
    """Scale the horizons in `values` (warm-ups, last-layer freeze, Gram teachers) to a run of `steps` on `images` images.

    Each setting then covers the same fraction of that run as of the base config's run.
    """
    base_epochs = (
        base.train.epochs if base.train.steps is None else base.train.steps / _steps_an_epoch(base, data.samples)
    )
    ratio = steps / _steps_an_epoch(base, images) / base_epochs
    values["optim"]["warmup_epochs"] = base.optim.warmup_epochs * ratio
    values["optim"]["freeze_last_layer_epochs"] = round(base.optim.freeze_last_layer_epochs * ratio)
    values["objective"]["teacher_temp_warmup_epochs"] = round(base.objective.teacher_temp_warmup_epochs * ratio)
    if base.objective.gram_start is not None:
        of_steps = steps / (base_epochs * _steps_an_epoch(base, data.samples))
        values["objective"]["gram_start"] = round(base.objective.gram_start * of_steps)
        values["objective"]["gram_every"] = max(1, round(base.objective.gram_every * of_steps))


def _steps_an_epoch(base: Config, images: int) -> int:
    return max(1, images // base.train.global_batch)


def _problems(cell: Cell, sweep: Sweep, data: Manifest, unique: int | None) -> list[str]:
    """Return the reasons to refuse a cell, each with what to change."""
    found, limits = [], sweep.limits
    if cell.steps < limits.min_steps:
        found.append(f"{cell.steps} steps are fewer than limits.min_steps={limits.min_steps}: raise the budget")
    if cell.epochs > limits.max_epochs:
        found.append(
            f"sees each image {cell.epochs:.0f} times, more than limits.max_epochs={limits.max_epochs:g}: lower the budget"
        )
    if cell.unique_images < cell.config.train.global_batch:
        found.append(f"{cell.unique_images} unique images are fewer than a batch of {cell.config.train.global_batch}")
    else:
        warm_up = cell.config.optim.warmup_epochs * _steps_an_epoch(cell.config, cell.unique_images) / cell.steps
        if warm_up > WARM_UP_SHARE:
            found.append(f"warms up for {warm_up:.0%} of its steps: raise the budget or lower optim.warmup_epochs")
    if cell.plan.fits is None:
        found.append(str(plans.refusal(cell.plan, cell.config, sweep.machine.gpus)))
    if unique is not None and unique not in (sums := subset.sums(data)):
        near = min(sums, key=lambda s: abs(s - unique))
        found.append(
            f"unique_images {unique}: no number of the set's first shards holds exactly that many images; nearest: {near}"
        )
    return found


# --- the table -------------------------------------------------------------------------------------------------------


def table(found: list[Cell], sweep: Sweep) -> str:
    """Return the table that `sweep plan` prints, with the totals below it."""
    header = (
        f"{'':>4s} {'cell':28s} {'trunk':>8s} {'width':>5s} {'depths':>10s} {'steps':>8s} {'images':>8s} {'epochs':>7s} "
        f"{'FLOPs':>8s} {'lr':>8s} {'GPU h':>8s}  setting"
    )
    lines = [header]
    for cell in found:
        n = cell.plan.numbers
        model = cell.config.model
        width, depths = str(model.embed_dim or "–"), "-".join(map(str, model.depths)) if model.depths else "–"
        fits = "refused" if cell.problems else (cell.plan.fits.name if cell.plan.fits else "")
        lines.append(
            f"{cell.index:4d} {cell.name:28s} {_short(n['trunk_params']):>8s} {width:>5s} {depths:>10s} "
            f"{cell.steps:8,d} {_short(cell.images_seen):>8s} {cell.epochs:7.1f} {_short(cell.flops):>8s} "
            f"{cell.config.optim.lr:8.2g} {_cost(cell.gpu_hours):>8s}  {fits}"
        )
        lines += [f"       {problem}" for problem in cell.problems]
    good = [cell for cell in found if not cell.problems]
    rule = f"lr = {sweep.lr.value or 'the base config’s'}"
    if sweep.lr.exponent:
        rule += f" · (trunk parameters / {sweep.lr.at_params:g})^{sweep.lr.exponent:g}"
    refused = f", {len(found) - len(good)} refused" if len(good) < len(found) else ""
    lines += [
        "",
        f"{len(good)} cells{refused}; {_total_cost(good, sweep)}",
        f"learning rate: {rule}, per 256 images; horizon: {sweep.horizon}",
    ]
    return "\n".join(lines)


def _total_cost(good: list[Cell], sweep: Sweep) -> str:
    """Return what the cells cost together: GPU hours, or FLOPs where no rate is known."""
    hours = [cell.gpu_hours for cell in good if cell.gpu_hours is not None]
    if not hours:
        return f"{sum(cell.flops for cell in good):.3g} FLOPs; give machine.tflops in the sweep file for GPU hours"
    source = good[0].plan.numbers["speed"]["source"]
    return f"{_cost(sum(hours))} GPU hours on {sweep.machine.gpus} GPU(s) a cell (estimate, at {source})"


def _cost(hours: float | None) -> str:
    if hours is None:
        return "–"
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def _short(number: float) -> str:
    """Return a number with at most three digits, such as 27.5M or 1.2e15, in characters that suit file names."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= number < 1000 * size and number < 1e11:
            return f"{number / size:.3g}{letter}"
    if number < 1000:
        return f"{number:.3g}"
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def as_json(found: list[Cell]) -> list[dict[str, Any]]:
    """Return the cells as plain values, for `sweep plan --json`."""
    return [
        {
            "index": cell.index,
            "name": cell.name,
            "run_dir": str(cell.path),
            "trunk_params": cell.plan.numbers["trunk_params"],
            "head_params": cell.plan.numbers["head_params"],
            "flops": cell.flops,
            "steps": cell.steps,
            "images_seen": cell.images_seen,
            "unique_images": cell.unique_images,
            "lr": cell.config.optim.lr,
            "seed": cell.config.seed,
            "gpu_hours": cell.gpu_hours,
            "continues": cell.parent.name if cell.parent else None,
            "problems": cell.problems,
        }
        for cell in found
    ]
