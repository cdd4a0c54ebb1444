"""The schedules of a run, or of one of its training stages: pure functions of the optimizer step of the run (from 0).

Learning rate, weight decay and EMA momentum change per step; the teacher's temperature and the freeze of the last layer
change per epoch. With `optim.schedule: cosine`, values are those of the official code's tables. A run that is shorter
than its warm-up ends within it, as the beginning of a longer run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from esvit_scale.config import Config


@dataclass(frozen=True)
class Schedules:
    """The schedules of a run or of one of its training stages, by optimizer step of the run."""

    config: Config  # of the stage
    steps_per_epoch: int
    # What the stages before this one did.
    number: int = 0  # how many there are
    first_step: int = 0  # optimizer steps
    first_image: int = 0  # images
    first_epoch: int = 0  # epochs of the data order that they began
    steps_after: int = 0  # optimizer steps of the stages after this one

    @property
    def total_steps(self) -> int:
        """The length of the schedules in optimizer steps."""
        return self.config.train.steps or self.config.train.epochs * self.steps_per_epoch

    @property
    def last_step(self) -> int:
        """The number of steps of the run that are done when the stage is."""
        return self.first_step + self.total_steps

    @property
    def run_steps(self) -> int:
        """The length of the run, with all its stages, in optimizer steps."""
        return self.last_step + self.steps_after

    @property
    def first_batch(self) -> int:
        """The global batch of the data order with which the stage begins: the first of an epoch that no stage has begun."""
        return self.first_epoch * self.steps_per_epoch

    def images_seen(self, step: int) -> int:
        """Return the number of images that the run has trained on after `step` steps."""
        return self.first_image + (step - self.first_step) * self.config.train.global_batch

    def lr(self, step: int) -> float:
        """Return the learning rate at a step."""
        optim = self.config.optim
        warmup = int(optim.warmup_epochs * self.steps_per_epoch)
        return self._move(step, self.config.peak_lr, optim.lr_end, warmup)

    def trunk_lr(self, step: int) -> float:
        """Return the learning rate of the trunk at a step: `lr`, but at most that of a warm-up that begins when the trunk is
        no longer frozen."""
        optim = self.config.optim
        warmup = int(optim.warmup_epochs * self.steps_per_epoch)
        since = step - self.first_step - optim.freeze_trunk_steps
        lr = self.lr(step)
        return min(lr, linspace(0.0, self.config.peak_lr, warmup, max(since, 0))) if since < warmup else lr

    def weight_decay(self, step: int) -> float:
        """Return the weight decay at a step."""
        optim = self.config.optim
        return self._move(step, optim.weight_decay, optim.weight_decay_end)

    def ema_momentum(self, step: int) -> float:
        """Return the momentum of the EMA teacher at a step."""
        objective = self.config.objective
        return self._move(step, objective.ema_momentum, objective.ema_momentum_end)

    def teacher_temp(self, step: int) -> float:
        """Return the teacher's temperature at a step."""
        objective = self.config.objective
        epoch = (step - self.first_step) // self.steps_per_epoch
        if epoch >= objective.teacher_temp_warmup_epochs:
            return objective.teacher_temp_end
        return linspace(objective.teacher_temp, objective.teacher_temp_end, objective.teacher_temp_warmup_epochs, epoch)

    def _move(self, step: int, base: float, end: float, warmup: int = 0) -> float:
        step -= self.first_step
        if self.config.optim.schedule == "cosine":
            return warmup_cosine(step, self.total_steps, base, end, warmup)
        start = cooldown_start(self.total_steps, self.config.optim.cooldown)
        return warmup_constant(step, self.total_steps, base, end, start, warmup)

    def last_layer_frozen(self, step: int) -> bool:
        """Return whether the last layer is frozen at a step."""
        return (step - self.first_step) // self.steps_per_epoch < self.config.optim.freeze_last_layer_epochs

    def trunk_frozen(self, step: int) -> bool:
        """Return whether the trunk is frozen at a step."""
        return step - self.first_step < self.config.optim.freeze_trunk_steps


def of_stages(configs: Sequence[Config], steps_per_epoch: Sequence[int]) -> list[Schedules]:
    """Return the schedules of a run's training stages, given the config and the steps per epoch of each."""
    found, step, image, epoch = list[Schedules](), 0, 0, 0
    for number, (config, per_epoch) in enumerate(zip(configs, steps_per_epoch, strict=True)):
        schedules = Schedules(config, per_epoch, number, step, image, epoch)
        found.append(schedules)
        step, image = schedules.last_step, schedules.images_seen(schedules.last_step)
        epoch += -(-schedules.total_steps // per_epoch)
    return [replace(schedules, steps_after=step - schedules.last_step) for schedules in found]


def warmup_cosine(step: int, total: int, base: float, end: float, warmup: int = 0) -> float:
    """Return the value at `step` of a warm-up and half a cosine.

    It rises linearly from 0 to `base` in `warmup` steps (the last of them is at `base`), then follows half a cosine
    towards `end`, which would be reached at step `total`.
    """
    if step < warmup:
        return linspace(0.0, base, warmup, step)
    progress = min(step - warmup, total - warmup) / max(total - warmup, 1)
    return end + 0.5 * (base - end) * (1 + math.cos(math.pi * progress))


def warmup_constant(step: int, total: int, base: float, end: float, start: int, warmup: int = 0) -> float:
    """Return the value at `step` of a warm-up, a constant and a cooldown.

    It rises linearly from 0 to `base` in `warmup` steps, stays at `base`, and from step `start` goes straight to `end`,
    which would be reached at step `total`.
    """
    if step < warmup:
        return linspace(0.0, base, warmup, step)
    return base + (end - base) * max(0, min(step, total) - start) / max(total - start, 1)


def cooldown_start(total: int, cooldown: float) -> int:
    """Return the first step of the cooldown, which takes the last fraction `cooldown` of the `total` steps.

    Before it, the values do not depend on the length of the run.
    """
    return total - round(cooldown * total)


def linspace(start: float, stop: float, count: int, i: int) -> float:
    """Return element i of numpy.linspace(start, stop, count)."""
    if count > 1 and i == count - 1:
        return stop
    return start + i * ((stop - start) / max(count - 1, 1))
