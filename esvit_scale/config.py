"""The run config: every number of a run has its one owner here.

A config is YAML: the defaults below (EsViT's Swin-T recipe), a preset or file on top, then dotted `key=value`
overrides. `resolve` gives the complete config or one clear error; `dump` writes the copy that reproduces the run.
No torch in this module: it must be cheap to import on a login node.
"""

import math
import os
import re
import types
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from esvit_scale.errors import UserError, nearest

FORMAT_VERSION = 1

Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


AnySection = TypeVar("AnySection", bound=Section)


class GlobalCrops(Section):
    """The two views that the teacher sees."""

    size: Positive = 224  # pixels; also fixes the trunk's windows and shifts (see models/swin.py)
    scale: Scale = (0.4, 1.0)  # share of the image's area


class LocalCrops(Section):
    """One group of small views that only the student sees."""

    size: Positive = 96
    count: Positive = 8
    scale: Scale = (0.05, 0.4)


class Mixed(Section):
    """One of several sets of plain tars that are streamed together."""

    urls: PathText  # as data.train
    weight: AboveZero = 1.0  # its share of the samples, relative to the other sets'


class Data(Section):
    # Folder of a shard set (with manifest.json), or plain WebDataset tars: a path or URL, {000..123} and pipe: allowed
    train: PathText = ""
    mix: list[Mixed] = []  # several sets of plain tars, instead of train
    epoch_samples: Positive | None = None  # of plain tars, which do not say how many samples they hold
    held_out: PathText = ""  # labelled shards or class folders that train.knn_every measures; never trained on
    workers: Count = 4  # loader processes per rank; 0 decodes in the training process
    # Folder on each node's own disk that shards are copied to before training; may hold its $VARIABLES; null: no copy
    stage: PathText | None = None
    slots: Positive | None = None  # canonical slots of the data order; null: largest divisor of global_batch ≤ 512
    shuffle_window: Positive = 8  # shards whose samples are shuffled together
    global_crops: GlobalCrops = GlobalCrops()
    local_crops: list[LocalCrops] = [LocalCrops()]
    photometric: Literal["device", "workers"] = "device"  # where colour, blur and solarisation are computed


class Model(Section):
    trunk: str = "swin_t"  # a name of models/registry.py, or timm:NAME; the keys left null below are the trunk's own
    window: Positive = 7
    drop_path: Fraction = 0.1
    embed_dim: Positive | None = None
    depths: Annotated[list[Positive], Field(min_length=1)] | None = None
    heads: Annotated[list[Positive], Field(min_length=1)] | None = None
    freeze_patch_embed: bool = False  # the patch projection keeps its random values (MoCo v3's cure for instability)
    # Weights that a fresh run starts from, own (run dir, step folder, .safetensors) or official (.pth); null: random
    init_from: PathText | None = None


class Objective(Section):
    name: str = "esvit"  # a name of objective/registry.py
    regions: bool = True  # of esvit, false: the view loss alone (DINO's objective); all others: false
    prototypes: Positive = 65536
    head_hidden: Positive = 2048
    bottleneck: Positive = 256  # width of the head's output
    predictor_hidden: Positive | None = (
        None  # width inside the predictor, of objectives that have one; null: head_hidden
    )
    norm_last_layer: bool = False  # true: the prototypes' gains stay at 1
    student_temp: AboveZero = 0.1
    teacher_temp: AboveZero = 0.04  # at the start; moves once an epoch
    teacher_temp_end: AboveZero = 0.07
    teacher_temp_warmup_epochs: Count = 30
    centering: Literal["center", "sinkhorn"] = "center"  # of esvit and dino; sinkhorn: over each batch, without memory
    center_momentum: Fraction = 0.9
    ema_momentum: Fraction = 0.996  # of the teacher; cosine to ema_momentum_end, per step
    ema_momentum_end: Fraction = 1.0

    @model_validator(mode="before")
    @classmethod
    def _regions_are_esvits(cls, values: Any) -> Any:
        """The default of `regions` is that of the objective named; whether `true` fits it, its registry says."""
        if isinstance(values, dict) and values.get("name", "esvit") != "esvit":
            return {"regions": False, **values}
        return values


