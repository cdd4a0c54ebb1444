"""The run's implementation of window attention (`model.attention`): chosen at its first start, kept on resume.

Rank 0 calls this module and broadcasts the result. On a GPU, the choice stands in attention.json in the run dir.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esvit_scale import files
from esvit_scale.config import Config
from esvit_scale.errors import UserError, first_line
from esvit_scale.models import attention_choice
from esvit_scale.models.attention_choice import Outcome
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Trunk
from esvit_scale.models.window_attention_implementations import NAMES, AttendWindows, implementation, unavailable
from esvit_scale.models.windows import WindowLayout
from esvit_scale.objective.costs import weight_dtype
from esvit_scale.parallel.world import World

log = logging.getLogger("esvit_scale")

FILE = "attention.json"
NONE_TO_CHOOSE = ("math", "the trunk has no window attention of ours")


def check(config: Config, device: torch.device) -> None:
    """Raise UserError if `model.attention` names an implementation that this device or trunk does not have."""
    asked = config.model.attention
    if asked in ("auto", "math"):
        return
    if problem := unavailable(asked, device):
        nearest = "auto" if device.type == "cuda" else "math"
        raise UserError(f"model.attention={asked}: {problem}; nearest: {nearest}")
    if not _layouts(_trunk(config), config, 1, device):
        raise UserError(f"model.attention={asked}: {config.model.trunk} has no window attention of ours; nearest: auto")


def choose(config: Config, world: World) -> str:
    """Return the implementation that a new run of a config has on this machine.

    Raises:
        UserError: the implementation that `model.attention` names cannot be used, is not accurate here, or raises.
    """
    check(config, world.device)
    return _choice(config, world, None, resumed=False)[0]


def choose_for_run(config: Config, world: World, path: Path, resumed: bool) -> str:
    """Return the implementation for this start of a run, and record it in the run dir.

    `auto` keeps what is recorded, if it is still accurate on another device or with another torch. Without a record, it
    is `math` on a CPU and for a run that is resumed (it began with math), and otherwise the outcome of
    `attention_choice.choose`.

    Raises:
        UserError: the implementation that `model.attention` names is not accurate here, or raises.
    """
    record = _read(path / FILE)
    if record is None and config.model.attention == "auto" and _on_cpu(world.device):
        return "math"
    choice = _choice(config, world, record, resumed)
    if choice == NONE_TO_CHOOSE:
        return "math"
    name, why = choice
    now = _device_name(world.device)
    if record is not None and record["device"] != now:
        log.warning(
            "window attention: this run was on %s and continues on %s: its numbers change by rounding",
            *(record["device"], now),
        )
    if record is not None and record["attention"] != name:
        log.warning(
            "window attention: this run used %s and continues with %s: its numbers change by rounding",
            *(record["attention"], name),
        )
    log.info("window attention: %s (%s)", name, why)
    if record is not None and record["attention"] == name:
        why = record.get("why", why)  # the times by which it was chosen
    files.write_json(path / FILE, {"attention": name, "device": now, "torch": torch.__version__, "why": why})
    return name


def _choice(config: Config, world: World, record: dict[str, Any] | None, resumed: bool) -> tuple[str, str]:
    """Return the implementation and why it is used."""
    device, asked = world.device, config.model.attention
    micro_batch = config.train.global_batch // (world.size * config.train.grad_accum)
    trunk = _trunk(config)
    small, real = (_layouts(trunk, config, images, device) for images in (1, micro_batch))
    if not small:
        return NONE_TO_CHOOSE
    dtype = torch.bfloat16 if config.train.precision == "autocast" else weight_dtype(config)
    if asked != "auto":
        if asked != "math" and (problem := _problem(asked, small, dtype, device)):
            raise UserError(f"model.attention={asked}: cannot be used here: {problem}; nearest: auto")
        return asked, "model.attention names it"
    if record is not None and not unavailable(record["attention"], device):
        same_machine = record["device"] == _device_name(device) and record.get("torch") == torch.__version__
        if same_machine or not _problem(record["attention"], small, dtype, device):
            return record["attention"], "as this run began"
    if record is None and resumed:
        return "math", "as this run began"
    if _on_cpu(device):
        return "math", "on a CPU"
    refused = {name: problem for name in NAMES if (problem := unavailable(name, device))}
    candidates: dict[str, Callable[[], AttendWindows]] = {
        name: partial(implementation, name) for name in NAMES if name not in refused
    }
    outcome = attention_choice.choose(candidates, small, real, dtype, device)
    return outcome.chosen, describe(outcome._replace(refused=refused | outcome.refused))


def describe(outcome: Outcome) -> str:
    """Return the times of an outcome, and what was refused and why, in one line."""
    times = sorted(outcome.milliseconds.items(), key=lambda item: item[1])
    parts = [f"{name} not used: {problem}" for name, problem in outcome.refused.items()]
    if times:
        parts.insert(0, "of a micro-batch: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times))
    return "; ".join(parts)


def _problem(name: str, layouts: Sequence[WindowLayout], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why an implementation cannot be used on this machine; None when it is accurate."""
    try:
        return attention_choice.inaccuracy(implementation(name), layouts, dtype, device)
    except Exception as error:  # whatever a library raises on this machine
        return f"{type(error).__name__}: {first_line(error)}"


def _trunk(config: Config) -> Trunk:
    with torch.device("meta"):
        return build_trunk(config)


def _layouts(trunk: Trunk, config: Config, images: int, device: torch.device) -> list[WindowLayout]:
    """Return the layouts of the trunk's windows for a micro-batch of so many images; empty: it has none of ours."""
    data = config.data
    crops = [(2 * images, data.global_crops.size), *((g.count * images, g.size) for g in data.local_crops)]
    return trunk.window_layouts(crops, device)


def _on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def _read(path: Path) -> dict[str, Any] | None:
    """Return what an earlier start recorded; None if there is no record, or it cannot be used."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and record.get("attention") in NAMES and isinstance(record.get("device"), str):
        return record
    log.warning("%s: cannot be read; window attention is chosen again", path)
    return None
