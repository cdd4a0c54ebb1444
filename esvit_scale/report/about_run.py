"""The section of the report about one run: its state, length, data, machine, versions, warnings and bad samples."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from esvit_scale import config as configs
from esvit_scale import presets, yaml_text
from esvit_scale.checkpoint import state_file, step_folders
from esvit_scale.config import Config
from esvit_scale.data import identity as identities
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import Manifest
from esvit_scale.errors import UserError
from esvit_scale.report.run_files import Json, RunFiles
from esvit_scale.report.tables import Cell, Row, Table, flatten
from esvit_scale.train import log_format
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_records import starts_of

OWN_KEYS = (
    "name",
    "run_dir",
    "data.train",
    "data.held_out",
    "data.mix",
)  # differ in every run; the line `data` of the section names the sets
DEFAULTS = "the defaults"
NAMES_SHOWN, CLASSES_SHOWN, SENTENCES_SHOWN = 5, 6, 12


class Sentence(NamedTuple):
    """A warning, and how often the run gave it with other numbers."""

    text: str
    times: int


class AboutRun(NamedTuple):
    """What the report says about one run."""

    facts: list[tuple[str, str]]
    warnings: list[Sentence]
    more_warnings: int  # number of further kinds of warnings
    quarantine: list[str]
    changed: Table | None  # the keys of the config that differ from the nearest preset


def about(of: RunFiles) -> AboutRun:
    """Return what the report says about a run."""
    environment, config = of.environment or {}, of.config
    facts = [
        ("state", _state(of)),
        *(_stages(of) if config and config.stages else []),
        ("duration", _duration(of.rows)),
        ("starts", _starts(of)),
        *(_data(config, of.path) if config else []),
        ("machine", _machine(environment)),
        ("versions", _versions(environment)),
    ]
    sentences = _sentences(log_format.read_warnings(of.path / "log.txt", notes=True))
    return AboutRun(
        [(name, text) for name, text in facts if text],
        sentences[:SENTENCES_SHOWN],
        max(0, len(sentences) - SENTENCES_SHOWN),
        _quarantine(read_rows(of.path / "quarantine.jsonl")),
        changed_keys(config) if config else None,
    )


def _state(of: RunFiles) -> str:
    summary, last = of.summary or {}, of.rows[-1] if of.rows else {}
    step = summary.get("step", last.get("step"))
    if step is None:
        return "no step is logged"
    total = summary.get("total_steps") or (of.config.train.steps if of.config else None)
    done = f"step {step:,}" + (f" of {total:,}" if total and total != step else "")
    return f"finished, {done}" if summary.get("finished") else f"not finished, {done}"


def _stages(of: RunFiles) -> list[tuple[str, str]]:
    """Return a line for every training stage: its length and what it changes, and the steps that are logged."""
    found = []
    for number, stage in enumerate(of.config.stages if of.config else ()):
        steps = [row["step"] for row in of.rows if row.get("stage") == number]
        done = f"steps {steps[0]:,} to {steps[-1]:,}" if steps else "not begun"
        changes = ", ".join(f"{key}={yaml_text.show(value)}" for key, value in stage.items())
        found.append((f"stage {number}", f"{done}: {changes}"))
    return found


def _duration(rows: list[Json]) -> str:
    """Return how long the logged steps took, and over what time they are spread if that is longer."""
    timed = [row for row in rows if isinstance(row.get("time"), float) and isinstance(row.get("step_s"), float)]
    if not timed:
        return ""
    before = [0, *(row["step"] for row in timed)]
    training = sum((row["step"] - start) * row["step_s"] for start, row in zip(before, timed, strict=False))
    passed = timed[-1]["time"] - timed[0]["time"] + (timed[0]["step"] * timed[0]["step_s"])
    text = f"{in_words(training)} of training"
    return text + (f", spread over {in_words(passed)}" if passed > 1.1 * training + 60 else "")


def in_words(seconds: float) -> str:
    """Return a time in its two largest units, such as "2 days 3 h" or "11 min 42 s"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = [(days, f"{days} day{'s' if days > 1 else ''}"), (h, f"{h} h"), (m, f"{m} min"), (s, f"{s} s")]
    first = next((i for i, (count, _) in enumerate(parts) if count), 3)
    return " ".join(text for i, (count, text) in enumerate(parts) if first <= i <= first + 1 and (count or i == first))


def _starts(of: RunFiles) -> str:
    """Return how often the run was started again, and why; a restart is a start that neither a stop nor a new length explains."""
    starts, rollbacks = starts_of(of.environment or {}), (of.summary or {}).get("rollbacks", 0)
    lengthened = len(read_rows(of.path / "lengthened.jsonl"))
    resumed = max(0, min(log_format.count_stops(of.path / "log.txt"), starts - 1))
    restarts = starts - 1 - resumed - lengthened
    parts = ["started once, no restart"] if starts == 1 else []
    parts += [f"{restarts} restart{'s' if restarts > 1 else ''}"] if restarts > 0 else []
    parts += [f"stopped and resumed {f'{resumed} times' if resumed > 1 else 'once'}"] if resumed else []
    parts += [f"{rollbacks} roll-back{'s' if rollbacks > 1 else ''} to a checkpoint"] if rollbacks else []
    parts += [f"made longer {lengthened} times" if lengthened > 1 else "made longer once"] if lengthened else []
    return ", ".join(parts)


