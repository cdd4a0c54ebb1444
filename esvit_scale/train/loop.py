"""The training loop: for every batch a step, a record, a save when due, and a way out when asked."""

import logging

from esvit_scale.checkpoint import state
from esvit_scale.config import Config, require_training_data
from esvit_scale.data import stream
from esvit_scale.data.loader import explained_deaths
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import collectives
from esvit_scale.parallel import world as world_module
from esvit_scale.parallel.world import World
from esvit_scale.train import run_dir, stage
from esvit_scale.train.online_knn import OnlineKnn
from esvit_scale.train.run import Run
from esvit_scale.train.step import open_session, train_step

log = logging.getLogger("esvit_scale")


def pretrain(config: Config) -> int:
    """Runs or resumes the run of a config, on this rank among all; returns the exit code (0, or 130 after ctrl-C).

    Raises:
        UserError: data, batch, run dir or checkpoint do not fit; before any training.
        Diverged: gradients were not finite for many steps in a row.
    """
    require_training_data(config)
    world = world_module.start()
    try:
        with explained_deaths(), world_module.explained_losses():
            code = _open_and_train(config, world)
    except BaseException:
        world_module.abandon()
        raise
    world_module.stop()
    return code


def _open_and_train(config: Config, world: World) -> int:
    path, finished = collectives.on_rank_0(lambda: run_dir.open_run(config))
    if finished:
        if world.rank == 0:
            log.warning("%s: this run is finished; nothing to do", path)
        return 0
    data = collectives.on_rank_0(lambda: stream.open_data(config))
    if config.data.stage:
        data = stage.on_every_node(data, config.data.stage)
    with run_dir.Lock(path) as lock:
        schedules = Schedules(config, stream.steps_per_epoch(config, data))
        fresh = collectives.on_rank_0(lambda: state.latest(path) is None)
        knn = OnlineKnn(config, world) if config.train.knn_every else None
        session = open_session(config, world, schedules, fresh)
        with Run(path, session, lock, knn) as run:
            for batch in run.batches(data):
                result = train_step(session, batch, run.step, watch=run.row_is_due())
                run.record(batch, result)
                run.save_if_due()
                if run.asked():
                    return run.leave()
            run.finish()
    return 0
