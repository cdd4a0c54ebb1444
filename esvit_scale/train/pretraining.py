"""`esvit-scale pretrain`: start the process group, open the run dir and the data, and hand them to the trainer."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from esvit_scale.checkpoint import carried, frozen_teacher, mirror, mirror_sender, state_file, step_folders
from esvit_scale.config import Config, require_training_data
from esvit_scale.data import identity as identities
from esvit_scale.data import labels, stream
from esvit_scale.data.identity import Identity
from esvit_scale.data.limits import translate_limits
from esvit_scale.data.loader import translate_worker_errors
from esvit_scale.data.remote import working_set
from esvit_scale.errors import translate_file_errors
from esvit_scale.objective.schedules import Schedules
from esvit_scale.objective.schedules import of_stages as schedules_of_stages
from esvit_scale.parallel import collectives
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel.world import World, free_networks
from esvit_scale.train import header, held_out, implementations, metrics, run_dir, signals, stage, tracking
from esvit_scale.train.lock import Lock
from esvit_scale.train.online_accuracy import OnlineAccuracy
from esvit_scale.train.online_knn import OnlineKnn
from esvit_scale.train.run_resources import RunResources
from esvit_scale.train.trainer import Trainer
from esvit_scale.train.watchdog import Watchdog

log = logging.getLogger("esvit_scale")

RESTORE_S = 24 * 3600.0  # seconds that other ranks may wait for rank 0, whose own watchdog bounds every transfer


def pretrain(config: Config) -> int:
    """Start or resume the run of a config, as one of its ranks, and return the exit code: 0, or 130 after ctrl-C.

    Raises:
        UserError: data, batch, run dir or checkpoint do not fit (before any training), or too much of the data is bad.
        RestartCanHelp: a disk is full or does not answer, a rank is lost, or another process took the run over.
        Diverged: loss or gradients were not finite for many steps in a row, or `train.guard` ended the run.
    """
    require_training_data(config)
    signals.begin_work()
    world = worlds.start(config.train.hang_minutes)
    # The watchdog covers everything from the first file that is opened to the last barrier.
    with Watchdog(world, 60 * config.train.hang_minutes, config.run_path) as watchdog:
        try:
            with translate_limits(), translate_worker_errors(), worlds.translate_comm_errors(), translate_file_errors():
                code = open_and_train(config, world, watchdog)
            worlds.stop()
            signals.end_work()  # not after an error, which ends the process anyway
        except BaseException:
            worlds.abandon()
            raise
    return code


def open_and_train(config: Config, world: World, watchdog: Watchdog) -> int:
    """Start or resume the run of a config in the process group of `world`; return 0, or 130 after ctrl-C.

    A run without training stages is one of a single stage. Every checkpoint belongs to the stage that reached its step;
    the last one of a stage is where the next one begins.
    """
    given = config
    config = collectives.run_on_rank0_and_broadcast(lambda: frozen_teacher.described_in(given))
    stages = config.of_stages
    # Before a run dir records a config that cannot be run.
    for one in stages:
        collectives.run_on_rank0_and_broadcast(partial(stream.check_pixels, one))
        collectives.run_on_rank0_and_broadcast(partial(implementations.check, one, world))
    collectives.run_on_rank0_and_broadcast(lambda: carried.check(stages))
    collectives.run_on_rank0_and_broadcast(lambda: tracking.require(config))
    if world.rank > 0:
        watchdog.grant(RESTORE_S)
    collectives.run_on_rank0_and_broadcast(lambda: mirror.restore(config, watchdog.grant))
    watchdog.progress()
    path, finished = collectives.run_on_rank0_and_broadcast(lambda: run_dir.open_run(config))
    if finished:
        if world.rank == 0:
            _warn_finished(stages[-1], path)
        return 0
    datas = collectives.run_on_rank0_and_broadcast(lambda: _open_data(stages))
    room = [line for one, data in zip(stages, datas, strict=True) for line in _check_data(one, data, world)]
    watchdog.progress()
    with Lock(path) as lock:
        metrics.start_logging(path, active=world.rank == 0)
        if world.rank == 0:
            header.record(config)
            for line in dict.fromkeys(room):
                log.info(line)
        mirrored = collectives.run_on_rank0_and_broadcast(lambda: mirror.claim(config))
        per_epoch = [stream.steps_per_epoch(one, data) for one, data in zip(stages, datas, strict=True)]
        schedules = schedules_of_stages(stages, per_epoch)
        collectives.run_on_rank0_and_broadcast(lambda: step_folders.remove_unfinished(path))
        if world.rank == 0 and step_folders.has_checkpoints(path):
            log.info("comparing the newest checkpoint with its checksums …")
        checkpoint = step_folders.newest_valid(path)
        done = 0 if checkpoint is None else step_folders.step_of(checkpoint) or 0
        first = min(sum(one.last_step <= done for one in schedules), len(stages) - 1)
        with mirror_sender.sending(config, world.rank == 0, mirrored) as sender:
            for number in range(first, len(stages)):
                start = _Start(config, path, lock, watchdog, sender, is_start=number == first)
                of_checkpoint = number - (done == schedules[number].first_step and number > 0)
                identity = collectives.run_on_rank0_and_broadcast(
                    partial(_checked_identity, stages, datas, number, of_checkpoint, checkpoint)
                )
                code, stopped = _train_stage(start, world, schedules[number], datas[number], identity, checkpoint)
                if code or stopped:
                    return code
                free_networks()
                checkpoint, done = step_folders.newest_valid(path), schedules[number].last_step
            if sender:
                sender.close(60 * config.train.hang_minutes / 2)  # half of what the others' watchdogs allow
    return 0


@dataclass(frozen=True)
class _Start:
    """What all stages of one start of a run share."""

    config: Config  # of the whole run
    path: Path
    lock: Lock
    watchdog: Watchdog
    sender: mirror_sender.Sender | None
    is_start: bool  # whether the stage is the first of this start


def _train_stage(
    start: _Start,
    world: World,
    schedules: Schedules,
    data: stream.TrainingData,
    identity: Identity,
    checkpoint: Path | None,
) -> tuple[int, bool]:
    """Train one training stage from a checkpoint; return the exit code, and whether a signal ended it early."""
    config, watchdog, sender = schedules.config, start.watchdog, start.sender
    if config.data.stage:
        data = stage.on_every_node(data, config.data.stage, watchdog)
    signals.set_kept(checkpoint)
    learns_labels = bool(config.objective.classes and config.data.held_out)
    if config.train.knn_every or learns_labels:
        collectives.run_on_rank0_and_broadcast(lambda: held_out.check(config, resumed=checkpoint is not None))
        watchdog.progress()
    if world.rank == 0:
        also = f"reading images of {config.data.held_out}, then " if config.train.knn_every else ""
        log.info("%sbuilding student and teacher …", also)
    knn = OnlineKnn(config, world) if config.train.knn_every else None
    accuracy = OnlineAccuracy(config, world, watchdog.progress) if learns_labels else None
    watchdog.progress()
    # Before the networks are built, because the timing needs memory.
    chosen = collectives.run_on_rank0_and_broadcast(
        lambda: implementations.choose_for_run(config, world, start.path, resumed=checkpoint is not None)
    )
    watchdog.progress()
    trainer = Trainer(config, world, schedules, checkpoint is None, chosen)
    watchdog.progress()

    def on_saved(folder: Path) -> None:
        signals.set_kept(folder)
        if sender:
            sender.send(folder)

    run = RunResources(
        *(start.path, start.config, start.is_start, start.lock, watchdog, data, identity, checkpoint, knn, accuracy),
        *(on_saved, sender.mirrored_step if sender else None),
    )
    return trainer.train(run), trainer.stop_requested()


def _open_data(stages: Sequence[Config]) -> list[stream.TrainingData]:
    """Return the data of every training stage, opened once where consecutive stages have the same."""
    found = list[stream.TrainingData]()
    for number, config in enumerate(stages):
        is_same = number > 0 and _source(config) == _source(stages[number - 1])
        found.append(found[-1] if is_same else stream.open_data(config))
    return found


def _source(config: Config) -> tuple[object, ...]:
    data = config.data
    return data.train, data.mix, data.epoch_samples, data.storage_options, data.cache_dir


def _check_data(config: Config, data: stream.TrainingData, world: World) -> list[str]:
    """Return lines about the room for a stage's data on the nodes. All ranks call it.

    Raises:
        UserError: the labels do not fit the config, or the data needs more room than there is.
    """
    collectives.run_on_rank0_and_broadcast(lambda: labels.check(config, data))
    held = collectives.run_on_rank0_and_broadcast(lambda: working_set.held_out_bytes(config, world.size))
    needs = collectives.gather_objects(working_set.of_own_node(config, data, world.rank, world.size, held))
    room: list[str] = collectives.run_on_rank0_and_broadcast(lambda: working_set.check(config, data, world.size, needs))
    return room


def _warn_finished(config: Config, path: Path) -> None:
    """Log that a finished run has nothing to do, and whether its k-NN accuracies are of other images than the config's."""
    log.warning("%s: this run is finished; nothing to do", path)
    if other := held_out.other_images(config, path):
        log.warning("%s: %s", path, other)


def _checked_identity(
    stages: Sequence[Config],
    datas: Sequence[stream.TrainingData],
    number: int,
    of_checkpoint: int,
    checkpoint: Path | None,
) -> Identity:
    """Return the identity of the data of a stage.

    Args:
        of_checkpoint: the stage that the checkpoint is of.

    Raises:
        UserError: the checkpoint was trained on other data than that of its stage.
    """
    wanted = identities.identity(datas[number])
    if checkpoint is None:
        return wanted
    config, data = stages[of_checkpoint], datas[of_checkpoint]
    now = wanted if data is datas[number] else identities.identity(data)
    recorded = state_file.read_state(checkpoint).get("data")
    if recorded is None:
        log.info(
            "%s does not record which data it was trained on (an older version wrote it); later ones do", checkpoint
        )
    identities.check_same(checkpoint, recorded, now, config.data.train or "data.mix")
    identities.check_unchanged(data, checkpoint, (checkpoint / state_file.STATE).stat().st_mtime_ns)
    return wanted
