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
from esvit_scale.errors import UserError
from esvit_scale.models import attention_choice
from esvit_scale.models.attention_choice import Outcome
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.window_attention_implementations import NAMES, AttendWindows, implementation, unavailable
from esvit_scale.models.windows import WindowLayout
from esvit_scale.parallel.world import World

log = logging.getLogger("esvit_scale")

FILE = "attention.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "autocast": torch.bfloat16}


def check(config: Config, device: torch.device) -> None:
    """Raise UserError if `model.attention` names an implementation that this device or trunk does not have."""
    asked = config.model.attention
    if asked in ("auto", "math"):
        return
    if problem := unavailable(asked, device):
        nearest = "auto" if device.type == "cuda" else "math"
        raise UserError(f"model.attention={asked}: {problem}; nearest: {nearest}")
    if not _layouts(config, 1, device):
        raise UserError(f"model.attention={asked}: {config.model.trunk} has no window attention of ours; nearest: auto")


def choose_for_run(config: Config, world: World, path: Path, resumed: bool) -> str:
    """Return the implementation for this start of a run, and record it in the run dir.

    `auto` keeps what is recorded. Without a record, it is `math` on a CPU and for a run that is resumed (it began with
    math), and otherwise the outcome of `attention_choice.choose`.

    Raises:
        UserError: the implementation that `model.attention` names is not accurate here, or raises.
    """
    device, asked = world.device, config.model.attention
    record = _read(path / FILE)
    if record is None and asked == "auto" and _on_cpu(device):
        return "math"
    layouts = _layouts(config, 1, device)
    if not layouts:
        return "math"
    real = _layouts(config, config.train.global_batch // (world.size * config.train.grad_accum), device)
    name, why = _choice(config, record, resumed, device, layouts, real)
    now = _device_name(device)
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
    files.write_json(path / FILE, {"attention": name, "device": now, "torch": torch.__version__, "why": why})
    return name


def _choice(
    config: Config,
    record: dict[str, Any] | None,
    resumed: bool,
    device: torch.device,
    small: Sequence[WindowLayout],
    real: Sequence[WindowLayout],
) -> tuple[str, str]:
    """Return the implementation and why it is used."""
    asked, dtype = config.model.attention, DTYPES[config.train.precision]
    if asked != "auto":
        if asked != "math":
            _require_accurate(asked, small, dtype, device)
        return asked, "model.attention names it"
    if record is not None and not unavailable(record["attention"], device):
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
    parts = ["of a micro-batch: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times)] * bool(times)
    return "; ".join([*parts, *(f"{name} not used: {problem}" for name, problem in outcome.refused.items())])


def _require_accurate(name: str, layouts: Sequence[WindowLayout], dtype: torch.dtype, device: torch.device) -> None:
    try:
        problem = attention_choice.inaccuracy(implementation(name), layouts, dtype, device)
    except Exception as error:  # whatever a library raises on this machine
        problem = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
    if problem:
        raise UserError(f"model.attention={name}: cannot be used here: {problem}; nearest: auto")


def _layouts(config: Config, batch: int, device: torch.device) -> list[WindowLayout]:
    """Return the layouts of the trunk's windows for a micro-batch of `batch` images."""
    with torch.device("meta"):
        trunk = build_trunk(config)
    data = config.data
    crops = [(2 * batch, data.global_crops.size), *((g.count * batch, g.size) for g in data.local_crops)]
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
