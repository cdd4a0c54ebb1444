"""The schema of SWEEP.yaml, a grid of sizes × budgets × unique images × seeds on top of a run config.

It is read as strictly as a run config.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from esvit_scale import yaml_text
from esvit_scale.run_keys import AboveZero, Fraction, PathText, Positive, Seed
from esvit_scale.schema import Section, check


class Size(Section):
    """The size of one trunk, given by exactly one of `trunk`, `params`, `embed_dim` and `model`."""

    trunk: str | None = None  # a name of models/registry.py
    params: AboveZero | None = None  # number of parameters; selects the nearest shape of scaling/shapes.py
    embed_dim: Positive | None = None  # a multiple of 32; depths as in scaling/shapes.py unless they are given
    depths: Annotated[list[Positive], Field(min_length=1)] | None = None
    model: Annotated[dict[str, Any], Field(min_length=1)] | None = None  # keys of the run's section model; any trunk
    # Those of the sweep's budgets that this size is trained with, so that each budget has the sizes around its valley;
    # null: all.
    budgets: Annotated[list[AboveZero], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> "Size":
        given = [name for name in ("trunk", "params", "embed_dim", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"sizes: give one of trunk, params, embed_dim and model, got {' and '.join(given) or 'none'}"
            )
        if self.depths and self.embed_dim is None:
            raise ValueError("sizes: depths go with embed_dim")
        return self


class LearningRate(Section):
    """The rule of the learning rate: optim.lr of a cell = value · (trunk parameters / at_params)^exponent."""

    value: AboveZero | None = None  # null: optim.lr of the base config
    exponent: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0  # 0: one rate for all sizes, as EsViT
    at_params: AboveZero | None = None

    @model_validator(mode="after")
    def _reference(self) -> "LearningRate":
        if self.exponent and self.at_params is None:
            raise ValueError("lr: an exponent needs at_params, the size at which the rate is `value`")
        return self


class Evaluate(Section):
    """The evaluation of every finished cell: k-NN and a linear probe."""

    train: PathText  # labelled shards or class folders: the training set of k-NN and probe
    test: PathText
    linear: bool = True  # also fit a logistic regression to the features, for linear_error
    k: Positive = 20  # the k whose error is collected: the same for all cells, not the best of each
    whole: bool = False  # resize whole images to the crop's square, as `evaluate --whole`, instead of a centre crop
    checkpoints: Positive = 1  # evaluated along each run, evenly spaced to its last step; each is a row of runs.csv


class Machine(Section):
    """The machine that a cell runs on, to estimate GPU hours and check that the cell fits into memory."""

    gpus: Positive = 1
    gpu_memory: AboveZero = 80.0  # GiB of one GPU
    tflops: AboveZero | None = None  # TFLOP/s of one GPU on large matrix products; null: this machine's GPU is measured
    mfu: Annotated[Fraction, Field(gt=0)] = 0.35


class Limits(Section):
    """Bounds outside which a cell is refused."""

    min_steps: Positive = 100
    max_epochs: AboveZero = 800.0


class Sweep(Section):
    """The content of a complete sweep file: the base config, and the grid of values that its runs vary."""

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "sweep"
    out: PathText | None = None  # null: runs/sweeps/<name>
    base: str  # a preset's name or a YAML file: all values of the runs that the sweep does not set
    overrides: list[str] = Field(default=[])  # key=value on top of the base
    sizes: Annotated[list[Size], Field(min_length=1)]
    budgets: Annotated[list[AboveZero], Field(min_length=1)]  # FLOPs of a run, including heads, teacher and padding
    seeds: list[Seed] = Field(default=[0], min_length=1)
    unique_images: list[Positive | None] = Field(default=[None], min_length=1)  # null: the whole set
    lr: LearningRate = LearningRate()
    # scale: warm-ups and the last layer's freeze keep their share of the run; keep: their number of epochs
    # branches: constant schedules with a cooldown (optim.cooldown of the run); a longer run starts from the checkpoint at
    # which the next shorter one began to cool down
    horizon: Literal["scale", "keep", "branches"] = "scale"
    evaluate: Evaluate | None = None
    machine: Machine = Machine()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _budgets_of_sizes(self) -> "Sweep":
        for number, size in enumerate(self.sizes):
            if other := [budget for budget in size.budgets or [] if budget not in self.budgets]:
                raise ValueError(
                    f"sizes.{number}.budgets: {other[0]:g} is none of the sweep's budgets, "
                    f"{', '.join(f'{budget:g}' for budget in self.budgets)}"
                )
        return self

    @model_validator(mode="after")
    def _one_of_two_ways(self) -> "Sweep":
        if self.horizon == "branches" and self.evaluate and self.evaluate.checkpoints > 1:
            raise ValueError(
                "evaluate: checkpoints goes with horizon scale or keep; with branches every budget has its own cooldown, "
                "and thus its row"
            )
        return self

    @property
    def folder(self) -> Path:
        """Return the sweep's output folder: `out`, or runs/sweeps/<name>."""
        return Path(self.out) if self.out else Path("runs") / "sweeps" / self.name


def read(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        UserError: one line per problem, with the key and the nearest right value.
    """
    return check(Sweep, yaml_text.read(path), str(path))
