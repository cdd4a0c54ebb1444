"""The run config: every number of a run has its one owner here.

A config is YAML: the defaults below (EsViT's Swin-T recipe), a preset or file on top, then dotted `key=value`
overrides. `resolve` gives the complete config or one clear error; `dump` writes the copy that reproduces the run.
No torch in this module: it must be cheap to import on a login node.
"""

import math
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from esvit_scale.errors import UserError, nearest

FORMAT_VERSION = 1

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[tuple[Fraction, Fraction], Field(strict=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class GlobalCrops(Section):
    """The two views that the teacher sees."""

    size: Positive = 224  # pixels; also fixes the trunk's windows and shifts (see models/swin.py)
    scale: Scale = (0.4, 1.0)  # share of the image's area


class LocalCrops(Section):
    """One group of small views that only the student sees."""

    size: Positive = 96
    count: Positive = 8
    scale: Scale = (0.05, 0.4)


class Data(Section):
    train: str = ""  # folder of a shard set (with manifest.json)
    workers: Count = 4  # loader processes per rank; 0 decodes in the training process
    slots: Positive | None = (
        None  # canonical slots of the data order; null: the largest divisor of global_batch up to 512
    )
    shuffle_window: Positive = 8  # shards whose samples are shuffled together
    global_crops: GlobalCrops = GlobalCrops()
    local_crops: list[LocalCrops] = [LocalCrops()]


class Model(Section):
    trunk: str = "swin_t"  # a name of models/registry.py; the keys left null below are the trunk's own
    window: Positive = 7
    drop_path: Fraction = 0.1
    embed_dim: Positive | None = None
    depths: list[Positive] | None = None
    heads: list[Positive] | None = None


class Objective(Section):
    name: str = "esvit"
    regions: bool = True  # false: the view loss alone (DINO's objective)
    prototypes: Positive = 65536
    head_hidden: Positive = 2048
    bottleneck: Positive = 256
    norm_last_layer: bool = False  # true: the prototypes' gains stay at 1
    student_temp: Temperature = 0.1
    teacher_temp: Temperature = 0.04  # at the start; moves once an epoch
    teacher_temp_end: Temperature = 0.07
    teacher_temp_warmup_epochs: Count = 30
    center_momentum: Fraction = 0.9
    ema_momentum: Fraction = 0.996  # of the teacher; cosine to ema_momentum_end, per step
    ema_momentum_end: Fraction = 1.0


class Optim(Section):
    name: Literal["adamw"] = "adamw"
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    lr: Rate = 5e-4  # per 256 images: the peak is lr · global_batch / 256
    lr_end: Rate = 1e-6
    warmup_epochs: Rate = 10
    weight_decay: Rate = 0.04
    weight_decay_end: Rate = 0.4
    clip: Annotated[float, Field(gt=0)] | None = 3.0  # gradient norm; null: no clipping
    clip_by: Literal["tensor", "global"] = "tensor"  # tensor: as the official code, each parameter's own norm
    freeze_last_layer_epochs: Count = 1


class Train(Section):
    epochs: Positive = 300
    steps: Positive | None = None  # when set, replaces epochs as the length of the run and of its schedules
    global_batch: Positive = 512  # images per optimizer step, over all ranks and micro-batches
    grad_accum: Positive = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    ds_config: str = "zero1"  # a name in ds_configs/ or a path
    activation_checkpointing: Literal["none", "torch", "deepspeed", "fairscale"] = "none"
    log_every: Positive = 10  # steps
    checkpoint_every: Positive = 500  # steps
    keep_checkpoints: Positive = 3


class Config(Section):
    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    run_dir: str | None = None  # null: runs/<name>
    seed: Count = 0
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
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.name

    @property
    def slots(self) -> int:
        """Canonical slots of the data order: a function of the batch alone, never of the world size."""
        return self.data.slots or largest_divisor(self.train.global_batch, 512)

    @property
    def crop_sizes(self) -> list[int]:
        """Size in pixels of every crop, in the batch's order: the two globals first."""
        return [self.data.global_crops.size] * 2 + [g.size for g in self.data.local_crops for _ in range(g.count)]

    @property
    def peak_lr(self) -> float:
        return self.optim.lr * self.train.global_batch / 256


def _cross_field_problems(c: Config) -> "list[str]":
    problems = []
    batch, accum = c.train.global_batch, c.train.grad_accum
    if batch % accum:
        problems.append(
            f"train.global_batch: {batch} does not divide into train.grad_accum={accum} micro-batches; nearest: {nearest_multiple(batch, accum)}"
        )
    if c.data.slots and batch % c.data.slots:
        problems.append(
            f"data.slots: {c.data.slots} does not divide train.global_batch={batch}; nearest: {largest_divisor(batch, c.data.slots)}"
        )
    for where, (low, high) in [("data.global_crops.scale", c.data.global_crops.scale)] + [
        (f"data.local_crops.{i}.scale", g.scale) for i, g in enumerate(c.data.local_crops)
    ]:
        if not 0 < low <= high:
            problems.append(f"{where}: needs 0 < low <= high, got [{low}, {high}]")
    if c.model.depths and c.model.heads and len(c.model.depths) != len(c.model.heads):
        problems.append(
            f"model.heads: {len(c.model.heads)} stages, but model.depths has {len(c.model.depths)}; give one number a stage in both"
        )
    return problems


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of `n` that is ≤ `at_most`."""
    return max(d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i) if d <= at_most)


def nearest_multiple(n: int, of: int) -> int:
    return max(of, round(n / of) * of)


# --- reading -------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number (YAML 1.1 reads it as a string) and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def preset_names() -> list[str]:
    folder = resources.files("esvit_scale") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve(config: str, overrides: list[str] | None = None) -> Config:
    """The complete config of a preset's name or a YAML file, with dotted `key=value` overrides on top.

    Raises:
        UserError: file not found, YAML that does not parse, unknown key, wrong type, numbers that do not fit together.
    """
    values = _read(config)
    for override in overrides or []:
        _apply_override(values, override)
    return validate(values, where=config)


def load(path: Path) -> Config:
    """A config file written by `dump`."""
    return validate(_parse(path.read_text(), str(path)), where=str(path))


def dump(config: Config) -> str:
    """YAML that `resolve` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def validate(values: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(e, where) for e in error.errors())) from None


def differences(a: Config, b: Config) -> list[str]:
    """`key: a → b` for every leaf that differs."""
    flat_a, flat_b = _flatten(a.model_dump(mode="json")), _flatten(b.model_dump(mode="json"))
    keys = [*flat_a, *(k for k in flat_b if k not in flat_a)]
    return [f"{k}: {flat_a.get(k)} → {flat_b.get(k)}" for k in keys if flat_a.get(k) != flat_b.get(k)]


def _read(config: str) -> dict[str, Any]:
    path = Path(config)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"{config}: no such config file{_presets_hint(path.stem)}")
        return _parse(path.read_text(), config)
    if config not in preset_names():
        raise UserError(f"{config}: neither a file nor a preset{nearest(config, preset_names())}")
    return _parse((resources.files("esvit_scale") / "configs" / f"{config}.yaml").read_text(), config)


