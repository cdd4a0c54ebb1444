"""The run config: the one place that owns every number of a run.

A config starts from the defaults in run_keys.py (EsViT's Swin-T recipe). A preset or YAML file replaces some of them, and
dotted `key=value` overrides replace some of those. `resolve` returns the complete config or raises one clear error; `dump`
writes the copy that reproduces the run. yaml_text.py reads the YAML, schema.py words the errors, overrides.py applies
the overrides. None of them imports torch, so that they load at once on a login node.
"""

from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from esvit_scale import presets, run_stages, store_urls, yaml_text
from esvit_scale.division import batch_problem, largest_divisor, nearest_multiple
from esvit_scale.errors import UserError, nearest
from esvit_scale.overrides import apply_override, parse_override
from esvit_scale.presets import names as preset_names
from esvit_scale.run_keys import (
    LENGTH_KEYS,
    Data,
    GlobalCrops,
    LocalCrops,
    Model,
    Objective,
    Optim,
    PathText,
    Seed,
    Train,
)
from esvit_scale.schema import Section, check

FORMAT_VERSION = 1


class Config(Section):
    """The complete config of a run, made by `resolve`; run_keys.py has its sections."""

    format_version: Literal[1] = 1
    """Version of the file format; leave it out."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run."""
    run_dir: PathText | None = None
    """Folder of the run's files; null: runs/<name>."""
    seed: Seed = 0
    """[no unit] Random seed of initial weights, data order and crops."""
    data: Data = Data()
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    train: Train = Train()
    stages: list[dict[str, Any]] = Field(default_factory=list)
    """Training stages, one after the other in one run (docs/stages.md): of each, the keys that change, with dots, and its
    length, train.epochs or train.steps. A stage keeps what the ones before it changed."""

    @field_validator("stages", mode="before")
    @classmethod
    def _flat_stages(cls, stages: Any) -> Any:
        return [run_stages.flatten(stage, cls) for stage in stages] if isinstance(stages, list) else stages

    @model_validator(mode="after")
    def _cross_field(self) -> "Config":
        problems = list(_cross_field_problems(self)) or list(_stage_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def of_stages(self) -> list["Config"]:
        """Return the complete config of every training stage, in order; of a run without stages, the config itself."""
        if not self.stages:
            return [self]
        values, found = self._without_stages(), list[Config]()
        for number, stage in enumerate(self.stages):
            values = run_stages.after(values, stage, f"stages.{number}", Config)
            found.append(validate(values, where=f"stages.{number}"))
        return found

    def _without_stages(self) -> dict[str, Any]:
        return self.model_dump(mode="json") | {"stages": []}

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
        """Return the size in pixels of every crop, in the batch's order: the global crops first."""
        return [self.data.global_crops.size] * self.data.global_crops.count + [
            g.size for g in self.data.local_crops for _ in range(g.count)
        ]

    @property
    def signal_views(self) -> dict[str, int]:
        """Return the number of views per sample of every modality beside the image that is read, in a fixed order."""
        views = {"audio": self.data.audio.views, "video": self.data.video.views, "text": self.data.text.views}
        return {name: count for name, count in views.items() if count}

    @property
    def peak_lr(self) -> float:
        """Return the learning rate after the warm-up, `optim.lr` scaled to the global batch."""
        return self.optim.lr * self.train.global_batch / 256


def _cross_field_problems(c: Config) -> list[str]:
    problems = []
    batch = c.train.global_batch
    if problem := batch_problem(batch, c.train.grad_accum):
        problems.append(problem)
    audio = c.data.audio
    if audio.views and not round(audio.rate * audio.seconds):
        problems.append(
            f"data.audio.seconds: {audio.seconds:g} s at {audio.rate} Hz are no sample; nearest: {1 / audio.rate:g}"
        )
    if c.data.slots and batch % c.data.slots:
        problems.append(
            f"data.slots: {c.data.slots} does not divide train.global_batch={batch}; nearest: {largest_divisor(batch, c.data.slots)}"
        )
    groups: list[tuple[str, GlobalCrops | LocalCrops]] = [("global_crops", c.data.global_crops)]
    groups += [(f"local_crops.{i}", group) for i, group in enumerate(c.data.local_crops)]
    for where, crops in groups:
        low, high = crops.scale
        if not 0 < low <= high:
            problems.append(f"data.{where}.scale: needs 0 < low <= high, got [{low}, {high}]")
        low, high = crops.augment.blur_radius
        if low > high:
            problems.append(f"data.{where}.augment.blur_radius: needs low <= high, got [{low}, {high}]")
    low, high = c.objective.mask_ratio
    if low > high:
        problems.append(f"objective.mask_ratio: needs low <= high, got [{low}, {high}]")
    if c.objective.gram_weight and c.objective.gram_start is None:
        problems.append(
            "objective.gram_weight: needs objective.gram_start, the steps after which Gram anchoring begins; the features "
            "must be good by then (docs/objectives.md)"
        )
    if c.objective.class_names and len(c.objective.class_names) != c.objective.classes:
        problems.append(
            f"objective.class_names: {len(c.objective.class_names)} names for objective.classes={c.objective.classes}; give "
            "one a class, or none"
        )
    if (c.data.mixup or c.data.cutmix) and not c.objective.classes:
        problems.append("data.mixup and data.cutmix mix labels, too, so they need objective.name=classify")
    problems += _pixel_problems(c.data)
    problems += _address_problems(c)
    if c.train.knn_every and not c.data.held_out:
        problems.append("train.knn_every: needs data.held_out, labelled shards or class folders to measure on")
    for key in ("keep_best", "patience"):
        learns_labels = c.objective.classes or c.data.global_crops.count == 1
        if getattr(c.train, key) and not c.train.knn_every and not learns_labels:
            problems.append(f"train.{key}: needs train.knn_every, the steps between two k-NN accuracies")
        if getattr(c.train, key) and learns_labels and not c.data.held_out:
            problems.append(f"train.{key}: needs data.held_out, labelled shards or class folders to measure on")
    for key in ("layer_decay", "trunk_rate", "freeze_trunk_steps"):
        if c.objective.students and getattr(c.optim, key) != getattr(Optim(), key):
            problems.append(f"optim.{key}: not offered with objective.students; train each student in a run of its own")
    if c.train.guard != "off" and not c.train.knn_every:
        problems.append("train.guard: needs train.knn_every, the steps between two measurements, and data.held_out")
    if c.train.knn_every and c.train.knn_every % c.train.log_every:
        problems.append(
            f"train.knn_every: {c.train.knn_every} is no multiple of train.log_every={c.train.log_every}; "
            f"nearest: {nearest_multiple(c.train.knn_every, c.train.log_every)}"
        )
    if c.train.compile and c.train.activation_checkpointing == "selective":
        problems.append(
            "train.compile: not possible with train.activation_checkpointing=selective, which sees single operations; "
            "nearest: torch"
        )
    further = {f"objective.students.{i}": student for i, student in enumerate(c.objective.students)}
    for where, model in {"model": c.model, **further}.items():
        if model.depths and model.heads and len(model.depths) != len(model.heads):
            problems.append(
                f"{where}.heads: {len(model.heads)} stages, but {where}.depths has {len(model.depths)}; give one number a stage in both"
            )
    if c.objective.students and c.optim.clip and c.optim.clip_by == "global":
        problems.append(
            "objective.students: one norm of all gradients would let students change each other; set optim.clip_by=tensor"
        )
    return problems


def _stage_problems(c: Config) -> Iterator[str]:
    """Yield the problems of training stages, in order, up to the first stage that has any."""
    if c.stages and c.train.patience:
        yield "train.patience: not offered with stages, whose lengths are fixed"
    values = before = c._without_stages()
    for number, stage in enumerate(c.stages):
        where = f"stages.{number}"
        try:
            values = run_stages.after(values, stage, where, Config)
            validate(values, where)
        except UserError as error:
            yield from str(error).splitlines()
            return
        found = list(run_stages.problems(stage, _flatten(before), _flatten(values)))
        yield from (f"{where}: {problem}" for problem in found)
        if found:
            return


def _address_problems(c: Config) -> list[str]:
    """Return the problems of keys that take an address, and of folders for which one is given: it would be made here."""
    problems = []
    places = {"data.train": c.data.train, "data.held_out": c.data.held_out, "train.mirror": c.train.mirror or ""}
    for key, place in places.items():
        if meant := store_urls.address_meant(place):
            problems.append(f"{key}: {place}: did you mean {meant}?")
    if c.train.mirror and not problems and not store_urls.is_set_url(c.train.mirror):
        problems.append(
            f"train.mirror: {c.train.mirror} is no address of a folder in a store, such as s3://bucket/runs"
        )
    for key, folder in {"run_dir": c.run_dir, "data.stage": c.data.stage, "data.cache_dir": c.data.cache_dir}.items():
        if folder and (store_urls.protocol(folder) or store_urls.address_meant(folder)):
            hint = "; train.mirror copies checkpoints to a store" if key == "run_dir" else ""
            problems.append(f"{key}: {folder} is an address, and a folder on this machine is needed{hint}")
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


def resolve(
    config: str,
    overrides: list[str] | None = None,
    below: dict[str, Any] | None = None,
    above: dict[str, Any] | None = None,
) -> Config:
    """Return the complete config of a preset's name or a YAML file, with dotted `key=value` overrides on top.

    Args:
        below: values, as nested dicts, that config and overrides replace.
        above: values that replace those of config and overrides.

    Raises:
        UserError: file not found, YAML that does not parse, unknown key, wrong type, or numbers that do not fit
            together; one line per problem, each with where it stands (the file or the override), the key and the nearest
            right value.
    """
    values = _read(config)
    for override in overrides or []:
        _apply(values, override)
    _check_effect(values, overrides or [])
    values = merged(merged(below or {}, values), above or {})
    return validate(values, where=config, overrides=overrides)


def _apply(values: dict[str, Any], override: str) -> None:
    """Apply an override; in a key of a stage (`stages.1.optim.lr`), what follows its number is the key within the stage."""
    stages, parts = values.get("stages"), override.partition("=")[0].strip().split(".")
    if parts[0] != "stages" or len(parts) < 3 or not isinstance(stages, list):
        apply_override(values, override, Config)
        return
    if not parts[1].isdecimal() or int(parts[1]) >= len(stages):
        raise UserError(f"{override}: there is no stage {parts[1]}; the config has stages 0 to {len(stages) - 1}")
    path, value = parse_override(override, Config, inside=2)
    number = int(parts[1])
    stages[number] = {**run_stages.flatten(stages[number], Config), ".".join(path): value}


def _check_effect(values: dict[str, Any], overrides: list[str]) -> None:
    """Raise UserError for an override that no stage would see, because the first one sets the key, too."""
    stages = values.get("stages")
    if not isinstance(stages, list) or not stages:
        return
    first = run_stages.flatten(stages[0], Config)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in LENGTH_KEYS or (isinstance(first, dict) and key in first):
            raise UserError(
                f"{override}: the stages of this config set it; give stages.0.{key}, or that of another stage"
            )


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two configs as nested dicts; where both have a value, it is that of `over`."""
    sections = [key for key, value in under.items() if isinstance(value, dict) and isinstance(over.get(key), dict)]
    return under | over | {key: merged(under[key], over[key]) for key in sections}


def sources(config: str, overrides: list[str]) -> dict[str, str]:
    """Return where each value that is no default comes from: dotted key → "preset swin_t", a file's name or an override."""
    label = config if Path(config).expanduser().is_file() else f"preset {config}"
    found = dict.fromkeys([*_flatten(values := _read(config)), *(values.keys() & {"stages"})], label)
    whole = _flatten(resolve(config, overrides).model_dump(mode="json"))
    for override in overrides:
        changed = override.partition("=")[0].strip()
        found |= dict.fromkeys((key for key in whole if f"{key}.".startswith(f"{changed}.")), "command line")
    return found


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
    """Raise UserError if a run of this config cannot start: it names no training data, or would record a secret.

    Presets leave the data to the user. A run whose config.yaml has the secret already goes on.
    """
    if not (config.data.train or config.data.mix):
        raise UserError(
            "data.train: not set; give a folder of shards, for example data.train=/data/my-shards"
            " (`esvit-scale shards create IMAGES /data/my-shards` makes one)"
        )
    problems = _secret_problems(config)
    if problems and not set(problems) <= set(_recorded_problems(config.run_path / "config.yaml")):
        raise UserError("\n".join(problems))


def _recorded_problems(path: Path) -> list[str]:
    """Return the secrets in the config.yaml of a run dir; none if it cannot be read."""
    with suppress(UserError, OSError):
        return _secret_problems(load(path)) if path.is_file() else []
    return []


def _secret_problems(config: Config) -> list[str]:
    data, mirror = config.data, config.train.mirror or ""
    places = {"data.train": data.train, "data.held_out": data.held_out, "train.mirror": mirror}
    places |= {f"data.mix.{i}.urls": mixed.urls for i, mixed in enumerate(data.mix)}
    found = {key: store_urls.secret_in_url(place) for key, place in places.items()}
    found["data.storage_options"] = store_urls.secret_in_options(data.storage_options or {}, list(places.values()))
    return [f"{key}: {problem}" for key, problem in found.items() if problem]


def differences(a: Config, b: Config) -> list[str]:
    """Return `key: a → b` for every key whose values differ; in runs with stages, `stages.N.key: …` for the first stage in
    which they do, and `stages.N: …` for a stage that only one of the two has."""
    if not (a.stages or b.stages):
        return _plain_differences(a, b)
    found: dict[str, int] = {}
    ours, theirs = a.of_stages, b.of_stages
    for number, (old, new) in enumerate(zip(ours, theirs, strict=False)):
        for difference in _plain_differences(old, new):
            found.setdefault(difference, number)
    lines = [f"stages.{number}.{difference}" for difference, number in found.items()]
    lines += [f"stages.{n}: absent → {b.stages[n]}" for n in range(len(ours), len(theirs))]
    return lines + [f"stages.{n}: {a.stages[n]} → absent" for n in range(len(theirs), len(ours))]


def _plain_differences(a: Config, b: Config) -> list[str]:
    flat_a, flat_b = _flatten(a.model_dump(mode="json")), _flatten(b.model_dump(mode="json"))
    keys = [*flat_a, *(k for k in flat_b if k not in flat_a)]
    return [f"{k}: {flat_a.get(k)} → {flat_b.get(k)}" for k in keys if flat_a.get(k) != flat_b.get(k)]


def _read(config: str) -> dict[str, Any]:
    """Read the YAML of a config file or preset and return its values, without the defaults; "" names the defaults."""
    if not config:
        return {}
    path = Path(config).expanduser()
    if path.is_file():
        return yaml_text.parse(yaml_text.text_of(path), config)
    if (path / "config.yaml").is_file():
        raise UserError(f"{config}: is a run dir; its config is {path / 'config.yaml'}")
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{config}: no such config file{_nearest_config(path)}")
    if config not in preset_names():
        raise UserError(f"{config}: neither a file nor a preset{_nearest_config(path)}")
    return yaml_text.parse(presets.text(config), config)


def _nearest_config(path: Path) -> str:
    """Return a hint for a config that is not there: the YAML file or run dir beside it, or the preset, of a like name."""
    beside: list[str] = []
    if path.suffix or len(path.parts) > 1:
        with suppress(OSError):
            found = sorted(path.parent.iterdir())
            beside = [p.name for p in found if p.suffix in (".yaml", ".yml") or (p / "config.yaml").is_file()]
    if close := get_close_matches(path.name, beside, n=1, cutoff=0.6):
        return f"; did you mean '{path.parent / close[0]}'?"
    return nearest(path.stem, preset_names())


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
