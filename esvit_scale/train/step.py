"""One optimizer step: micro-batches through teacher and student, then the updates that belong to an applied step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esvit_scale.checkpoint.initial_weights import NO_INITIAL_WEIGHTS, load_initial_weights
from esvit_scale.config import Config
from esvit_scale.data import photometric
from esvit_scale.data.pixel_format import pixel_format
from esvit_scale.data.stream import Batch
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import engine as engine_module
from esvit_scale.parallel.engine import Engines
from esvit_scale.parallel.step_clock import StepClock
from esvit_scale.parallel.world import World


@dataclass(frozen=True)
class Session:
    """What a training step needs, all of it made before the first one."""

    config: Config
    world: World
    engines: Engines
    schedules: Schedules
    clock: StepClock = field(default_factory=StepClock)
    origin: str = ""  # where the initial values came from, in words; empty for random ones

    @property
    def objective(self) -> Any:
        """The student's objective, whose centres the run keeps."""
        return self.engines.student.module.objective


@dataclass(frozen=True)
class StepResult:
    applied: bool  # False: the loss or a gradient was not finite on some rank, and nothing moved
    logs: dict[str, Tensor]  # scalars on the device, means over this rank's micro-batches; not yet over ranks
    grad_squares: Tensor  # [trainable parameters] squared norms, before the clip
    features: Tensor  # [n, C] the student's view features of the last micro-batch


def open_session(config: Config, world: World, schedules: Schedules, fresh: bool = True) -> Session:
    """Builds and initialises student and teacher (parallel/engine.py says in which order and why).

    Args:
        fresh: the values count; False: a checkpoint will replace them, so `model.init_from` is not read.

    Raises:
        UserError: trunk, objective, crops and batch do not fit each other, or `model.init_from` does not fit them.
    """
    origin = load_initial_weights(config) if fresh else NO_INITIAL_WEIGHTS
    engines = engine_module.build(config, world, origin.values)
    clock = StepClock(world.device, (engines.student.module, engines.teacher.network), engines.zero_stage)
    session = Session(config, world, engines, schedules, clock, origin.note)
    session.objective.load_extra_state(origin.centers)
    return session


def train_step(session: Session, batch: Batch, step: int, watch: bool = False) -> StepResult:
    """Train on this rank's part of the global batch of `step` (0 is the first).

    Args:
        watch: also measure the updates, and how long this rank computes before it meets the others.
    """
    if watch:
        session.clock.begin()
    return optimizer_step(session, _micro_batches(session, batch), step, watch)


def optimizer_step(session: Session, micro_batches: "list[MicroBatch]", step: int, watch: bool = False) -> StepResult:
    """One update from augmented crops: what `train_step` does once the pixels are ready."""
    engines, schedules = session.engines, session.schedules
    engine_module.set_lr_and_weight_decay(engines, schedules.lr(step), schedules.weight_decay(step))
    engines.clipper.freeze, engines.clipper.watch = schedules.last_layer_frozen(step), watch
    sums: dict[str, Tensor] = {}
    for micro in micro_batches:
        logs, features = _forward_backward(session, micro, step)
        for name, value in logs.items():
            sums[name] = sums[name] + value if name in sums else value
        engines.clipper.loss = sums["loss"]
        applied = engine_module.take_step(engines)
    if applied:
        engines.teacher.update(schedules.ema_momentum(step))
        if not session.objective.has_teacher:
            engines.teacher.sync_buffers()
        session.objective.commit()
    else:
        session.objective.discard()
    logs = {name: value / session.config.train.grad_accum for name, value in sums.items()}
    return StepResult(applied, logs, engines.clipper.take_squares(), features)


def _forward_backward(session: Session, micro: "MicroBatch", step: int) -> tuple[dict[str, Tensor], Tensor]:
    engines = session.engines
    targets = None
    if session.objective.has_teacher:
        with torch.no_grad(), engine_module.autocast(session.config, session.world.device):
            targets = engines.teacher.network(micro.crops[:1])
    keys = drop_keys(session.config.seed, step, micro.positions, len(session.config.crop_sizes))
    loss, logs, features = engines.student(micro.crops, targets, keys, session.schedules.teacher_temp(step))
    session.clock.end()
    engines.student.backward(loss)
    return {"loss": loss.detach(), **logs}, features


@dataclass(frozen=True)
class MicroBatch:
    crops: list[Tensor]  # one [V_g·B, channels, S_g, S_g] per resolution group, augmented and normalised
    positions: Tensor  # int64 [B] in the global batch


def _micro_batches(session: Session, batch: Batch) -> list[MicroBatch]:
    """The rank's images in canonical order, cut into grad_accum equal parts."""
    device, dtype = session.world.device, session.engines.dtype
    crops, first = [], 0
    for group in batch.crops:  # uint8 or uint16 [V_g, B, C, S, S]
        views, images = group.shape[:2]
        parameters = batch.photometric.crops(first, first + views)
        pixels = group.to(device, non_blocking=True).flatten(0, 1)
        crops.append(
            photometric.apply(pixels, parameters, pixel_format(session.config.data))
            .to(dtype)
            .unflatten(0, (views, images))
        )
        first += views
    parts = [group.chunk(session.config.train.grad_accum, dim=1) for group in crops]
    positions = batch.positions.to(device).chunk(session.config.train.grad_accum)
    return [
        MicroBatch([group.flatten(0, 1) for group in groups], position)
        for groups, position in zip(zip(*parts, strict=True), positions, strict=True)
    ]
