"""The choice of a run's implementation of a part of the step: made at its first start, kept on resume.

On a GPU, the choice stands in a file in the run dir.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from esvit_scale import files
from esvit_scale.config import Config
from esvit_scale.errors import UserError, first_line
from esvit_scale.models.implementation_choice import Outcome
from esvit_scale.objective.costs import weight_dtype
from esvit_scale.parallel.world import World

log = logging.getLogger("esvit_scale")


class RecordedChoice(ABC):
    """The choice of one part's implementation, for a run of a config on this machine."""

    part: str  # as the log calls it
    key: str  # of the config
    file: str  # in the run dir
    field: str  # of the name in that file
    names: tuple[str, ...]
    plain: str  # the implementation that runs everywhere, and that a run without a record began with

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.device = config, world.device
        self.micro_batch = config.train.global_batch // (world.size * config.train.grad_accum)
        self.dtype = torch.bfloat16 if config.train.precision == "autocast" else weight_dtype(config)
        # A training stage may change these, and the fastest implementation with them.
        self.sizes = {"window": config.model.window, "crops": sorted(set(config.crop_sizes))}

    @property
    @abstractmethod
    def asked(self) -> str:
        """Return the value of `key`: a name, or auto."""

    @abstractmethod
    def missing(self) -> str | None:
        """Return why the config's network has no such part, as a clause; None if it has."""

    @abstractmethod
    def unavailable(self, name: str) -> str | None:
        """Return why an implementation cannot run on this machine, as a clause; None when it may."""

    @abstractmethod
    def inaccuracy(self, name: str) -> str | None:
        """Return how an implementation differs from fp32 by more than it may; None if it fits. It may raise."""

    @abstractmethod
    def fastest(self, names: Sequence[str]) -> Outcome:
        """Check and time these implementations."""

    def check(self) -> None:
        """Raise UserError if the config names an implementation that this device or network does not have."""
        if self.asked in ("auto", self.plain):
            return
        if problem := self.unavailable(self.asked):
            nearest = "auto" if self.device.type == "cuda" else self.plain
            raise UserError(f"{self.key}={self.asked}: {problem}; nearest: {nearest}")
        if problem := self.missing():
            raise UserError(f"{self.key}={self.asked}: {problem}; nearest: auto")

    def choose(self) -> str:
        """Return the implementation that a new run has on this machine.

        Raises:
            UserError: the implementation that the config names cannot be used, is not accurate here, or raises.
        """
        self.check()
        return self.plain if self.missing() else self._choice(None, resumed=False)[0]

    def choose_for_run(self, path: Path, resumed: bool) -> str:
        """Return the implementation for this start of the run in `path`, and record it there.

        `auto` keeps what is recorded for the same window and crops, if it is still accurate on another device or with
        another torch. Without a record, it is `plain` on a CPU and for a run that is resumed (it began with it), and
        otherwise the outcome of `fastest`.

        Raises:
            UserError: the implementation that the config names is not accurate here, or raises.
        """
        record = self._read(path / self.file)
        if record is None and self.asked == "auto" and on_cpu(self.device):
            return self.plain
        if self.missing():
            return self.plain
        name, why = self._choice(record, resumed)
        now = device_name(self.device)
        if record is not None and record["device"] != now:
            log.warning(
                "%s: this run was on %s and continues on %s: its numbers change by rounding",
                *(self.part, record["device"], now),
            )
        if record is not None and record[self.field] != name:
            log.warning(
                "%s: this run used %s and continues with %s: its numbers change by rounding",
                *(self.part, record[self.field], name),
            )
        log.info("%s: %s (%s)", self.part, name, why)
        if record is not None and record[self.field] == name and record.get("sizes", self.sizes) == self.sizes:
            why = record.get("why", why)  # the times by which it was chosen
        about = {"device": now, "torch": torch.__version__, "why": why, "sizes": self.sizes}
        files.write_json(path / self.file, {self.field: name, **about})
        return name

    def _choice(self, record: dict[str, Any] | None, resumed: bool) -> tuple[str, str]:
        """Return the implementation and why it is used."""
        if self.asked != "auto":
            if self.asked != self.plain and (problem := self._problem(self.asked)):
                raise UserError(f"{self.key}={self.asked}: cannot be used here: {problem}; nearest: auto")
            return self.asked, f"{self.key} names it"
        same_sizes = record is not None and record.get("sizes", self.sizes) == self.sizes
        if record is not None and same_sizes and not self.unavailable(record[self.field]):
            same_machine = record["device"] == device_name(self.device) and record.get("torch") == torch.__version__
            if same_machine or not self._problem(record[self.field]):
                return record[self.field], "as this run began"
        if record is None and resumed:
            return self.plain, "as this run began"
        if on_cpu(self.device):
            return self.plain, "on a CPU"
        refused = {name: problem for name in self.names if (problem := self.unavailable(name))}
        outcome = self.fastest([name for name in self.names if name not in refused])
        return outcome.chosen, describe(outcome._replace(refused=refused | outcome.refused))

    def _problem(self, name: str) -> str | None:
        """Return why an implementation cannot be used on this machine; None when it is accurate."""
        try:
            return self.inaccuracy(name)
        except Exception as error:  # whatever a library raises on this machine
            return f"{type(error).__name__}: {first_line(error)}"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Return what an earlier start recorded; None if there is no record, or it cannot be used."""
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and record.get(self.field) in self.names and isinstance(record.get("device"), str):
            return record
        log.warning("%s: cannot be read; %s is chosen again", path, self.part)
        return None


def describe(outcome: Outcome) -> str:
    """Return the times of an outcome, and what was refused and why, in one line."""
    times = sorted(outcome.milliseconds.items(), key=lambda item: item[1])
    parts = [f"{name} not used: {problem}" for name, problem in outcome.refused.items()]
    if times:
        parts.insert(0, "of a micro-batch: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in times))
    return "; ".join(parts)


def on_cpu(device: torch.device) -> bool:
    """Return whether a device is a CPU."""
    return device.type == "cpu"


def device_name(device: torch.device) -> str:
    """Return the name of a device's type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
