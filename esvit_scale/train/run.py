"""A run while it lives: its cursor, its records, its saves and its way out."""

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from esvit_scale import files
from esvit_scale.checkpoint import state
from esvit_scale.data.stream import Batch
from esvit_scale.data.worker_rates import WorkerRates
from esvit_scale.errors import Diverged, UserError
from esvit_scale.parallel import collectives
from esvit_scale.train import metrics, mfu, run_dir, signals
from esvit_scale.train.monitors import Monitors
from esvit_scale.train.step import Session, StepResult
from esvit_scale.train.watchdog import Watchdog

log = logging.getLogger("esvit_scale")

INTERRUPTED = 130
SKIPS_IN_A_ROW = 20  # then the run has diverged: a NaN that comes and goes is one skipped step
REQUESTS: tuple[signals.Request, ...] = ("none", "requeue", "interrupt")  # what weighs more comes later
ASKED = 3  # the bits of a request
BAD_SAMPLES, SAVE_NOW = 4, 8


class Run:
    """Opens on the run's last checkpoint; all ranks make the same calls, rank 0 writes.

    `step` counts batches consumed (the clock of schedules and data), `optimizer_step` the updates that were applied.
    """

    def __init__(self, path: Path, session: Session, lock: run_dir.Lock) -> None:
        self._path, self._session, self._lock = path, session, lock
        self._rank = session.world.rank
        self._batch = session.config.train.global_batch
        self.last_step = session.schedules.total_steps
        self.step = self.optimizer_step = 0
        self._saved = -1
        self._skips = 0
        self._flags = 0
        self._row: dict[str, Any] = {}
        self._monitors = Monitors(session.config.objective.prototypes)
        self._wait_s = 0.0
        self._workers = WorkerRates()

    def __enter__(self) -> "Run":
        metrics.start_logging(self._path, active=self._rank == 0)
        config, world = self._session.config, self._session.world
        self._ideal_rate = collectives.on_rank_0(lambda: mfu.ideal_images_per_s(config, world.device, world.size))
        self._resume()
        collectives.on_rank_0(lambda: run_dir.record_start(self._path, self._session.config))
        self._watchdog = Watchdog(self._rank, 60 * self._session.config.train.hang_minutes).__enter__()
        self._journal = metrics.Journal(self._path, self.last_step, self.step, active=self._rank == 0)
        self._window_began, self._window_step = time.monotonic(), self.step
        self._began, self._began_step = time.monotonic(), self.step
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watchdog.__exit__(*error)
        self._journal.close()

    def waiting_for(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time that the step waited for each added up."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            self._wait_s += time.monotonic() - asked
            yield batch

    def record(self, batch: Batch, result: StepResult) -> None:
        """The step is done: move the cursor, hear the ranks, and write a row where one is due."""
        self.step += 1
        self._watchdog.beat(self.step)
        self.optimizer_step += result.applied
        self._workers.add(batch.worker_rates)
        self._flags = collectives.bits_of_ranks(self._my_flags(batch))
        if self._flags & BAD_SAMPLES:
            bad = [sample for samples in collectives.gather_objects(batch.bad) for sample in samples]
            self._journal.bad_samples(self.step, bad)
        self._count_skips(result)
        self._journal.advance(self.step)
        if self.step % self._session.config.train.log_every == 0 or self.step == self.last_step:
            self._write_row(result)

    def asked(self) -> bool:
        """A signal reached some rank; known to all ranks at the same step."""
        return bool(self._flags & ASKED)

    def save_if_due(self) -> None:
        if self.step % self._session.config.train.checkpoint_every == 0 or self._flags & (ASKED | SAVE_NOW):
            self._save()

    def leave(self) -> int:
        """Saved because of a signal: say how to continue; the exit code."""
        self._write_summary(finished=self.step == self.last_step)
        interrupt = self._flags & REQUESTS.index("interrupt")
        if self._rank == 0:
            log.warning("stopped at step %d/%d, saved; the same command continues", self.step, self.last_step)
            if not interrupt and self.step < self.last_step:
                files.write_text(self._path / "requeue", f"{self.step}\n")
        return INTERRUPTED if interrupt else 0

    def finish(self) -> None:
        self._save()
        self._write_summary(finished=True)
        if self._rank == 0:
            log.info("finished: %d steps, %s", self.step, self._path)

    def _resume(self) -> None:
        folder = state.newest_good(self._path)
        if folder is None:
            if self._session.origin and self._rank == 0:
                log.info("starts from the %s", self._session.origin)
            return
        objective, engines = self._session.objective, self._session.engines
        centers = self._empty_centers()
        cursor = state.restore(folder, engines, centers)
        objective.load_centers_state(centers)
        self.step, self.optimizer_step, self._saved = cursor["step"], cursor["optimizer_step"], cursor["step"]
        if self._rank == 0:
            log.info("resumed from %s at step %d", folder, self.step)

    def _empty_centers(self) -> dict[str, torch.Tensor]:
        names = ["view.values", "region.values"] if self._session.config.objective.regions else ["view.values"]
        size, device = self._session.config.objective.prototypes, self._session.world.device
        return {name: torch.zeros(size, device=device) for name in names}

    def _my_flags(self, batch: Batch) -> int:
        minutes = self._session.config.train.checkpoint_minutes
        # One clock decides for all ranks.
        save_now = self._rank == 0 and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        return REQUESTS.index(signals.request()) | (BAD_SAMPLES if batch.bad else 0) | (SAVE_NOW if save_now else 0)

    def _count_skips(self, result: StepResult) -> None:
        if result.applied:
            self._skips = 0
            return
        self._skips += 1
        if self._rank == 0:
            log.warning("step %d: gradients were not finite; the step was skipped, nothing moved", self.step)
        if self._skips == SKIPS_IN_A_ROW:
            raise Diverged(
                f"{self._path}: gradients were not finite for {SKIPS_IN_A_ROW} steps in a row, up to step {self.step}; the last "
                f"good checkpoint is in checkpoints/latest. Try a lower optim.lr or a longer optim.warmup_epochs"
            )

    def _write_row(self, result: StepResult) -> None:
        names = list(result.logs)
        means = collectives.all_reduce_mean_(torch.stack([result.logs[name].float() for name in names])).tolist()
        now, schedules, done = time.monotonic(), self._session.schedules, self.step - 1
        elapsed, steps = now - self._window_began, self.step - self._window_step
        worker_fields, slow_worker = self._workers.take()
        self._row = {
            "step": self.step,
            "images_seen": self.step * self._batch,
            **dict(zip(names, means, strict=True)),
            "grad_norm": result.grad_norm.item(),
            "lr": schedules.lr(done),
            "wd": schedules.weight_decay(done),
            "momentum": schedules.ema_momentum(done),
            "teacher_temp": schedules.teacher_temp(done),
            "skipped_steps": self.step - self.optimizer_step,
            "images_per_s": steps * self._batch / elapsed,
            "mfu": steps * self._batch / elapsed / self._ideal_rate,
            "step_s": elapsed / steps,
            "data_wait_s": self._wait_s / steps,
            **worker_fields,
            "bad_samples": self._journal.bad,
            "time": time.time(),
        }
        self._window_began, self._window_step, self._wait_s = now, self.step, 0.0
        self._journal.row(self._row)
        for sentence in filter(None, [*self._monitors.observe(self._row), slow_worker]):
            if self._rank == 0:
                log.warning("%s", sentence)

    def _save(self) -> None:
        if self._saved == self.step:
            return
        collectives.on_rank_0(self._check_lock)
        cursor = {
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "batch_index": self.step,
            "data_offset": 0,
            "images_seen": self.step * self._batch,
        }
        engines, centers = self._session.engines, self._session.objective.centers_state()
        state.save(self._path, self._session.config, engines, centers, cursor)
        self._saved, self._saved_at = self.step, time.monotonic()
        self._watchdog.beat(self.step)

    def _check_lock(self) -> None:
        if not self._lock.held():
            raise UserError(f"{self._path}: another process took this run over; this one stops without writing")

    def _write_summary(self, finished: bool) -> None:
        if self._rank != 0:
            return
        seconds = time.monotonic() - self._began
        summary = {
            "finished": finished,
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "images_seen": self.step * self._batch,
            "world_size": self._session.world.size,
            "seconds_since_start": seconds,
            "images_per_s": (self.step - self._began_step) * self._batch / seconds,
            "last": {k: v for k, v in self._row.items() if k not in metrics.TIME_FIELDS},
        }
        files.write_json(self._path / "summary.json", summary)
