"""The trainer: one optimizer step, and the loop that repeats it.

`Trainer.train_step` is the step, in the order in which things happen. `Trainer.train` is the loop: for every batch a
step, a row of metrics and a checkpoint when they are due, and an early end when a signal asks for it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from esvit_scale import files, ranges
from esvit_scale.checkpoint import frozen_teacher, state, step_folders
from esvit_scale.checkpoint.initial_weights import NO_INITIAL_WEIGHTS, load_initial_weights
from esvit_scale.checkpoint.saver import Saver
from esvit_scale.config import Config
from esvit_scale.data import labels, stream
from esvit_scale.data.stream import Batch, MicroBatch
from esvit_scale.errors import Diverged, RestartCanHelp, UserError
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.objective.objective import joined_targets
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import collectives, engine
from esvit_scale.parallel.step_clock import StepClock
from esvit_scale.parallel.world import World
from esvit_scale.train import profiling, run_dir, signals, startup
from esvit_scale.train.implementations import PLAIN, Implementations
from esvit_scale.train.log_format import STOPPED
from esvit_scale.train.metrics import MetricLogger, log_file_errors
from esvit_scale.train.replaced import ReplacedShare
from esvit_scale.train.rollback import Rollbacks
from esvit_scale.train.run_resources import RunResources
from esvit_scale.train.signals import STOP, Flag
from esvit_scale.train.step_metrics import StepMetrics, StepResult

log = logging.getLogger("esvit_scale")

INTERRUPTED = 130  # exit code after ctrl-C


class Trainer:
    """The training of a config's student and teacher. All ranks make the same calls; rank 0 writes the records.

    Attributes:
        step: number of steps done, each with one global batch; the schedules are functions of it.
        optimizer_step: number of these steps whose update was applied, because loss and gradients were finite.
        data_offset: the next step trains on batch `step + data_offset` of the data order. A roll-back goes back in
            steps and not in data, so it raises the offset.
    """

    def __init__(
        self, config: Config, world: World, schedules: Schedules, fresh: bool = True, chosen: Implementations = PLAIN
    ) -> None:
        """Build and initialise student and teacher (parallel/engine.py says in which order and why).

        Args:
            fresh: False when a checkpoint will replace the initial values; `model.init_from` is then not read.
            chosen: the implementations of parts of the step (train/implementations.py chooses them).

        Raises:
            UserError: trunk, objective, crops and batch do not fit each other, or `model.init_from` does not fit them.
        """
        self.config, self.world, self.schedules = config, world, schedules
        initial = load_initial_weights(config) if fresh else NO_INITIAL_WEIGHTS
        self._origin = initial.note and f"starts from the {initial.note}"
        frozen = frozen_teacher.load(config)
        self.engines = engine.build(config, world, initial.values, frozen.values)
        engine.use_implementations(self.engines, *chosen)
        self.objective = self.engines.student.module.objective
        self._load_extra_state(frozen.centers or initial.centers)
        self.clock = StepClock(world.device)
        self.engines.layout.hook_gathers(self.engines.networks, self.clock.mark)
        if self.engines.gram is not None:
            self.engines.gram.begin_after(schedules.first_step)
        self.last_step = schedules.last_step
        self.step = self.optimizer_step = self.data_offset = 0
        self._flags, self._saved_step = Flag(0), -1

    # --- one step ----------------------------------------------------------------------------------------------------

    def train_step(
        self,
        micro_batches: list[MicroBatch],
        measure_updates: bool = False,
        flags: Callable[[], Flag] = lambda: Flag(0),
    ) -> StepResult:
        """Train on this rank's part of a global batch; no weight moves if a loss or gradient of any rank is not finite.

        Args:
            micro_batches: the parts into which this rank's part is split, `train.grad_accum` of them.
            measure_updates: also measure how far the step moves the weights.
            flags: returns this rank's flags for all ranks; called as late as it can be for this step.
        """
        config, schedules, step = self.config, self.schedules, self.step
        student, teacher, objectives = (
            self.engines.student,
            self.engines.teacher,
            self.engines.student.module.objectives,
        )
        engine.set_lr_and_weight_decay(
            self.engines, schedules.lr(step), schedules.trunk_lr(step), schedules.weight_decay(step)
        )
        temp, views = schedules.teacher_temp(step), len(config.crop_sizes) + sum(config.signal_views.values())
        sums: dict[str, Tensor] = {}
        applied = False
        for micro_batch in micro_batches:
            # Labels, and targets of the teacher or the frozen teacher, from the global crops.
            beside = (micro_batch.signals, micro_batch.has_image) if micro_batch.signals else ()
            targets = joined_targets(micro_batch.labels, self._teacher_targets(micro_batch.crops[:1], *beside))
            anchors = self._gram_anchors(micro_batch.crops[:1])

            # Student forward on all crops, and loss.
            keys = drop_keys(config.seed, step, micro_batch.positions, views)
            loss, logs, features = student(micro_batch.crops, targets, keys, temp, anchors, *beside)
            self.clock.end()

            # Backward.
            with ranges.named("backward"):
                student.backward(loss)
            for name, value in {"loss": loss.detach(), **logs}.items():
                sums[name] = sums[name] + value if name in sums else value
            del targets, anchors, loss  # frees the graph before the optimizer needs memory

            # Gradients and optimizer step, at the last micro-batch: norms → all finite? → clip → freeze → AdamW.
            applied = engine.take_step(
                self.engines,
                sums["loss"],
                freeze_last_layer=schedules.last_layer_frozen(step),
                freeze_trunk=schedules.trunk_frozen(step),
                measure_updates=measure_updates,
                flags=flags(),
            )

        if applied:
            # EMA of the student, in the teacher.
            teacher.update(schedules.ema_momentum(step))
            if not self.objective.has_teacher:
                teacher.sync_buffers()
            # Centres of the teacher's logits.
            for objective in objectives:
                objective.commit()
        else:
            for objective in objectives:
                objective.discard()

        # Gram teacher, a copy of the teacher every some steps.
        if self.engines.gram is not None:
            self.engines.gram.refresh_if_due(step + 1)

        # Metrics.
        self.step += 1
        self.optimizer_step += applied
        clipper = self.engines.clipper
        means = {name: value / config.train.grad_accum for name, value in sums.items()}
        updates = clipper.take_changes() if measure_updates else None
        return StepResult(applied, means, clipper.take_squares(), updates, features, clipper.take_flags())

    @torch.no_grad()
    def _teacher_targets(self, globals_: list[Tensor], *beside: Any) -> Any:
        """Return the teacher's outputs for global crops [[2·B, channels, S, S]]; None if the objective has no teacher.

        `beside` are the signals of the same samples and which of these have an image, in a run that reads signals.
        """
        frozen = self.engines.frozen
        if frozen is None and not self.objective.has_teacher:
            return None
        with engine.autocast(self.config, self.world.device):
            return (self.engines.teacher if frozen is None else frozen).network(globals_, *beside)

    @torch.no_grad()
    def _gram_anchors(self, globals_: list[Tensor]) -> Tensor | None:
        """Return the Gram teacher's region features of global crops [[2·B, channels, S, S]]; None if it is not on."""
        gram = self.engines.gram
        if gram is None or not gram.is_on(self.step):
            return None
        with engine.autocast(self.config, self.world.device):
            anchors: Tensor = gram.network(globals_)
        return anchors

    # --- the loop ----------------------------------------------------------------------------------------------------

    def train(self, run: RunResources) -> int:
        """Train from the run's last checkpoint to the last step of the schedules, and return the exit code.

        Returns:
            0 when the run, or its training stage, is finished; when a signal ended it early and it is saved, 0 with a file `requeue` in the run
            dir (SIGUSR1, SIGTERM) or 130 (ctrl-C).

        Raises:
            Diverged: loss or gradients stayed not finite, and going back to a checkpoint did not help; or `train.guard`
                ended the run.
            RestartCanHelp: a disk is full, or another process took the run over.
            UserError: too many images of the data cannot be used.
        """
        self._open(run)
        with closing(self._logger):
            for batch in profiling.profiled(self._batches(), run.path, self.config, self.world):
                row_is_due = self._row_is_due(self.step + 1)
                if row_is_due:
                    self.clock.begin()
                micro_batches = stream.micro_batches(self.config, batch, self.world.device, self.engines.dtype)
                result = self.train_step(micro_batches, row_is_due, partial(self._flags_of_rank, batch))
                self._record(batch, result)
                self._save_if_due()
                if self.stop_requested():
                    return self._leave()
                if problem := self._metrics.guards_stop(self.step):
                    self._stop(Diverged(f"{self._run.path}: stopped at step {self.step}: {problem}"))
                if self._metrics.has_stalled():
                    break
            self._finish()
        return 0

    def stop_requested(self) -> bool:
        """Return whether a signal reached some rank; all ranks learn it at the same step."""
        return bool(self._flags & STOP)

    def _open(self, run: RunResources) -> None:
        """Restore the checkpoint, if there is one, and open the run's records at its step."""
        self._run = run
        self._saver = Saver(run.path, self.config, run.identity, run.lock.check_held, run.on_saved)
        self._metrics = StepMetrics(self.config, self.world, self.schedules, self.engines, run, self._saver)
        self._replaced = ReplacedShare(self.config.train.global_batch, self.schedules.steps_per_epoch)
        self._rollbacks = Rollbacks(run.path, self.config.train)
        if run.checkpoint is not None:
            self._origin = self._restore(run.checkpoint)
        shorter = None
        if run.is_start:
            record = partial(run_dir.record_start, run.path, run.config, self.step)
            shorter = collectives.run_on_rank0_and_broadcast(record)
        facts = startup.run_facts(self.engines, self.schedules, self.step, run.data.samples)
        for line in startup.lines(self.schedules, self.engines, self.world, facts, self._origin, shorter):
            self._log(logging.INFO, "%s", line)
        self._logger = MetricLogger(run.path, self.schedules.run_steps, self.world.rank == 0, self.config)
        collectives.run_on_rank0_and_broadcast(lambda: self._logger.open(self.step))
        if row := self._metrics.start(facts, run.path, run.mirrored_step):
            self._logger.row(row)
        run.watchdog.beat(self.step)
        self._saved_at = time.monotonic()

    def _batches(self) -> Iterator[Batch]:
        """Yield this rank's part of every batch from `step + data_offset` on, which a roll-back changes."""
        config, world, data = self.config, self.world, self._run.data
        self._images_of_sets: Callable[[int], dict[str, int]] = stream.images_of_sets(config, data)
        while self.step < self.last_step:
            rollbacks = self._rollbacks.done
            first, end = self.step + self.data_offset, self.last_step + self.data_offset
            ahead = stream.batches(config, data, world.rank, world.size, first, end)
            with closing(ahead):  # type: ignore[type-var]
                while rollbacks == self._rollbacks.done:
                    asked = time.monotonic()
                    batch = next(ahead, None)
                    if batch is None:
                        return
                    self._metrics.add_wait(time.monotonic() - asked)
                    yield batch

    def _row_is_due(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step == self.last_step or self._metrics.is_measured(step)

    def _record(self, batch: Batch, result: StepResult) -> None:
        """Take all ranks' flags, write the records of the last step, and act on it if it was skipped."""
        self._run.watchdog.beat(self.step)
        self._metrics.add_worker_rates(batch.worker_rates)
        lost = not result.applied and not bool(torch.isfinite(result.logs["loss"]))
        mine = Flag.LOSS_NOT_FINITE if lost else Flag(0)
        self._flags = Flag(result.flags or 0)
        if not result.applied:
            mine |= self._flags_of_rank(batch) if result.flags is None else Flag(0)
            self._flags |= Flag(collectives.all_reduce_flags(mine))
        if self._flags & Flag.TAKEN_OVER:
            raise self._run.lock.taken_over()
        if self._flags & Flag.BAD_LABELS:
            self._stop_because_of_labels(batch)
        self._write_row()
        of_ranks = collectives.gather_objects(batch.bad) if self._flags & Flag.BAD_SAMPLES else []
        bad = [sample for samples in of_ranks for sample in samples]
        self._logger.bad_samples(self.step, bad)
        self._replaced.add(bad)
        self._logger.advance(self.step)
        if self._row_is_due(self.step):
            self._begin_row(result)
        if result.applied:
            self._rollbacks.note_applied()
        else:
            self._note_skipped(batch, mine)
        if problem := self._replaced.problem():
            self._stop(UserError(f"stopped at step {self.step}: {problem}"))

    def _flags_of_rank(self, batch: Batch) -> Flag:
        minutes = self.config.train.checkpoint_minutes
        # Rank 0's clock decides for all.
        save_now = self.world.rank == 0 and minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        flags = {
            Flag.BAD_SAMPLES: bool(batch.bad),
            Flag.SAVE_NOW: save_now,
            Flag.TAKEN_OVER: self._run.lock.lost(),
            Flag.BAD_LABELS: bool(labels.bad_keys(self.config, batch)),
        }
        return signals.request() | Flag(sum(flag for flag, is_set in flags.items() if is_set))

    def _begin_row(self, result: StepResult) -> None:
        """Measure a row of metrics.jsonl, without waiting for the device; `_write_row` writes it one step later."""
        self._metrics.begin_row(
            self.step,
            result,
            images_of_sets=self._images_of_sets(self.step + self.data_offset),
            skipped_steps=self.step - self.optimizer_step,
            bad_samples=self._logger.bad,
            compute_s=self.clock.take(),
        )

    def _write_row(self) -> None:
        """Write the row that was begun, if there is one, and log the warnings about it. All ranks call it."""
        if found := self._metrics.finish_row():
            row, warnings = found
            self._logger.row(row)
            for warning in warnings:
                self._log(logging.WARNING, "%s", warning)

    def _note_skipped(self, batch: Batch, mine: Flag) -> None:
        """Record a skipped step, and roll back when there were too many in a row.

        This rank's samples are recorded if its own loss was not finite, or if only gradients were not.
        """
        loss = self._flags & Flag.LOSS_NOT_FINITE
        if engine.loss_scale_can_fall(self.engines) and not loss:
            return  # an overflow of fp16, after which the loss scaler lowers the scale
        is_named = bool(mine & Flag.LOSS_NOT_FINITE) or not loss
        keys = [key for keys in collectives.gather_objects(batch.keys if is_named else []) for key in keys]
        self._logger.not_finite(self.step, keys, "the loss was" if loss else "gradients were")
        if self._rollbacks.note_skipped():
            self._roll_back(f"loss or gradients were not finite for {self._rollbacks.skipped} steps in a row")

    def _roll_back(self, reason: str) -> None:
        """Restore the last good checkpoint, and continue from its step with the batches after those already used.

        Raises:
            Diverged: there is none, or the run went back `train.rollbacks` times already.
        """
        self._write_row()
        with suppress(state.NotSaved):  # logged; the checkpoint before it serves as well
            self._saver.wait()
        try:
            folder = self._rollbacks.target(reason, self.step)
        except Diverged:
            with log_file_errors():
                self._write_summary(finished=False)
            raise
        failed, consumed = self.step, self.step + self.data_offset
        self._restore(folder)
        self.data_offset = consumed - self.step
        self._rollbacks.note_done()
        collectives.run_on_rank0_and_broadcast(lambda: self._logger.rewind(self.step))
        self._metrics.restart_window(self.step)
        self._log(
            logging.WARNING,
            "%s: going back from step %d to %s, and on with other data (offset %d); roll-back %d of %d",
            *(reason, failed, folder.name, self.data_offset),
            *(self._rollbacks.done, self.config.train.rollbacks),
        )

    # --- checkpoints and the end -------------------------------------------------------------------------------------

    def _restore(self, folder: Path) -> str:
        """Go on from a checkpoint of this stage, or begin the stage from the last one of the stage before.

        Returns:
            Where the weights come from, for the log.
        """
        step, schedules = step_folders.step_of(folder) or 0, self.schedules
        if step < schedules.first_step:  # the last checkpoint of the stage before is damaged, or gone
            raise RestartCanHelp(
                f"{folder}: the newest good checkpoint is of an earlier stage; a start goes on from it"
            )
        extra_state = self.objective.empty_extra_state(self.world.device)
        if schedules.number and step == schedules.first_step:
            cursor, carried = state.carry_over(folder, self.engines, extra_state)
            data_offset, origin = schedules.first_batch - step, f"starts from {folder}: {carried}"
        else:
            cursor = state.restore(folder, self.engines, extra_state)
            data_offset, origin = cursor["data_offset"], f"resumed from {folder} at step {step}"
        self._load_extra_state(extra_state)
        self.step = self._saved_step = step
        self.optimizer_step, self.data_offset = cursor["optimizer_step"], data_offset
        signals.set_kept(folder)
        return origin

    def _load_extra_state(self, extra_state: dict[str, Tensor]) -> None:
        """Restore what the first objective's `extra_state` returned, in all: students of one teacher have equal centres."""
        for objective in self.engines.student.module.objectives:
            objective.load_extra_state(extra_state)

    def _save_if_due(self) -> None:
        every, save_now = self.config.train.checkpoint_every, bool(self._flags & Flag.SAVE_NOW)
        due = save_now or self.step % every == 0 or self._metrics.is_best(self.step)
        must = self.stop_requested() or self.step == self.last_step
        # No regular save right after a skipped step: a roll-back must not lead back into a series of skipped steps.
        if must or (due and not self._rollbacks.skipped):
            self._save()

    def _save(self) -> None:
        """Begin to save the state, unless this step is saved already. If the state is not finite, roll back instead."""
        collectives.run_on_rank0_and_broadcast(self._run.lock.check_held)
        self._write_row()  # a resume from here must find it
        if self._saved_step == self.step:
            return
        if bad := state.find_nonfinite(self.engines, self.objective.extra_state()):
            self._roll_back(f"the state is not finite ({', '.join(bad[:3])}) and was not saved")
            return
        cursor = {
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "batch_index": self.step + self.data_offset,
            "data_offset": self.data_offset,
            "images_seen": self.schedules.images_seen(self.step),
        }
        self._saver.start(self.engines, self.objective.extra_state(), cursor, self._metrics.is_best(self.step))
        self._saved_step, self._saved_at = self.step, time.monotonic()
        self._run.watchdog.beat(self.step)

    def _leave(self) -> int:
        """End early because of a signal, after the save; return the exit code."""
        self._saver.wait()
        with log_file_errors():
            self._write_summary(finished=self.step == self.schedules.run_steps)
        interrupted = self._flags & Flag.INTERRUPT
        if self.world.rank == 0:
            log.warning(STOPPED, self.step, self.schedules.run_steps)
            if not interrupted and self.step < self.schedules.run_steps:
                # On a full disk this ends with exit code 75, which asks for a requeue as well.
                files.write_text(self._run.path / "requeue", f"{self.step}\n")
        return INTERRUPTED if interrupted else 0

    def _finish(self) -> None:
        self._save()
        self._saver.wait()
        is_end = not self.schedules.steps_after
        collectives.run_on_rank0_and_broadcast(lambda: self._write_summary(finished=is_end))
        for line in self._metrics.last_lines(self.step) if is_end else ():
            self._log(logging.INFO, "%s", line)

    def _stop(self, error: UserError | Diverged) -> NoReturn:
        """Save the run, unless the last step was skipped, and raise an error on all ranks because of its data or features."""
        self._write_row()
        if not self._rollbacks.skipped:
            self._save()
        self._saver.wait()
        with log_file_errors():
            self._write_summary(finished=False)
        raise error

    def _stop_because_of_labels(self, batch: Batch) -> NoReturn:
        """Raise UserError on all ranks because of labels from which nothing can be learned; this step is not saved."""
        of_ranks = collectives.gather_objects(labels.bad_keys(self.config, batch))
        found = [sample for samples in of_ranks for sample in samples]
        self._saver.wait()
        raise UserError(f"stopped at step {self.step}: sample {found[0]}")

    def _write_summary(self, finished: bool) -> None:
        if self.world.rank != 0:
            return
        numbers = {"finished": finished, "step": self.step, "optimizer_step": self.optimizer_step}
        numbers |= {"data_offset": self.data_offset, "rollbacks": self._rollbacks.done}
        files.write_json(self._run.path / "summary.json", numbers | self._metrics.summary(self.step))

    def _log(self, level: int, text: str, *values: Any) -> None:
        """Log a message on rank 0 alone, so that it does not appear once per rank."""
        if self.world.rank == 0:
            log.log(level, text, *values)
