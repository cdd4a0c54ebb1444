"""`esvit-scale pretrain`: start the process group, open the run dir and the data, and hand them to the trainer."""

import logging
from dataclasses import replace
from pathlib import Path

from esvit_scale.checkpoint import frozen_teacher, mirror, mirror_sender, state_file, step_folders
from esvit_scale.config import Config, require_training_data
from esvit_scale.data import identity as identities
from esvit_scale.data import labels, stream
from esvit_scale.data.identity import Identity
from esvit_scale.data.limits import translate_limits
from esvit_scale.data.loader import translate_worker_errors
from esvit_scale.data.remote import working_set
from esvit_scale.errors import translate_file_errors
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import collectives
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel.world import World
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
    """Start or resume the run of a config in the process group of `world`; return 0, or 130 after ctrl-C."""
    given = config
    config = collectives.run_on_rank0_and_broadcast(lambda: frozen_teacher.described_in(given))
    # Before a run dir records a config that cannot be run.
    collectives.run_on_rank0_and_broadcast(lambda: stream.check_pixels(config))
    collectives.run_on_rank0_and_broadcast(lambda: tracking.require(config))
    collectives.run_on_rank0_and_broadcast(lambda: implementations.check(config, world))
    if world.rank > 0:
        watchdog.grant(RESTORE_S)
    collectives.run_on_rank0_and_broadcast(lambda: mirror.restore(config, watchdog.grant))
    watchdog.progress()
    path, finished = collectives.run_on_rank0_and_broadcast(lambda: run_dir.open_run(config))
    if finished:
        if world.rank == 0:
            _warn_finished(config, path)
        return 0
    data = collectives.run_on_rank0_and_broadcast(lambda: stream.open_data(config))
    collectives.run_on_rank0_and_broadcast(lambda: labels.check(config, data))
    held = collectives.run_on_rank0_and_broadcast(lambda: working_set.held_out_bytes(config, world.size))
    needs = collectives.gather_objects(working_set.of_own_node(config, data, world.rank, world.size, held))
    room = collectives.run_on_rank0_and_broadcast(lambda: working_set.check(config, data, world.size, needs))
    watchdog.progress()
    if config.data.stage:
        data = stage.on_every_node(data, config.data.stage, watchdog)
    with Lock(path) as lock:
        metrics.start_logging(path, active=world.rank == 0)
        if world.rank == 0:
            header.record(config)
            for line in room:
                log.info(line)
        mirrored = collectives.run_on_rank0_and_broadcast(lambda: mirror.claim(config))
        schedules = Schedules(config, stream.steps_per_epoch(config, data))
        collectives.run_on_rank0_and_broadcast(lambda: step_folders.remove_unfinished(path))
        if world.rank == 0 and step_folders.has_checkpoints(path):
            log.info("comparing the newest checkpoint with its checksums …")
        checkpoint = step_folders.newest_valid(path)
        signals.set_kept(checkpoint)
        identity = collectives.run_on_rank0_and_broadcast(lambda: _checked_identity(config, data, checkpoint))
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
            lambda: implementations.choose_for_run(config, world, path, resumed=checkpoint is not None)
        )
        watchdog.progress()
        trainer = Trainer(config, world, schedules, checkpoint is None, chosen)
        watchdog.progress()
        with mirror_sender.sending(config, world.rank == 0, mirrored) as sender:

            def on_saved(folder: Path) -> None:
                signals.set_kept(folder)
                if sender:
                    sender.send(folder)

            run = RunResources(path, lock, watchdog, data, identity, checkpoint, knn, accuracy, on_saved)
            code = trainer.train(replace(run, mirrored_step=sender.mirrored_step) if sender else run)
            if sender and not trainer.stop_requested():
                sender.close(60 * config.train.hang_minutes / 2)  # half of what the others' watchdogs allow
            return code


def _warn_finished(config: Config, path: Path) -> None:
    """Log that a finished run has nothing to do, and whether its k-NN accuracies are of other images than the config's."""
    log.warning("%s: this run is finished; nothing to do", path)
    if other := held_out.other_images(config, path):
        log.warning("%s: %s", path, other)


def _checked_identity(config: Config, data: stream.TrainingData, checkpoint: Path | None) -> Identity:
    """Return the identity of the data. Raise UserError when the checkpoint was trained on other data."""
    now = identities.identity(data)
    if checkpoint is None:
        return now
    recorded = state_file.read_state(checkpoint).get("data")
    if recorded is None:
        log.info(
            "%s does not record which data it was trained on (an older version wrote it); later ones do", checkpoint
        )
    identities.check_same(checkpoint, recorded, now, config.data.train or "data.mix")
    identities.check_unchanged(data, checkpoint, (checkpoint / state_file.STATE).stat().st_mtime_ns)
    return now
