"""A run while it lives: its cursor, its records, its saves and its way out."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

from esvit_scale import files
from esvit_scale.checkpoint import state, step_folders
from esvit_scale.checkpoint.saver import Saver
from esvit_scale.data import stream
from esvit_scale.data.identity import Identity
from esvit_scale.data.stream import Batch, Source
from esvit_scale.data.worker_rates import WorkerRates
from esvit_scale.errors import Diverged, RestartCanHelp, UserError, in_words
from esvit_scale.parallel import collectives
from esvit_scale.parallel import engine as engine_module
from esvit_scale.train import gauges, metrics, mfu, run_dir, signals
from esvit_scale.train.lock import Lock
from esvit_scale.train.monitors import Monitors
from esvit_scale.train.online_knn import OnlineKnn
from esvit_scale.train.replaced import ReplacedShare
from esvit_scale.train.slow_nodes import SlowNodes
from esvit_scale.train.step import Session, StepResult
from esvit_scale.train.watchdog import Watchdog

log = logging.getLogger("esvit_scale")

INTERRUPTED = 130
REQUESTS: tuple[signals.Request, ...] = ("none", "requeue", "interrupt")  # what weighs more comes later
ASKED = 3  # the bits of a request
BAD_SAMPLES, SAVE_NOW, NOT_FINITE, TAKEN_OVER = 4, 8, 16, 32


class Run:
    """Opens on the run's last checkpoint; all ranks make the same calls, rank 0 writes.

    `step` counts batches consumed (the clock of the schedules), `optimizer_step` the updates that were applied. The
    batch of a step is number `step + data_offset` of the data order: a roll-back goes back in steps, not in data.
    """

    def __init__(
        self,
        path: Path,
        session: Session,
        lock: Lock,
        watchdog: Watchdog,
        checkpoint: Path | None,
        data: Identity,
        knn: OnlineKnn | None = None,
    ) -> None:
        self._path, self._session, self._lock, self._watchdog = path, session, lock, watchdog
        self._checkpoint, self._data = checkpoint, data
        self._rank = session.world.rank
        self._batch = session.config.train.global_batch
        self.last_step = session.schedules.total_steps
        self.step = self.optimizer_step = self.data_offset = 0
        self._saved = -1
        self._skips = self._rollbacks = 0
        self._flags = 0
        self._row: dict[str, Any] = {}
        self._knn = knn
        train = session.config.train
        images = train.global_batch // session.world.size // train.grad_accum
        frozen = session.config.model.freeze_patch_embed
        self._monitors = Monitors(session.config.objective.prototypes, images, frozen)
        self._wait_s = 0.0
        self._workers = WorkerRates()
        self._slow_nodes = SlowNodes()
        self._replaced = ReplacedShare(self._batch, session.schedules.steps_per_epoch)

    def __enter__(self) -> "Run":
        self._saver = Saver(self._path, self._session.config, self._data, self._check_lock)
        config, world = self._session.config, self._session.world
        self._ideal_rate = collectives.run_on_rank0_and_broadcast(
            lambda: mfu.ideal_images_per_s(config, world.device, world.size)
        )
        self._resume()
        collectives.run_on_rank0_and_broadcast(lambda: run_dir.record_start(self._path, self._session.config))
        self._watchdog.beat(self.step)
        self._logger = metrics.MetricLogger(self._path, self.last_step, active=self._rank == 0)
        collectives.run_on_rank0_and_broadcast(lambda: self._logger.open(self.step))
        self._window_began, self._window_step = time.monotonic(), self.step
        self._began, self._began_step = time.monotonic(), self.step
        self._saved_at = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._logger.close()

    def batches(self, data: Source) -> Iterator[Batch]:
        """This rank's part of every batch from the cursor on, with the time that the step waited for each added up;
        after a roll-back, from the cursor's new place."""
        self._images_of_sets = stream.images_of_sets(self._session.config, data)
        while self.step < self.last_step:
            rollbacks, world = self._rollbacks, self._session.world
            first, end = self.step + self.data_offset, self.last_step + self.data_offset
            ahead = stream.batches(self._session.config, data, world.rank, world.size, first, end)
            with closing(ahead):  # type: ignore[type-var]
                while rollbacks == self._rollbacks:
                    asked = time.monotonic()
                    batch = next(ahead, None)
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
        mine = self._my_flags(batch, result)
        self._flags = collectives.all_reduce_flags(mine)
        if self._flags & TAKEN_OVER:
            raise self._taken_over()
        if self._flags & BAD_SAMPLES:
            bad = [sample for samples in collectives.gather_objects(batch.bad) for sample in samples]
            self._logger.bad_samples(self.step, bad)
            self._replaced.add(bad)
        else:
            self._replaced.add(())
        self._logger.advance(self.step)
        if self.row_is_due(self.step):
            self._write_row(result)
        if result.applied:
            self._skips = 0
        else:
            self._skipped(batch, named=mine & NOT_FINITE or not self._flags & NOT_FINITE)
        if problem := self._replaced.problem():
            self._stop(problem)

    def row_is_due(self, step: int | None = None) -> bool:
        """Whether the step under way (or `step`) gets a row in metrics.jsonl."""
        step = self.step + 1 if step is None else step
        return step % self._session.config.train.log_every == 0 or step == self.last_step

    def asked(self) -> bool:
        """A signal reached some rank; known to all ranks at the same step."""
        return bool(self._flags & ASKED)

    def save_if_due(self) -> None:
        due = self.step % self._session.config.train.checkpoint_every == 0 or self._flags & SAVE_NOW
        must = self._flags & ASKED or self.step == self.last_step
        if must or (due and not self._skips):  # a roll-back must lead out of a bad stretch
            self._save()

    def leave(self) -> int:
        """Saved because of a signal: say how to continue; the exit code."""
        self._saver.wait()
        with self._logged_only():
            self._write_summary(finished=self.step == self.last_step)
        interrupt = self._flags & REQUESTS.index("interrupt")
        if self._rank == 0:
            log.warning("stopped at step %d/%d, saved; the same command continues", self.step, self.last_step)
            if not interrupt and self.step < self.last_step:
                files.write_text(
                    self._path / "requeue", f"{self.step}\n"
                )  # a full disk: exit 75, which requeues as well
        return INTERRUPTED if interrupt else 0

    def finish(self) -> None:
        self._save()
        self._saver.wait()
        collectives.run_on_rank0_and_broadcast(lambda: self._write_summary(finished=True))
        if self._rank == 0:
            log.info("finished: %d steps, %s", self.step, self._path)

    def _stop(self, problem: str) -> NoReturn:
        """Save the run and end it because of its data. Raises UserError on all ranks, at the same step."""
        if not self._skips:
            self._save()
        self._saver.wait()
        with self._logged_only():
            self._write_summary(finished=False)
        raise UserError(f"stopped at step {self.step}: {problem}")

    def _resume(self) -> None:
        folder = self._checkpoint
        if folder is not None:
            self._restore(folder)
            if self._rank == 0:
                log.info("resumed from %s at step %d", folder, self.step)
        elif self._session.origin and self._rank == 0:
            log.info("starts from the %s", self._session.origin)

    def _restore(self, folder: Path) -> None:
        centers = self._session.objective.empty_extra_state(self._session.world.device)
        cursor = state.restore(folder, self._session.engines, centers)
        self._session.objective.load_extra_state(centers)
        self.step, self.optimizer_step, self._saved = cursor["step"], cursor["optimizer_step"], cursor["step"]
        self.data_offset = cursor["data_offset"]

    def _my_flags(self, batch: Batch, result: StepResult) -> int:
        minutes = self._session.config.train.checkpoint_minutes
        # One clock decides for all ranks.
        save_now = self._rank == 0 and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        not_finite = not result.applied and not bool(torch.isfinite(result.logs["loss"]))
        flags = {
            BAD_SAMPLES: bool(batch.bad),
            SAVE_NOW: save_now,
            NOT_FINITE: not_finite,
            TAKEN_OVER: self._lock.lost(),
        }
        return REQUESTS.index(signals.request()) | sum(bit for bit, is_set in flags.items() if is_set)

    def _skipped(self, batch: Batch, named: int | bool) -> None:
        """Record a step in which nothing moved. `named`: quarantine this rank's samples: its own loss was not finite, or
        every loss was finite and a gradient overflowed."""
        if engine_module.loss_scale_can_fall(self._session.engines) and not self._flags & NOT_FINITE:
            return  # it halves the scale and goes on
        self._skips += 1
        keys = [key for keys in collectives.gather_objects(batch.keys if named else []) for key in keys]
        self._logger.not_finite(self.step, keys, "the loss was" if self._flags & NOT_FINITE else "gradients were")
        if self._skips == self._session.config.train.skips_before_rollback:
            self._roll_back(f"loss or gradients were not finite for {self._skips} steps in a row")

    def _roll_back(self, reason: str) -> None:
        """Go back to the last good checkpoint, and leave the data of the steps since then behind.

        Raises:
            Diverged: there is none, or this was done often enough.
        """
        with suppress(state.NotSaved):  # logged; the one before it serves as well
            self._saver.wait()
        folder = step_folders.newest_valid(self._path)
        if folder is None or self._rollbacks == self._session.config.train.rollbacks:
            with self._logged_only():
                self._write_summary(finished=False)
            raise Diverged(
                f"{self._path}: {reason}, up to step {self.step}, "
                f"{'before the first checkpoint' if folder is None else f'after going back {self._rollbacks} times'}; "
                "their samples are in quarantine.jsonl, the norms before them in metrics.jsonl. Try a lower optim.lr, a "
                "longer optim.warmup_epochs, model.freeze_patch_embed=true, or train.precision=fp32"
            )
        failed, consumed = self.step, self.step + self.data_offset
        self._restore(folder)
        self.data_offset = consumed - self.step
        self._rollbacks, self._skips = self._rollbacks + 1, 0
        collectives.run_on_rank0_and_broadcast(lambda: self._logger.rewind(self.step))
        self._window_began, self._window_step, self._wait_s = time.monotonic(), self.step, 0.0
        if self._rank == 0:
            log.warning(
                "%s: back from step %d to %s, with other data (offset %d); %d of %d times",
                *(reason, failed, folder.name, self.data_offset),
                *(self._rollbacks, self._session.config.train.rollbacks),
            )

    def _write_row(self, result: StepResult) -> None:
        names = list(result.logs)
        means = collectives.all_reduce_mean_(torch.stack([result.logs[name].float() for name in names])).tolist()
        now, schedules, done = time.monotonic(), self._session.schedules, self.step - 1
        elapsed, steps = now - self._window_began, self.step - self._window_step
        worker_fields, slow_worker = self._workers.take()
        own_s = self._session.clock.take() + self._wait_s / steps
        node_fields, slow_node = self._slow_nodes.observe(self.step, own_s)
        self._row = {
            "step": self.step,
            "images_seen": self.step * self._batch,
            **{f"images_seen_{k}": n for k, n in self._images_of_sets(self.step + self.data_offset).items()},
            **dict(zip(names, means, strict=True)),
            **self._gauges(result),
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
            **node_fields,
            "bad_samples": self._logger.bad,
            "time": time.time(),
        }
        self._window_began, self._window_step, self._wait_s = now, self.step, 0.0
        self._logger.row(self._row)
        for sentence in filter(None, [*self._monitors.observe(self._row), slow_worker, slow_node]):
            if self._rank == 0:
                log.warning("%s", sentence)

    def _gauges(self, result: StepResult) -> dict[str, float]:
        clipper = self._session.engines.clipper
        (rank_me,) = collectives.all_reduce_mean_(
            torch.tensor([gauges.rank_me(result.features)], device=clipper.device)
        )
        return {
            **gauges.gradient_norms(result.grad_squares, clipper.names),
            **gauges.update_ratios(clipper.take_changes(), clipper.watched),
            **gauges.center_norms(self._session.objective.extra_state()),
            "rank_me": rank_me.item(),
            **self._knn_due(),
        }

    def _knn_due(self) -> dict[str, float]:
        every = self._session.config.train.knn_every
        if self._knn is None or not every or self.step % every:
            return {}
        autocast = engine_module.autocast(self._session.config, self._session.world.device)
        return {"knn_top1": self._knn.accuracy(self._session.engines, autocast)}

    def _save(self) -> None:
        if self._saved == self.step:
            return
        collectives.run_on_rank0_and_broadcast(self._check_lock)
        if bad := state.find_nonfinite(self._session.engines, self._session.objective.extra_state()):
            self._roll_back(f"the state is not finite ({', '.join(bad[:3])}) and was not saved")
            return
        cursor = {
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "batch_index": self.step + self.data_offset,
            "data_offset": self.data_offset,
            "images_seen": self.step * self._batch,
        }
        self._saver.start(self._session.engines, self._session.objective.extra_state(), cursor)
        self._saved, self._saved_at = self.step, time.monotonic()
        self._watchdog.beat(self.step)

    def _check_lock(self) -> None:
        if not self._lock.held():
            raise self._taken_over()

    def _taken_over(self) -> RestartCanHelp:
        return RestartCanHelp(f"{self._path}: another process took this run over; this one stops without writing")

    @contextmanager
    def _logged_only(self) -> Iterator[None]:
        """Around what the run can do without: a disk that does not take it is logged."""
        try:
            yield
        except OSError as error:
            log.warning("%s", in_words(error))

    def _write_summary(self, finished: bool) -> None:
        if self._rank != 0:
            return
        seconds = time.monotonic() - self._began
        summary = {
            "finished": finished,
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "images_seen": self.step * self._batch,
            "data_offset": self.data_offset,
            "rollbacks": self._rollbacks,
            "world_size": self._session.world.size,
            "seconds_since_start": seconds,
            "images_per_s": (self.step - self._began_step) * self._batch / seconds,
            "last": {k: v for k, v in self._row.items() if k not in metrics.TIME_FIELDS},
        }
        files.write_json(self._path / "summary.json", summary)
