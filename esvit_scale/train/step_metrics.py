"""The rows of metrics.jsonl: measurements of one step (loss, norms, …), and rates since the row before.

A row is made in two parts, so that the host need not wait for a GPU: `StepMetrics.begin_row` starts to copy the
measurements to the host, and `finish_row`, called one step later, reads them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esvit_scale import machine
from esvit_scale.checkpoint.saver import Saver
from esvit_scale.config import Config
from esvit_scale.data.worker_rates import WorkerRates
from esvit_scale.objective.param_groups import part_of
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import collectives
from esvit_scale.parallel.engine import Engines, autocast
from esvit_scale.parallel.world import World
from esvit_scale.train import accuracies, guard, learning, mfu
from esvit_scale.train.accuracies import AccuracyHistory
from esvit_scale.train.guard import Guard
from esvit_scale.train.learning import KnnHistory, Measurements, RunFacts
from esvit_scale.train.metrics import TIME_FIELDS
from esvit_scale.train.monitors import Monitors
from esvit_scale.train.online_knn import OnlineKnn
from esvit_scale.train.row_file import read_rows
from esvit_scale.train.run_resources import RunResources
from esvit_scale.train.slow_nodes import SlowNodes
from esvit_scale.train.structure import effective_rank, kept, read_start, write_start

GIB = 2**30
RANK_ME_ROWS = 256  # features of a step from which the effective rank is computed


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step (`Trainer.train_step`)."""

    applied: bool  # False: the loss or a gradient was not finite on some rank, and nothing moved
    logs: dict[str, Tensor]  # scalars on the device, means over this rank's micro-batches; not yet over ranks
    grad_squares: Tensor  # [trainable parameters] squared norms of the gradients, before the clip
    update_squares: Tensor | None  # [watched parameters, 2] squared norms of updates and values, if they were measured
    features: Tensor  # [n, C] the student's view features of the last micro-batch
    flags: int | None = None  # all ranks' flags (train/signals.py); None: this step exchanged none


