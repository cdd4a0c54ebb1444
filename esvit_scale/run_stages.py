"""Training stages: a run that is trained in several parts, one after the other, each on the weights of the part before.

A config lists them in `stages`: each is a mapping of dotted keys to values, with the length of the stage. A stage keeps
what the stages before it changed. Here are the functions on plain values; `Config.of_stages` makes the config of
each stage, and objective/schedules.py places it in the steps of the run.
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from esvit_scale.overrides import set_value
from esvit_scale.run_keys import LENGTH_KEYS
from esvit_scale.schema import Section, declared, item_section

EPOCHS, STEPS = LENGTH_KEYS
# What must be the same in all stages → why.
FIXED = {
    **dict.fromkeys(
        ("name", "run_dir", "seed", "format_version", "stages", "train.mirror", "train.wandb", "train.hang_minutes"),
        "it belongs to the whole run",
    ),
    **dict.fromkeys(
        ("model.trunk", "model.embed_dim", "model.depths", "model.heads", "model.registers"),
        "the weights of one trunk do not fit another",
    ),
    "model.init_from": "a stage starts from the one before",
    **dict.fromkeys(
        ("data.channels", "data.bits", "data.mean", "data.std"), "the trunk has learned from pixels in this form"
    ),
    **dict.fromkeys(
        (
            *("objective.name", "objective.prototypes", "objective.head_hidden", "objective.bottleneck"),
            *("objective.predictor_hidden", "objective.norm_last_layer", "objective.classes", "objective.class_names"),
        ),
        "the heads of one stage do not fit another",
    ),
    **dict.fromkeys(
        ("objective.teacher", "objective.teacher_config", "objective.targets", "objective.students"),
        "students and their teacher are those of the whole run",
    ),
}


def flatten(stage: Any, schema: type[Section], prefix: str = "") -> Any:
    """Return a stage as dotted key → value, in which sections may also be written as nested mappings.

    Whatever is no mapping is returned as it is, so that the schema reports it.
    """
    if not isinstance(stage, Mapping):
        return stage
    found: dict[str, Any] = {}
    for name, value in stage.items():
        key = f"{prefix}{name}"
        is_section = item_section(declared(key.split("."), schema)) is not None
        found |= flatten(value, schema, f"{key}.") if is_section and isinstance(value, Mapping) else {key: value}
    return found


def after(values: dict[str, Any], stage: Mapping[str, Any], where: str, schema: type[Section]) -> dict[str, Any]:
    """Return the values of a stage, given those of the stage before it, both as the nested dicts of a complete config.

    Raises:
        UserError: a key passes through a value or beyond a list.
    """
    found = deepcopy(values)
    if EPOCHS in stage:
        found["train"]["steps"] = None  # else steps of the stage before would count
    for key, value in stage.items():
        set_value(found, key.split("."), deepcopy(value), f"{where}.{key}", schema)
    return found


def key_of(difference: str) -> str:
    """Return the key that a line of `config.differences` is about, without its stage; "stages" for a whole stage."""
    key = difference.split(":")[0]
    return "stages" if re.fullmatch(r"stages\.\d+", key) else re.sub(r"^stages\.\d+\.", "", key)


def problems(stage: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a stage beside its single values.

    Args:
        before, now: the values of the run's beginning and of this stage, as flat dotted keys.
    """
    if EPOCHS not in stage and stage.get(STEPS) is None:
        yield f"needs its length, {EPOCHS} or {STEPS}"
    if EPOCHS in stage and stage.get(STEPS) is not None:
        yield f"has two lengths, {EPOCHS} and {STEPS}; give one"
    for key, why in FIXED.items():
        old, new = ({k: v for k, v in flat.items() if f"{k}.".startswith(f"{key}.")} for flat in (before, now))
        if old != new:
            shown = f"{', '.join(map(str, old.values()))} → {', '.join(map(str, new.values()))}"
            yield f"{key}: cannot change between stages ({shown}), because {why}"
