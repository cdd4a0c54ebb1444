"""The run config: the one place that owns every number of a run.

A config starts from the defaults below (EsViT's Swin-T recipe). A preset or YAML file replaces some of them, and dotted
`key=value` overrides replace some of those. `resolve` returns the complete config or raises one clear error; `dump`
writes the copy that reproduces the run. yaml_text.py reads the YAML, schema.py words the errors, overrides.py applies
the overrides. None of them imports torch, so that they load at once on a login node.
"""

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from esvit_scale import yaml_text
from esvit_scale.division import batch_problem, largest_divisor, nearest_multiple
from esvit_scale.errors import UserError, nearest
from esvit_scale.overrides import apply_override
from esvit_scale.schema import Section, check

FORMAT_VERSION = 1

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]


class GlobalCrops(Section):
    """The two views that the teacher sees."""

    size: Positive = 224  # pixels; also fixes the trunk's windows and shifts (see models/swin.py)
    scale: Scale = (0.4, 1.0)  # smallest and largest fraction of the image's area


class LocalCrops(Section):
    """One group of small views that only the student sees."""

    size: Positive = 96  # pixels
    count: Positive = 8  # views in the group
    scale: Scale = (0.05, 0.4)  # smallest and largest fraction of the image's area


class Mixed(Section):
    """One data set of a mix; the sets of a mix are either all shard sets or all plain tars."""

    urls: PathText  # as data.train
    weight: AboveZero = 1.0  # its number of samples relative to the other sets'


class Data(Section):
    """The data: where images come from, and how they are ordered, cropped and augmented."""

    # Folder of a shard set (with manifest.json), or plain WebDataset tars: a path or URL, {000..123} and pipe: allowed
    train: PathText = ""
    mix: list[Mixed] = Field(default_factory=list)  # several sets, instead of train
    # Samples of one epoch: needed for plain tars, whose number of samples is not known; for a mix, null means all its sets
    epoch_samples: Positive | None = None
    held_out: PathText = ""  # labelled shards or class folders on which train.knn_every measures; never trained on
    workers: Count = 4  # loader processes per rank; 0 decodes in the training process
    # Folder on each node's own disk to which shards are copied before training; may name the node's $VARIABLES; null: no copy
    stage: PathText | None = None
    slots: Positive | None = None  # canonical slots of the data order; null: largest divisor of global_batch ≤ 512
    shuffle_window: Positive = 8  # shards whose samples are shuffled together
    global_crops: GlobalCrops = GlobalCrops()
    local_crops: list[LocalCrops] = Field(default_factory=lambda: [LocalCrops()])
    photometric: Literal["device", "workers"] = "device"  # what computes colour, blur and solarisation: GPU or loader
    channels: Annotated[int, Field(ge=1, le=16)] = (
        3  # channels of an image; 3 channels of 8 bits are RGB, to which photographs are converted
    )
    bits: Literal[8, 16] = 8  # bits of a channel; 16 bits are kept until the crop
    mean: Annotated[list[Finite], Field(min_length=1)] | None = (
        None  # mean of each channel, where 1 is the largest value; null: ImageNet's
    )
    std: Annotated[list[AboveZero], Field(min_length=1)] | None = None  # standard deviation of each channel, likewise


class Model(Section):
    """The trunk and its initial values."""

    trunk: str = "swin_t"  # a name in models/registry.py, or timm:NAME; null below means the trunk's own value
    window: Positive = 7  # side of an attention window, in tokens
    drop_path: Fraction = 0.1  # stochastic depth: rate of the last block
    embed_dim: Positive | None = None  # width of the first stage
    depths: Annotated[list[Positive], Field(min_length=1)] | None = None
    heads: Annotated[list[Positive], Field(min_length=1)] | None = None
    freeze_patch_embed: bool = False  # the patch projection keeps its random values (MoCo v3's cure for instability)
    # Weights from which a new run starts: a run dir, step folder, .safetensors file or official .pth; null: random
    init_from: PathText | None = None


class Objective(Section):
    """The loss, its heads and the teacher's schedule."""

    name: str = "esvit"  # a name in objective/registry.py
    regions: bool = (
        True  # esvit only: false leaves the view loss alone (DINO's objective); false for all other objectives
    )
    prototypes: Positive = 65536  # K, outputs of a head
    head_hidden: Positive = 2048  # width inside the head
    bottleneck: Positive = 256  # width of the head's output
    predictor_hidden: Positive | None = (
        None  # width inside the predictor, for objectives that have one; null: head_hidden
    )
    norm_last_layer: bool = False  # true: the prototypes keep unit norm
    student_temp: AboveZero = 0.1
    teacher_temp: AboveZero = 0.04  # at the start; changes once an epoch
    teacher_temp_end: AboveZero = 0.07
    teacher_temp_warmup_epochs: Count = 30
    centering: Literal["center", "sinkhorn"] = "center"  # for esvit and dino; sinkhorn works on each batch alone
    center_momentum: Fraction = 0.9
    ema_momentum: Fraction = 0.996  # of the teacher at the first step; cosine to ema_momentum_end
    ema_momentum_end: Fraction = 1.0

    @model_validator(mode="before")
    @classmethod
    def _regions_are_esvits(cls, values: Any) -> Any:
        """Make `regions` default to false for every objective but esvit.

        objective/registry.py checks whether a value that the user gave fits the objective.
        """
        if isinstance(values, dict) and values.get("name", "esvit") != "esvit":
            return {"regions": False, **values}
        return values