def _presets_hint(stem: str) -> str:
    return f"; presets: {', '.join(preset_names())}"


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold `key: value` lines, not a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: overrides are written key=value, for example train.global_batch=64")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not valid YAML") from None
    node: Any = values
    *parents, leaf = key.split(".")
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, override)
        else:
            child = node.setdefault(part, _default_at(parents[: i + 1]))
            if child is None:
                child = node[part] = {}
            node = child
        if not isinstance(node, dict | list):
            raise UserError(f"{override!r}: {'.'.join(parents[: i + 1])} is a value, not a section")
    if isinstance(node, list):
        _item(node, leaf, override)
        node[int(leaf)] = value
    else:
        node[leaf] = value


def _item(node: list[Any], index: str, override: str) -> Any:
    if not index.isdigit() or int(index) >= len(node):
        raise UserError(f"{override!r}: {index!r} is not an item of a list of {len(node)}; use 0 to {len(node) - 1}")
    return node[int(index)]


def _default_at(path: list[str]) -> Any:
    """The default value (as plain data) of a section that the file left out, so that lists can be indexed."""
    node: Any = Config().model_dump(mode="json")
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, list) else {}


def _explain(error: Any, where: str) -> str:
    loc = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        parent = ".".join(str(part) for part in error["loc"][:-1])
        return f"{where}: unknown key {loc}{nearest(loc, _known_keys(parent))}"
    if error["type"] == "value_error":
        return "\n".join(f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines())
    return f"{where}: {loc}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _known_keys(parent: str) -> list[str]:
    keys = _flatten(Config().model_dump(mode="json"))
    sections = {k.rsplit(".", i)[0] for k in keys for i in range(1, k.count(".") + 1)}
    inside = [k for k in [*keys, *sections] if not parent or k.startswith(parent + ".")]
    return inside or list(keys)


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
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
