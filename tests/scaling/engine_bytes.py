"""Run under torchrun: bytes that the real engines hold on each rank, after one step; writes OUT.RANK as JSON."""

import json
import sys
from pathlib import Path

import torch

from esvit_scale import config as configs
from esvit_scale.data.stream import MicroBatch
from esvit_scale.objective.schedules import Schedules
from esvit_scale.parallel import world as worlds
from esvit_scale.train.trainer import Trainer


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(engines):
    student, optimizer, stage = engines.student, engines.student.optimizer, engines.zero_stage
    moments = [state[key] for state in engines.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    own = {"moments": storages(moments), "ema": storages(engines.teacher.values)}
    if stage == 0:
        return own | {"parameters": storages(student.module.parameters()), "masters": 0, "teacher": 0}
    own["masters"] = storages(p.flat for p in engines.partitions)
    if stage == 3:
        parts = lambda module: storages(p.ds_tensor for p in module.parameters())  # noqa: E731
        return own | {"parameters": parts(student.module), "teacher": parts(engines.teacher.network.module)}
    return own | {
        "parameters": storages(optimizer.bit16_groups_flat),
        "teacher": storages(engines.teacher.network.parameters()),
    }


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