class Optim(Section):
    """The optimizer, its schedules and the gradient clipping."""

    name: Literal["adamw", "sgd", "lamb", "lars", "apex_adam", "apex_lamb"] = "adamw"
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    momentum: Beta = 0.9  # for sgd and lars
    lr: Rate = 5e-4  # per 256 images: the peak is lr · global_batch / 256
    lr_end: Rate = 1e-6
    warmup_epochs: Rate = 10
    # cosine: over the whole run. constant: lr, weight decay and EMA momentum keep their first values and go linearly to
    # their last ones in the final fraction `cooldown` of the run, so that a longer run begins like a shorter one
    schedule: Literal["cosine", "constant"] = "cosine"
    cooldown: Fraction = 0.2
    weight_decay: Rate = 0.04
    weight_decay_end: Rate = 0.4
    decay: Literal["weights", "all"] = "weights"  # all: biases and norms decay too (MoCo v3, SimSiam)
    clip: AboveZero | None = 3.0  # gradient norm; null: no clipping
    clip_by: Literal["tensor", "global"] = "tensor"  # tensor: each parameter's own norm, as in the official code
    freeze_last_layer_epochs: Count = 1


class Train(Section):
    """The length of the run, its batch, precision, checkpoints and logging."""

    epochs: Positive = 300
    steps: Positive | None = None  # when set, replaces epochs as the length of the run and of its schedules
    global_batch: Positive = 512  # images per optimizer step, over all ranks and micro-batches
    grad_accum: Positive = 1
    # bf16, fp16: weights in that type, with fp32 masters (fp16: dynamic loss scaling, GPU only);
    # autocast: fp32 weights, matrix products in bf16
    precision: Literal["fp32", "bf16", "fp16", "autocast"] = "bf16"
    ds_config: str = "zero1"  # a name in ds_configs/, or a path to a .json file
    activation_checkpointing: Literal["none", "torch", "deepspeed", "fairscale"] = "none"
    compile: bool = False  # torch.compile of the blocks; ZeRO 0–2; the first step then takes minutes
    log_every: Positive = 10  # steps
    checkpoint_every: Positive = 500  # steps
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = None  # also save when this much time has passed
    keep_checkpoints: Positive = 3  # newest checkpoints that are kept
    keep_every: Positive | None = None  # steps between checkpoints that are never removed; null: none
    knn_every: Positive | None = None  # steps between k-NN accuracies of the teacher on data.held_out; null: none
    skips_before_rollback: Positive = (
        10  # consecutive steps without finite gradients before the run goes back to its last checkpoint
    )
    rollbacks: Count = 2  # how often a run may go back, each time continuing with other data; then it stops (exit 3)
    hang_minutes: Annotated[float, Field(gt=0)] = (
        30.0  # minutes without progress after which a rank ends the job (exit 75)
    )


