"""The commands `demo` (pretraining on bundled images) and `pretrain` (on the user's)."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import add_overrides, command


def add(commands: Any) -> None:
    """Declare `demo` and `pretrain`."""
    demo = command(
        commands, "demo", _demo, "run everything on bundled photographs: shards, a tiny pretraining, k-NN, report"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run dir (default: runs/demo)")

    pretrain = command(
        commands, "pretrain", _pretrain, "start or continue a run, in one process or under torchrun or srun"
    )
    pretrain.add_argument("config", metavar="CONFIG", help="name of a preset, or a YAML file")
    add_overrides(pretrain, "config values to change, for example train.global_batch=64 data.train=/data/shards")


def _demo(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()
    from esvit_scale import demo

    return demo.run(options.out)


def _pretrain(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()  # first: importing the rest takes seconds, and a signal in them must not be lost
    from esvit_scale import config as configs

    config = configs.resolve(options.config, options.overrides)
    configs.require_training_data(config)
    from esvit_scale.train import pretraining

    return pretraining.pretrain(config)