def _data(config: Config, run: Path) -> list[tuple[str, str]]:
    """Return a line for every training set, and one for the held-out set."""
    places = [mixed.urls for mixed in config.data.mix] or ([config.data.train] if config.data.train else [])
    found = [("data", _set_in_words(place)) for place in places]
    recorded = _recorded_data(run)
    if recorded and not all(manifests.is_shard_set(Path(place)) for place in places):
        found.append(
            ("data", f"as the checkpoint records: {recorded.get('what')}, id {str(recorded.get('sha256'))[:12]}")
        )
    if config.data.held_out:
        found.append(("held out", _set_in_words(config.data.held_out)))
    return found


def _set_in_words(place: str) -> str:
    if not manifests.is_shard_set(Path(place)):
        return place
    try:
        manifest = manifests.load(Path(place))
    except UserError as error:
        return str(error)
    shards = len(manifest.shards)
    numbers = f"{manifest.samples:,} images in {shards:,} shard{'s' if shards != 1 else ''}, {_classes(manifest)}"
    return f"{_name_of_set(manifest)}: {numbers}, id {identities.identity(manifest)['sha256'][:12]} ({place})"


def _name_of_set(manifest: Manifest) -> str:
    root = manifest.root.resolve()
    return f"{root.parent.name}/{root.name}" if root.name in ("train", "val", "test") else root.name


def _classes(manifest: Manifest) -> str:
    names = manifest.classes
    if not names:
        return "no classes"
    more = ", …" if len(names) > CLASSES_SHOWN else ""
    return f"{len(names):,} classes ({', '.join(names[:CLASSES_SHOWN])}{more})"


def _recorded_data(run: Path) -> Json | None:
    """Return the identity of the data that the newest checkpoint records; None without one."""
    for folder in step_folders.candidates(run):
        try:
            recorded = state_file.read_state(folder).get("data")
        except (UserError, OSError):
            continue
        return recorded if isinstance(recorded, dict) else None
    return None


def _machine(environment: Mapping[str, object]) -> str:
    if not environment:
        return ""
    ranks, slurm = environment.get("world_size", 1), environment.get("slurm")
    job = slurm.get("SLURM_JOB_ID") if isinstance(slurm, Mapping) else None
    parts = [
        f"{ranks} × {environment['gpu']}" if environment.get("gpu") else "",
        str(environment.get("processor") or ""),
        f"{environment.get('cpus')} CPU cores for a process" if environment.get("cpus") else "",
        f"{ranks} rank{'' if ranks == 1 else 's'}",
        f"host {environment.get('host')}" if environment.get("host") else "",
        f"Slurm job {job}" if job else "",
        str(environment.get("platform") or ""),
    ]
    return ", ".join(part for part in parts if part)


def _versions(environment: Mapping[str, object]) -> str:
    packages = environment.get("packages")
    named = dict(packages) if isinstance(packages, Mapping) else {}
    versions = [f"{name} {version}" for name, version in named.items() if version != "absent"]
    python = [f"Python {environment['python']}"] if environment.get("python") else []
    return ", ".join([*versions, *python])


def _sentences(warnings: Iterable[str]) -> list[Sentence]:
    """Return the warnings in their order; those that differ only in numbers are one `Sentence`, with their count."""
    found: dict[str, Sentence] = {}
    for text in warnings:
        kind = re.sub(r"\d[\d.,]*", "0", text)
        found[kind] = Sentence(found[kind].text, found[kind].times + 1) if kind in found else Sentence(text, 1)
    return list(found.values())


def _quarantine(rows: list[Json]) -> list[str]:
    """Return a sentence for each kind of sample in quarantine.jsonl, with their number and the first names."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        reason = str(row.get("reason", ""))
        if "left_out" in row:
            kind = "left out while streaming"
        elif row.get("member"):
            kind = "used without a member that is damaged or too large"
        elif row.get("used"):
            kind = "slow to read, and used"
        elif "not finite" in reason:
            kind = "in a step that was skipped, because its loss or gradients were not finite"
        else:
            kind = "replaced by another image"
        name = str(row.get("key") or row.get("shard") or "?")
        kinds.setdefault(kind, []).append(f"{name} ({reason})" if reason and "not finite" not in reason else name)
    return [
        f"{len(names):,} {kind}: {', '.join(names[:NAMES_SHOWN])}{', …' if len(names) > NAMES_SHOWN else ''}"
        for kind, names in kinds.items()
    ]


def changed_keys(config: Config) -> Table:
    """Return the table of keys that differ from the preset that is nearest to the config, or from the defaults."""
    own = dict(flatten(config.model_dump(mode="json")))
    bases = {name: configs.resolve(name) for name in presets.names()} | {
        DEFAULTS: Config()
    }  # the presets first: they win a tie
    flat = {name: dict(flatten(base.model_dump(mode="json"))) for name, base in bases.items()}
    differ = {
        name: [key for key in dict.fromkeys([*own, *base]) if key not in OWN_KEYS and own.get(key) != base.get(key)]
        for name, base in flat.items()
    }
    nearest = min(differ, key=lambda name: len(differ[name]))
    base = flat[nearest]
    rows = [Row(key, [Cell(own.get(key, "–")), Cell(base.get(key, "–"))]) for key in differ[nearest]]
    named = nearest if nearest == DEFAULTS else f"the preset {nearest}"
    note = f"The keys in which this run differs from {named}; the whole config is at the end of this page."
    if not rows:
        note = f"This run has the config of {named}, but for its name and data."
    return Table("config", "Config", note, ["key", "this run", nearest], rows)