class Config(Section):
    """The complete config of a run, made by `resolve`; comments beside the keys above give their units and meanings."""

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    run_dir: PathText | None = None  # null: runs/<name>
    seed: Seed = 0
    data: Data = Data()
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    train: Train = Train()

    @model_validator(mode="after")
    def _cross_field(self) -> "Config":
        problems = list(_cross_field_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def run_path(self) -> Path:
        """Return the run dir: `run_dir`, or runs/<name>."""
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name

    @property
    def slots(self) -> int:
        """Return the number of canonical slots of the data order.

        The default depends on the global batch alone, never on the world size.
        """
        return self.data.slots or largest_divisor(self.train.global_batch, 512)

    @property
    def crop_sizes(self) -> list[int]:
        """Return the size in pixels of every crop, in the batch's order: the two global crops first."""
        return [self.data.global_crops.size] * 2 + [g.size for g in self.data.local_crops for _ in range(g.count)]

    @property
    def peak_lr(self) -> float:
        """Return the learning rate after the warm-up, `optim.lr` scaled to the global batch."""
        return self.optim.lr * self.train.global_batch / 256


def _cross_field_problems(c: Config) -> list[str]:
    problems = []
    batch = c.train.global_batch
    if problem := batch_problem(batch, c.train.grad_accum):
        problems.append(problem)
    if c.data.slots and batch % c.data.slots:
        problems.append(
            f"data.slots: {c.data.slots} does not divide train.global_batch={batch}; nearest: {largest_divisor(batch, c.data.slots)}"
        )
    for where, (low, high) in [("data.global_crops.scale", c.data.global_crops.scale)] + [
        (f"data.local_crops.{i}.scale", g.scale) for i, g in enumerate(c.data.local_crops)
    ]:
        if not 0 < low <= high:
            problems.append(f"{where}: needs 0 < low <= high, got [{low}, {high}]")
    problems += _pixel_problems(c.data)
    if c.train.knn_every and not c.data.held_out:
        problems.append("train.knn_every: needs data.held_out, labelled shards or class folders to measure on")
    if c.train.knn_every and c.train.knn_every % c.train.log_every:
        problems.append(
            f"train.knn_every: {c.train.knn_every} is no multiple of train.log_every={c.train.log_every}; "
            f"nearest: {nearest_multiple(c.train.knn_every, c.train.log_every)}"
        )
    if c.model.depths and c.model.heads and len(c.model.depths) != len(c.model.heads):
        problems.append(
            f"model.heads: {len(c.model.heads)} stages, but model.depths has {len(c.model.depths)}; give one number a stage in both"
        )
    return problems


def _pixel_problems(data: Data) -> list[str]:
    problems = []
    for key, values, other in (("mean", data.mean, data.std), ("std", data.std, data.mean)):
        if values and len(values) != data.channels:
            problems.append(f"data.{key}: {len(values)} numbers for data.channels={data.channels}; give one a channel")
        if not values and other:
            problems.append(f"data.{key}: not set, but its pair is; set data.mean and data.std, or neither")
    if data.photometric == "workers" and (data.channels, data.bits) != (3, 8):
        problems.append(
            f"data.photometric: workers computes 8-bit RGB, not {data.channels} channels of {data.bits} bits; "
            "nearest: device"
        )
    return problems


# --- reading -------------------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """Return the names of the shipped presets, sorted."""
    folder = resources.files("esvit_scale") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve(config: str, overrides: list[str] | None = None) -> Config:
    """Return the complete config of a preset's name or a YAML file, with dotted `key=value` overrides on top.

    Raises:
        UserError: file not found, YAML that does not parse, unknown key, wrong type, or numbers that do not fit
            together; one line per problem, each with where it stands (the file or the override), the key and the nearest
            right value.
    """
    values = _read(config)
    for override in overrides or []:
        apply_override(values, override, Config)
    return validate(values, where=config, overrides=overrides)


def load(path: Path) -> Config:
    """Read a config file that `dump` wrote."""
    return validate(yaml_text.read(path), where=str(path))


def dump(config: Config) -> str:
    """Return YAML that `resolve` reads back to the same config."""
    return yaml_text.dump(config.model_dump(mode="json"))


def validate(values: dict[str, Any], where: str, overrides: list[str] | None = None) -> Config:
    """Convert plain values (nested dicts) to a Config.

    Errors name `where` as the source of the values; they are those that `resolve` raises.
    """
    return check(Config, values, where, overrides)


def require_training_data(config: Config) -> None:
    """Raise UserError if the config names no training data; presets leave it to the user."""
    if not (config.data.train or config.data.mix):
        raise UserError(
            "data.train: not set; give a folder of shards, for example data.train=/data/my-shards"
            " (`esvit-scale shards create IMAGES /data/my-shards` makes one)"
        )


def differences(a: Config, b: Config) -> list[str]:
    """Return `key: a → b` for every key whose values differ."""
    flat_a, flat_b = _flatten(a.model_dump(mode="json")), _flatten(b.model_dump(mode="json"))
    keys = [*flat_a, *(k for k in flat_b if k not in flat_a)]
    return [f"{k}: {flat_a.get(k)} → {flat_b.get(k)}" for k in keys if flat_a.get(k) != flat_b.get(k)]


def _read(config: str) -> dict[str, Any]:
    """Read the YAML of a config file or preset and return its values, without the defaults."""
    path = Path(config).expanduser()
    if path.is_file():
        return yaml_text.parse(yaml_text.text_of(path), config)
    if (path / "config.yaml").is_file():
        raise UserError(f"{config}: is a run dir; its config is {path / 'config.yaml'}")
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{config}: no such config file{nearest(path.stem, preset_names())}")
    if config not in preset_names():
        raise UserError(f"{config}: neither a file nor a preset{nearest(config, preset_names())}")
    return yaml_text.parse((resources.files("esvit_scale") / "configs" / f"{config}.yaml").read_text("utf-8"), config)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections, and lists of sections, to a dict of dotted key → value."""
    if isinstance(node, dict):
        items: Any = node.items()
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        items = enumerate(node)
    else:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