class Optim(Section):
    name: Literal["adamw", "sgd", "lamb", "lars", "apex_adam", "apex_lamb"] = "adamw"
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    momentum: Beta = 0.9  # of sgd and lars
    lr: Rate = 5e-4  # per 256 images: the peak is lr · global_batch / 256
    lr_end: Rate = 1e-6
    warmup_epochs: Rate = 10
    # cosine: over the whole run. constant: lr, weight decay and EMA momentum stay at their first values and go to their
    # ends, on a straight line, in the last `cooldown` of the run: a longer run begins as a shorter one does
    schedule: Literal["cosine", "constant"] = "cosine"
    cooldown: Fraction = 0.2
    weight_decay: Rate = 0.04
    weight_decay_end: Rate = 0.4
    decay: Literal["weights", "all"] = "weights"  # all: biases and norms decay too (MoCo v3, SimSiam)
    clip: AboveZero | None = 3.0  # gradient norm; null: no clipping
    clip_by: Literal["tensor", "global"] = "tensor"  # tensor: as the official code, each parameter's own norm
    freeze_last_layer_epochs: Count = 1


class Train(Section):
    epochs: Positive = 300
    steps: Positive | None = None  # when set, replaces epochs as the length of the run and of its schedules
    global_batch: Positive = 512  # images per optimizer step, over all ranks and micro-batches
    grad_accum: Positive = 1
    # bf16, fp16: working copies, with fp32 masters (fp16: dynamic loss scaling, GPU only); autocast: fp32 weights, bf16 products
    precision: Literal["fp32", "bf16", "fp16", "autocast"] = "bf16"
    ds_config: str = "zero1"  # a name in ds_configs/ or a path
    activation_checkpointing: Literal["none", "torch", "deepspeed", "fairscale"] = "none"
    compile: bool = False  # torch.compile of the blocks; ZeRO 0–2; the first step then takes minutes
    log_every: Positive = 10  # steps
    checkpoint_every: Positive = 500  # steps
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = None  # also save when this much time has passed
    keep_checkpoints: Positive = 3
    keep_every: Positive | None = None  # steps whose checkpoints are kept for good: every so many
    knn_every: Positive | None = None  # steps between k-NN accuracies of the teacher on data.held_out; null: none
    skips_before_rollback: Positive = (
        10  # steps without finite gradients, in a row, before the run goes back to its last checkpoint
    )
    rollbacks: Count = 2  # how often it may go back, each time with other data ahead; then it stops (exit 3)
    hang_minutes: Annotated[float, Field(gt=0)] = 30.0  # a rank without progress for so long ends the job (exit 75)


class Config(Section):
    """A complete run; `resolve` makes one, and every key's unit and meaning stand beside it above."""

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


def _cross_field_problems(c: Config) -> list[str]:
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


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of `n` that is ≤ `at_most`."""
    return max(d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i) if d <= at_most)


def nearest_multiple(n: int, of: int) -> int:
    return max(of, round(n / of) * of)


# --- reading -------------------------------------------------------------------------------------------------------

_FLOAT = re.compile(r"^[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\d+[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, and a repeated key is an error.

    YAML 1.1, PyYAML's own, reads 1e-3 as text, 010 as 8, 1:30 as 90, `no` as false and 2024-01-01 as a date.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (the base class's attribute, emptied)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
            if key_node.value in seen:
                problem = f"key {key_node.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would not read back as text (runs named 12e4 and 08)."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def preset_names() -> list[str]:
    folder = resources.files("esvit_scale") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve(config: str, overrides: list[str] | None = None) -> Config:
    """The complete config of a preset's name or a YAML file, with dotted `key=value` overrides on top.

    Raises:
        UserError: file not found, YAML that does not parse, unknown key, wrong type, numbers that do not fit together;
            one line per problem, each with where it stands (the file or the override), the key and the nearest right value.
    """
    values = _read(config)
    for override in overrides or []:
        _apply_override(values, override)
    return validate(values, where=config, overrides=overrides)


def load(path: Path) -> Config:
    """A config file written by `dump`."""
    return validate(read_yaml(path), where=str(path))


def dump(config: Config) -> str:
    """YAML that `resolve` reads back to the same config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


