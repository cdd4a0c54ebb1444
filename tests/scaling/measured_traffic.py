"""Run under torchrun: what ranks communicate in a training step of each config; writes OUT.RANK as JSON."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import noted_collectives  # type: ignore[import-not-found]

STEPS = 3  # ZeRO 3 learns its order of gathering in the first two


def main(out, *files):
    noted_collectives.wrap()
    from esvit_scale import config as configs
    from esvit_scale.data.stream import MicroBatch
    from esvit_scale.objective.schedules import Schedules
    from esvit_scale.parallel import world as worlds
    from esvit_scale.train.trainer import Trainer

    world, found = worlds.start(), {}
    for file in files:
        config = configs.resolve(file)
        trainer = Trainer(config, world, Schedules(config, 5))
        images = config.train.global_batch // world.size // config.train.grad_accum
        sizes, dtype = config.crop_sizes, trainer.engines.dtype
        batches = []
        for _ in range(config.train.grad_accum):
            crops = [torch.randn(images * sizes.count(s), 3, s, s).to(dtype) for s in dict.fromkeys(sizes)]
            batches.append(MicroBatch(crops, torch.arange(images) + world.rank * images))
        for _ in range(STEPS):
            noted_collectives.noted.clear()
            trainer.train_step(batches)
        found[Path(file).stem] = list(noted_collectives.noted)
    Path(f"{out}.{world.rank}").write_text(json.dumps(found))
    worlds.stop()


main(*sys.argv[1:])
