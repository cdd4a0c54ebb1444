"""Run on every rank: trains a list of configs one after the other in one process group (starting a group and importing
DeepSpeed costs seconds, a tiny run does not)."""

import sys
from pathlib import Path

from esvit_scale import config as configs
from esvit_scale.models import recomputation
from esvit_scale.parallel import world as worlds
from esvit_scale.train import pretraining
from esvit_scale.train.watchdog import Watchdog

HANG_S = 1800.0
recomputation.MIN_INNER_DIMENSION = 32  # so the tiny trunk keeps the products of its last two stages


def main(paths: list[str]) -> None:
    world = worlds.start()
    with Watchdog(world, HANG_S, Path(paths[0]).parent) as watchdog:
        for path in paths:
            code = pretraining.open_and_train(configs.load(Path(path)), world, watchdog)
            assert code == 0, f"{path}: exit code {code}"
        worlds.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