def validate(values: dict[str, Any], where: str, overrides: list[str] | None = None) -> Config:
    return check(Config, values, where, overrides)


def check(
    schema: type[AnySection], values: dict[str, Any], where: str, overrides: list[str] | None = None
) -> AnySection:
    """`values` as a Config, or as another file's schema made of Sections; raises UserError as `resolve` does."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(e, _origin(e["loc"], where, overrides or []), schema) for e in error.errors()]
        raise UserError("\n".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises UserError: cannot be read, not YAML, not `key: value` lines."""
    return _parse(_text(path), str(path))


def require_training_data(config: Config) -> None:
    """Pretraining reads shards; the presets cannot know where yours are."""
    if not (config.data.train or config.data.mix):
        raise UserError(
            "data.train: not set; give a folder of shards, for example data.train=/data/my-shards"
            " (`esvit-scale shards create IMAGES /data/my-shards` makes one)"
        )


def differences(a: Config, b: Config) -> list[str]:
    """`key: a → b` for every leaf that differs."""
    flat_a, flat_b = _flatten(a.model_dump(mode="json")), _flatten(b.model_dump(mode="json"))
    keys = [*flat_a, *(k for k in flat_b if k not in flat_a)]
    return [f"{k}: {flat_a.get(k)} → {flat_b.get(k)}" for k in keys if flat_a.get(k) != flat_b.get(k)]


def _read(config: str) -> dict[str, Any]:
    path = Path(config).expanduser()
    if path.is_file():
        return _parse(_text(path), config)
    if (path / "config.yaml").is_file():
        raise UserError(f"{config}: is a run dir; its config is {path / 'config.yaml'}")
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{config}: no such config file{nearest(path.stem, preset_names())}")
    if config not in preset_names():
        raise UserError(f"{config}: neither a file nor a preset{nearest(config, preset_names())}")
    return _parse((resources.files("esvit_scale") / "configs" / f"{config}.yaml").read_text("utf-8"), config)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    values = _yaml(text, where)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: must hold `key: value` lines, got {_show(values)}")
    return values


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


# --- overrides -----------------------------------------------------------------------------------------------------


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{_show(override)}: overrides are written key=value, for example train.global_batch=64")
    *parents, leaf = path = key.strip().split(".")
    node: Any = values
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = _default_at(parents[: i + 1])
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"{_show(override)}: {'.'.join(parents[: i + 1])} is a value, not a section")
    node[_index(node, leaf, override) if isinstance(node, list) else leaf] = _override_value(path, text, override)


def _override_value(path: list[str], text: str, override: str) -> Any:
    """Where the schema has text, the text as it stands (a path may hold any character, a name may look like a number),
    unless it is in quotes; elsewhere YAML."""
    if _declared(path) is not str or (text[:1] in ("'", '"') and text[-1:] == text[:1]):
        return _yaml(text, _show(override))
    return None if _optional(path) and text in ("", "null", "~") else text


def _index(node: list[Any], index: str, override: str) -> int:
    if not index.isdecimal() or int(index) >= len(node):
        known = f"use 0 to {len(node) - 1}" if node else "give the whole list"
        raise UserError(f"{_show(override)}: {index!r} is not an item of a list of {len(node)}; {known}")
    return int(index)


def _default_at(path: list[str]) -> Any:
    """The default value (as plain data) of a section that the file left out, so that lists can be indexed."""
    node: Any = Config().model_dump(mode="json")
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, list) else {}


# --- the schema, asked ---------------------------------------------------------------------------------------------


def _annotation(path: list[str], schema: Any = None) -> Any:
    """The type as declared at a dotted path (list items by their number); None where the schema has no such key."""
    node: Any = schema or Config
    for part in path:
        node = _bare(node)
        if isinstance(node, type) and issubclass(node, Section):
            node = node.model_fields[part].annotation if part in node.model_fields else None
        else:
            node = get_args(node)[0] if get_origin(node) in (list, tuple) and part.isdecimal() else None
    return node


