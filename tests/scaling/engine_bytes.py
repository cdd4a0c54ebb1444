"""Run on every rank: bytes that the real engines hold on each rank, after one step; writes OUT.RANK as JSON."""

import json
import sys
from pathlib import Path

import torch

from esvit_scale import config as configs
from esvit_scale.data.stream import MicroBatch
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel.zero import local_tensors
from esvit_scale.train.trainer import Trainer


def storages(tensors, counted):
    """Bytes of the storages that are not among those counted before; adds them there."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    new = found.keys() - counted
    counted.update(new)
    return sum(found[pointer] for pointer in new)


def held(engines):
    counted = set()
    moments = [value for state in engines.optimizer.state.values() for key, value in state.items() if key != "step"]
    parts = {
        "parameters": local_tensors(engines.student.module.parameters()),
        "masters": [p.flat for p in engines.partitions],  # at stage 0, the parameters themselves
        "moments": moments,
        "ema": engines.teacher.values,
        "teacher": local_tensors(engines.teacher.module.parameters()),  # at stage 0, the EMA itself
    }
    if engines.gram is not None:
        parts["gram"] = [*engines.gram.values, *local_tensors(engines.gram.module.parameters())]
    if engines.frozen is not None:
        parts["frozen"] = local_tensors(engines.frozen.module.parameters())
    return {name: storages(tensors, counted) for name, tensors in parts.items()}


def main(out, *files):
    world, found = worlds.start(), {}
    for file in files:
        config = configs.resolve(file)
        trainer = Trainer(config, world, Schedules(config, 5))
        images = config.train.global_batch // world.size
        sizes = config.crop_sizes
        crops = [torch.randn(images * sizes.count(s), 3, s, s).to(trainer.engines.dtype) for s in dict.fromkeys(sizes)]
        trainer.train_step([MicroBatch(crops, torch.arange(images) + world.rank * images)])
        found[Path(file).stem] = held(trainer.engines)
    Path(f"{out}.{world.rank}").write_text(json.dumps(found))
    worlds.stop()


main(*sys.argv[1:])