class HostCopy:
    """A copy of a tensor to the host that is under way until it is read."""

    def __init__(self, values: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """Return the copy; wait for it if it is not complete yet."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


@dataclass(frozen=True)
class _BegunRow:
    """A row whose measurements are on their way to the host."""

    step: int
    head: dict[str, Any]  # fields before the measurements
    tail: dict[str, Any]  # fields after them
    parts: dict[str, list[str]]  # what `values` holds one after the other, with the names of its elements
    values: HostCopy
    features: HostCopy
    compute_s: float  # seconds that this rank computed before it waited for others
    slow_worker: str | None  # warning about a loader process


class StepMetrics:
    """A collector of the measurements between two rows, which makes the rows. All ranks make the same calls."""

    def __init__(
        self,
        config: Config,
        world: World,
        schedules: Schedules,
        engines: Engines,
        run: RunResources,
        saver: Saver,
    ) -> None:
        self._config, self._world, self._schedules = config, world, schedules
        self._engines, self._knn, self._accuracy = engines, run.knn, run.accuracy
        self.knn, self.accuracies, self._guard = KnnHistory(), AccuracyHistory(), Guard(config.train)
        self._ideal_rate = collectives.run_on_rank0_and_broadcast(
            lambda: mfu.ideal_images_per_s(config, world.device, world.size)
        )
        self._batch, self._saver = config.train.global_batch, saver
        images = self._batch // world.size // config.train.grad_accum
        self._monitors = Monitors(config.objective.prototypes, images, config.model.freeze_patch_embed)
        self._workers, self._slow_nodes = WorkerRates(), SlowNodes()
        self._last_row: dict[str, Any] = {}
        self._begun: _BegunRow | None = None

    def start(
        self, facts: RunFacts, run: Path, mirrored_step: Callable[[], int] | None = None
    ) -> dict[str, Any] | None:
        """Begin to measure a run, at its first step or where it is resumed. All ranks call it.

        Args:
            facts: what is known about the run; `facts.steps` are done.
            run: the run dir, whose rows hold the k-NN accuracies up to this step.
            mirrored_step: returns the step of the newest checkpoint in train.mirror; None without a mirror.

        Returns:
            The row of step 0, with what was measured on held-out images; None if there is none.
        """
        self._facts, step, self._mirrored_step, self._run = facts, facts.steps, mirrored_step, run
        row: dict[str, Any] | None = None
        self.knn = collectives.run_on_rank0_and_broadcast(lambda: learning.read_history(run, step))
        self.accuracies = collectives.run_on_rank0_and_broadcast(lambda: accuracies.read_history(run, step))
        if self._knn is not None:
            pixels, largest_class = self._knn.pixels_accuracy(), self._knn.largest_class
            self.knn = self.knn.on(self._config.data.held_out, self._knn.images, pixels, largest_class)
            self._guard = Guard(self._config.train, self._measured_before(self._knn, step))
            if step == 0:
                row = {"step": 0, "images_seen": 0, **self._on_held_out(0)}
        self._began, self._first_step = time.monotonic(), step
        self.restart_window(step)
        return row and row | {"time": time.time()}

    def restart_window(self, step: int) -> None:
        """Begin to measure the next row's rates, when `step` steps are done; forget what was measured after it."""
        self.knn.cut(step)
        self.accuracies.cut(step)
        self._guard.cut(step)
        self._window_began, self._window_step, self._wait_s = time.monotonic(), step, 0.0
        self._window_stopped_s = self._saver.stopped_s

    def add_wait(self, seconds: float) -> None:
        """Add the seconds that a step waited for its batch."""
        self._wait_s += seconds

    def add_worker_rates(self, rates: Mapping[int, float]) -> None:
        """Add the rates (images/s) at which loader processes produced parts of a batch, by process."""
        self._workers.add(rates)

    def begin_row(
        self,
        step: int,
        result: StepResult,
        *,
        images_of_sets: dict[str, int],
        skipped_steps: int,
        bad_samples: int,
        compute_s: float,
    ) -> None:
        """Begin a row of metrics.jsonl, which `finish_row` returns. All ranks call it.

        Args:
            step: number of steps that are done.
            result: the result of the last of these steps.
            images_of_sets: number of images seen of each set of a mix, by the set's name; empty without a mix.
            skipped_steps: number of the run's steps whose update was not applied.
            bad_samples: number of images that were replaced since the run began.
            compute_s: seconds that this rank computed in the last step before it waited for others.
        """
        now, schedules, done = time.monotonic(), self._schedules, step - 1
        elapsed, steps = now - self._window_began, step - self._window_step
        worker_fields, slow_worker = self._workers.take()
        head = {
            "step": step,
            "images_seen": schedules.images_seen(step),
            **({"stage": schedules.number} if schedules.number or schedules.steps_after else {}),
            **{f"images_seen_{name}": images for name, images in images_of_sets.items()},
        }
        tail = {
            **self._on_held_out(step),
            **self._classifier_accuracy(step),
            "lr": schedules.lr(done),
            "wd": schedules.weight_decay(done),
            "momentum": schedules.ema_momentum(done),
            "teacher_temp": schedules.teacher_temp(done),
            "skipped_steps": skipped_steps,
            "images_per_s": steps * self._batch / elapsed,
            "mfu": steps * self._batch / elapsed / self._ideal_rate,
            "step_s": elapsed / steps,
            "data_wait_s": self._wait_s / steps,
            "save_s": self._saver.stopped_s - self._window_stopped_s,
            **({"mirror_lag_steps": max(step - self._mirrored_step(), 0)} if self._mirrored_step else {}),
            **worker_fields,
            "bad_samples": bad_samples,
            "time": time.time(),
        }
        parts, values = self._measured(result)
        features = HostCopy(result.features[:RANK_ME_ROWS])
        compute_s += self._wait_s / steps
        self._begun = _BegunRow(step, head, tail, parts, HostCopy(values), features, compute_s, slow_worker)
        self._window_began, self._window_step, self._wait_s = now, step, 0.0
        self._window_stopped_s = self._saver.stopped_s

    def finish_row(self) -> tuple[dict[str, Any], list[str]] | None:
        """Return the row that was begun, and warnings about what it shows; None if none was begun since the last call.
        All ranks call it, after the same steps."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        values, found = begun.values.read(), {}
        for part, names in begun.parts.items():
            found[part], values = values[: len(names)], values[len(names) :]
        measured = (effective_rank(begun.features.read()), peak_memory_gib(self._world.device))
        ranks, peaks = zip(*collectives.gather_objects(measured), strict=True)
        node_fields, slow_node = self._slow_nodes.observe(begun.step, begun.compute_s)
        row = {
            **begun.head,
            **dict(zip(begun.parts["logs"], found["logs"].tolist(), strict=True)),
            **gradient_norms(found["gradients"], begun.parts["gradients"]),
            **update_ratios(found["updates"].view(-1, 2), begun.parts["updates"][::2]),
            **dict(zip(begun.parts["centers"], found["centers"].tolist(), strict=True)),
            "rank_me": sum(ranks) / len(ranks),
            **begun.tail,
            "peak_memory_gib": max(peaks),
            **node_fields,
        }
        self._last_row = row
        fallen = self._guard.begins() if guard.BELOW in row else None
        warnings = (*self._monitors.observe(row), fallen, begun.slow_worker, slow_node)
        return row, [sentence for sentence in warnings if sentence]

    def _measured(self, result: StepResult) -> tuple[dict[str, list[str]], Tensor]:
        """Return the names of the step's measurements, in parts, and their values in one tensor on the device."""
        clipper, centers = self._engines.clipper, self._engines.student.module.objective.extra_state()
        logs = collectives.all_reduce_mean_(torch.stack([value.float() for value in result.logs.values()]))
        updates = result.update_squares
        parts = {
            "logs": list(result.logs),
            "gradients": clipper.names,
            "updates": [] if updates is None else [name for name in clipper.watched for _ in range(2)],
            "centers": [f"center_norm_{name.partition('.')[0]}" for name in centers],
        }
        norms = [center.norm()[None].float() for center in centers.values()]
        of_updates = [] if updates is None else [updates.flatten()]
        device = logs.device
        values = [logs, result.grad_squares, *of_updates, *norms]
        return parts, torch.cat([value.to(device, torch.float32, non_blocking=True) for value in values])

    def summary(self, step: int) -> dict[str, Any]:
        """Return fields of summary.json: the planned length, images seen, ranks, what was measured since the start, and the
        last row."""
        seconds = time.monotonic() - self._began
        return {
            "total_steps": self._schedules.run_steps,
            "images_seen": self._schedules.images_seen(step),
            "world_size": self._world.size,
            "seconds_since_start": seconds,
            "images_per_s": (step - self._first_step) * self._batch / seconds,
            "save_s": self._saver.stopped_s,
            "last": {k: v for k, v in self._last_row.items() if k not in TIME_FIELDS},
            **({"knn": self.knn.summary()} if self.knn.measured else {}),
            **({"classifier": self.accuracies.summary()} if self.accuracies.measured else {}),
            "verdict": self._verdict(step),
        }

    def _verdict(self, step: int) -> list[str]:
        if self._config.objective.classes:
            return accuracies.verdict(self.accuracies)
        return learning.verdict(self._config, self.knn, replace(self._facts, steps=step))

    def _measured_before(self, knn: OnlineKnn, step: int) -> list[guard.Measured]:
        """Return what earlier starts measured on these images up to `step`, and find the neighbours at the first of them."""
        if knn.has_labels:
            return [(at, {"knn_top1": accuracy}) for at, accuracy in self.knn.measured]

        def read() -> tuple[Tensor | None, list[guard.Measured]]:
            start = read_start(self._run, self._config.data.held_out, knn.images, step)
            rows = [row for row in read_rows(self._run / "metrics.jsonl") if row["step"] <= step]
            return start, [] if start is None else guard.measured_in(rows)

        self._start_neighbours, measured = collectives.run_on_rank0_and_broadcast(read)
        return measured

    def _on_held_out(self, step: int) -> dict[str, Any]:
        """Measure on the held-out images if it is due at `step`, and return the fields for its row."""
        every = self._config.train.knn_every
        if self._knn is None or not every or (step % every and step != self._schedules.last_step):
            return {}
        context, fields, values = autocast(self._config, self._world.device), {}, {}
        if self._knn.has_labels:
            values = {"knn_top1": self._knn.accuracy(self._engines, context)}
            self.knn.add(step, values["knn_top1"])
            fields = self.knn.fields(step)
        else:
            rank, neighbours = self._knn.structure(self._engines, context)
            held_out, start = self._config.data.held_out, self._start_neighbours
            if start is None:
                start = self._start_neighbours = neighbours
                write = partial(write_start, self._run, held_out, step, neighbours)
                collectives.run_on_rank0_and_broadcast(write)
                fields = {"knn_images": self._knn.images, "knn_held_out": held_out}
            values = {"held_out_rank": rank, "neighbours_kept": kept(neighbours, start)}
        return fields | values | (self._guard.add(step, values) if self._config.train.guard != "off" else {})

    def is_measured(self, step: int) -> bool:
        """Return whether the accuracy of the classifier is measured at a step."""
        every = self._config.train.eval_every or self._schedules.steps_per_epoch
        return self._accuracy is not None and (step % every == 0 or step == self._schedules.last_step)

    def _classifier_accuracy(self, step: int) -> dict[str, Any]:
        """Return the fields of the row of `step` about the classifier: of the EMA and, if that differs, of the student."""
        if self._accuracy is None or not self.is_measured(step):
            return {}
        context, teacher = autocast(self._config, self._world.device), self._engines.teacher
        averaged, student = self._accuracy.measure(self._engines, context), None
        if self._config.objective.ema_momentum or self._config.objective.ema_momentum_end:
            with teacher.as_student():
                student = self._accuracy.measure(self._engines, context)
        return self.accuracies.measure(step, averaged, student)

    def is_best(self, step: int) -> bool:
        """Return whether checkpoints/best is to name `step`: its accuracy was measured and is the best so far, or, where the
        guard measures without labels, nothing is too far below the start."""
        is_guarded = self._config.train.guard != "off"
        if self._knn is not None and not self._knn.has_labels:
            return is_guarded and self._guard.holds_at(step)
        return (self._config.train.keep_best or is_guarded) and self._history.is_best(step)

    def guards_stop(self, step: int) -> str | None:
        """Return why `train.guard` ends the run at `step`; None if it does not."""
        stops = self._config.train.guard == "stop" and self._guard.has_fallen and self._guard.measured[-1][0] == step
        return self._guard.sentence() if stops else None

    @property
    def _history(self) -> Measurements:
        """The accuracies by which the best step is chosen: the classifier's where the run learns labels, else k-NN's."""
        return self.accuracies if self._config.objective.classes else self.knn

    def last_lines(self, step: int) -> list[str]:
        """Return the lines with which a run that is finished at `step` ends."""
        if self._config.objective.classes:
            return accuracies.last_lines(self._config, self.accuracies, step, self._schedules.run_steps)
        facts = replace(self._facts, steps=step)
        return learning.last_lines(self._config, self.knn, facts, self._schedules.run_steps)

    def has_stalled(self) -> bool:
        """Return whether `train.patience` measurements of the accuracy in a row were no better than the best."""
        patience = self._config.train.patience
        return patience is not None and self._history.since_best() >= patience


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: what torch allocated on the GPU, or on a CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return machine.peak_resident_bytes() / GIB


def gradient_norms(squares: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return the gradient norm of the whole network and of each part, given the squared norms of the gradients of all
    parameters [parameters] and the parameters' names."""
    of_part: dict[str, float] = defaultdict(float)
    values = squares.tolist()
    for name, square in zip(names, values, strict=True):
        of_part[f"grad_norm_{part_of(name)}"] += square
    return {"grad_norm": sum(values) ** 0.5} | {part: square**0.5 for part, square in of_part.items()}


def update_ratios(squares: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return ‖Δw‖/‖w‖ of the watched parameter of each part of the network, given the squared norms of Δw and w
    [watched parameters, 2] and the parameters' names."""
    pairs = zip(names, squares.sqrt().tolist(), strict=True)
    return {f"update_ratio_{part_of(name)}": change / size for name, (change, size) in pairs if size > 0}