def _bare(annotation: Any) -> Any:
    """The type without Annotated and without `| None`."""
    while get_origin(annotation) in (Annotated, Union, types.UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not type(None))
    return annotation


def _declared(path: list[str], schema: Any = None) -> Any:
    return _bare(_annotation(path, schema))


def _optional(path: list[str]) -> bool:
    return type(None) in get_args(_annotation(path))


def _keys(section: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, sections and leaves; a list of sections shows its item 0."""
    for name in section.model_fields:
        yield prefix + name
        kind = _bare(section.model_fields[name].annotation)
        item = get_args(kind)[0] if get_origin(kind) is list else kind
        if isinstance(item, type) and issubclass(item, Section):
            yield from _keys(item, f"{prefix}{name}." if item is kind else f"{prefix}{name}.0.")


# --- errors --------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, written [1, 2]",
    "tuple_type": "a list of two numbers",
    "missing": "a list of two numbers",
    "too_long": "a list of two numbers",
    "too_short": "at least one number",
    "model_type": "a section (`key: value` lines)",
}


def _origin(loc: tuple[int | str, ...], where: str, overrides: list[str]) -> str:
    """What to put right: the last override that set this key, else the file."""
    key = _dotted(loc) + "."
    for override in reversed(overrides):
        overridden = override.partition("=")[0].strip() + "."
        if key.startswith(overridden) or overridden.startswith(key):
            return _show(override)
    return where


def _explain(error: Any, where: str, schema: Any) -> str:
    kind, loc, value = error["type"], _dotted(error["loc"]), error["input"]
    if kind == "value_error":
        return "\n".join(f"{where}: {line}" for line in str(error["ctx"]["error"]).splitlines())
    if kind == "extra_forbidden":
        return f"{where}: unknown key {loc}{_nearest_key(loc, schema)}"
    if kind == "string_pattern_mismatch":
        return (
            f"{where}: {loc}: letters, digits, '.', '_' and '-', beginning with a letter or digit; got {_show(value)}"
        )
    if kind == "literal_error":
        known = re.findall(r"'(.*?)'", error["ctx"]["expected"])
        close = get_close_matches(str(value), known, n=1)
        near = f"; did you mean {close[0]!r}?" if close else ""
        return f"{where}: {loc}: expected {error['ctx']['expected']}, got {_show(value)}{near}"
    for bound, sign in [("ge", "≥"), ("le", "≤"), ("gt", ">"), ("lt", "<")]:
        if bound in error.get("ctx", {}):
            near = f"; nearest: {error['ctx'][bound]}" if bound in ("ge", "le") else ""
            return f"{where}: {loc}: must be {sign} {error['ctx'][bound]}, got {_show(value)}{near}"
    if kind == "missing":
        loc = loc.rpartition(".")[0]
    if kind in _EXPECTED:
        return f"{where}: {loc}: expected {_EXPECTED[kind]}, got {_show(value)}{_as_written(kind, value)}"
    return f"{where}: {loc}: {error['msg'][0].lower()}{error['msg'][1:]}, got {_show(value)}"


def _as_written(kind: str, value: Any) -> str:
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "string_type" and not isinstance(value, list | dict):
        return "; put it in quotes"
    if kind == "float_type" and str(value).lower().lstrip("+-.") in ("inf", "nan"):
        return "; it must be finite"
    return ""


def _show(value: Any) -> str:
    """A value as the user wrote it, short."""
    text = {"None": "nothing", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc)


def _nearest_key(loc: str, schema: Any) -> str:
    """The sibling that was meant, else the key of that name in another section, else what is known here."""
    parent, _, leaf = loc.rpartition(".")
    section = _declared(parent.split("."), schema) if parent else schema
    siblings = list(section.model_fields)
    elsewhere: dict[str, str] = {}
    for key in _keys(schema):
        elsewhere.setdefault(key.rpartition(".")[2], key)
    if close := get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {f'{parent}.{close[0]}'.lstrip('.')!r}?"
    if close := get_close_matches(leaf, elsewhere, n=1, cutoff=0.8):
        return f"; did you mean {elsewhere[close[0]]!r}?"
    return f"; known: {', '.join(siblings)}"


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value, sections and lists of sections opened."""
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
