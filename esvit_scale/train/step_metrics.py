"""The rows of metrics.jsonl: measurements of one step (loss, norms, …), and rates since the row before."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.data.worker_rates import WorkerRates
from esvit_scale.objective.param_groups import part_of
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import collectives
from esvit_scale.parallel.engine import Engines, autocast
from esvit_scale.parallel.world import World
from esvit_scale.train import mfu
from esvit_scale.train.metrics import TIME_FIELDS
from esvit_scale.train.monitors import Monitors
from esvit_scale.train.online_knn import OnlineKnn
from esvit_scale.train.slow_nodes import SlowNodes

RANK_ME_ROWS = 256  # features from which the effective rank is computed


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step (`Trainer.train_step`)."""

    applied: bool  # False: the loss or a gradient was not finite on some rank, and nothing moved
    logs: dict[str, Tensor]  # scalars on the device, means over this rank's micro-batches; not yet over ranks
    grad_squares: Tensor  # [trainable parameters] squared norms of the gradients, before the clip
    update_squares: Tensor | None  # [watched parameters, 2] squared norms of updates and values, if they were measured
    features: Tensor  # [n, C] the student's view features of the last micro-batch


class StepMetrics:
    """A collector of the measurements between two rows, which makes the rows. All ranks make the same calls."""

    def __init__(
        self, config: Config, world: World, schedules: Schedules, engines: Engines, knn: OnlineKnn | None
    ) -> None:
        self._config, self._world, self._schedules = config, world, schedules
        self._engines, self._knn = engines, knn
        self._ideal_rate = collectives.run_on_rank0_and_broadcast(
            lambda: mfu.ideal_images_per_s(config, world.device, world.size)
        )
        self._batch = config.train.global_batch
        images = self._batch // world.size // config.train.grad_accum
        self._monitors = Monitors(config.objective.prototypes, images, config.model.freeze_patch_embed)
        self._workers, self._slow_nodes = WorkerRates(), SlowNodes()
        self._last_row: dict[str, Any] = {}

    def start(self, step: int) -> None:
        """Begin to measure a run, at its first step or where it is resumed."""
        self._began, self._first_step = time.monotonic(), step
        self.restart_window(step)

    def restart_window(self, step: int) -> None:
        """Begin to measure the next row's rates, when `step` steps are done."""
        self._window_began, self._window_step, self._wait_s = time.monotonic(), step, 0.0

    def add_wait(self, seconds: float) -> None:
        """Add the seconds that a step waited for its batch."""
        self._wait_s += seconds

    def add_worker_rates(self, rates: tuple[float, ...]) -> None:
        """Add the rates (images/s) at which the loader's processes produced a batch, one per process."""
        self._workers.add(rates)

    def row(
        self,
        step: int,
        result: StepResult,
        *,
        images_of_sets: dict[str, int],
        skipped_steps: int,
        bad_samples: int,
        compute_s: float,
    ) -> tuple[dict[str, Any], list[str]]:
        """Return a row of metrics.jsonl, and warnings about what it shows. All ranks call it.

        Args:
            step: number of steps that are done.
            result: the result of the last of these steps.
            images_of_sets: number of images seen of each set of a mix, by the set's name; empty without a mix.
            skipped_steps: number of the run's steps whose update was not applied.
            bad_samples: number of images that were replaced since the run began.
            compute_s: seconds that this rank computed in the last step before it waited for others.
        """
        names = list(result.logs)
        logs = torch.stack([result.logs[name].float() for name in names])
        means = collectives.all_reduce_mean_(logs).tolist()
        now, schedules, done = time.monotonic(), self._schedules, step - 1
        elapsed, steps = now - self._window_began, step - self._window_step
        worker_fields, slow_worker = self._workers.take()
        node_fields, slow_node = self._slow_nodes.observe(step, compute_s + self._wait_s / steps)
        row = {
            "step": step,
            "images_seen": step * self._batch,
            **{f"images_seen_{name}": images for name, images in images_of_sets.items()},
            **dict(zip(names, means, strict=True)),
            **self._measurements(step, result),
            "lr": schedules.lr(done),
            "wd": schedules.weight_decay(done),
            "momentum": schedules.ema_momentum(done),
            "teacher_temp": schedules.teacher_temp(done),
            "skipped_steps": skipped_steps,
            "images_per_s": steps * self._batch / elapsed,
            "mfu": steps * self._batch / elapsed / self._ideal_rate,
            "step_s": elapsed / steps,
            "data_wait_s": self._wait_s / steps,
            **worker_fields,
            **node_fields,
            "bad_samples": bad_samples,
            "time": time.time(),
        }
        self._window_began, self._window_step, self._wait_s = now, step, 0.0
        self._last_row = row
        return row, [sentence for sentence in (*self._monitors.observe(row), slow_worker, slow_node) if sentence]

    def summary(self, step: int) -> dict[str, Any]:
        """Return the measured fields of summary.json: seconds and images/s since the start, and the last row."""
        seconds = time.monotonic() - self._began
        return {
            "seconds_since_start": seconds,
            "images_per_s": (step - self._first_step) * self._batch / seconds,
            "last": {k: v for k, v in self._last_row.items() if k not in TIME_FIELDS},
        }

    def _measurements(self, step: int, result: StepResult) -> dict[str, float]:
        engines = self._engines
        clipper, centers = engines.clipper, engines.student.module.objective.extra_state()
        mine = torch.tensor([effective_rank(result.features)], device=clipper.device)
        (rank_me,) = collectives.all_reduce_mean_(mine)
        updates = {} if result.update_squares is None else update_ratios(result.update_squares, clipper.watched)
        return {
            **gradient_norms(result.grad_squares, clipper.names),
            **updates,
            **center_norms(centers),
            "rank_me": rank_me.item(),
            **self._knn_accuracy(step),
        }

    def _knn_accuracy(self, step: int) -> dict[str, float]:
        every = self._config.train.knn_every
        if self._knn is None or not every or step % every:
            return {}
        return {"knn_top1": self._knn.accuracy(self._engines, autocast(self._config, self._world.device))}


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


def center_norms(centers: dict[str, Tensor]) -> dict[str, float]:
    """Return the Euclidean norm of the centre [K] of each head, as fields of a row."""
    return {f"center_norm_{name.partition('.')[0]}": center.norm().item() for name, center in centers.items()}


def effective_rank(features: Tensor) -> float:
    """Return the effective rank of the features [n, C]: how many dimensions they use (RankMe, Garrido et al. 2023).

    It is exp of the entropy of the normalised singular values of at most RANK_ME_ROWS rows, and cannot exceed
    min(rows, C). It is NaN when a feature is not finite.
    """
    some = features[:RANK_ME_ROWS].to("cpu", torch.float64)
    if not torch.isfinite(some).all():
        return float("nan")
    values = torch.linalg.svdvals(some)
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))
