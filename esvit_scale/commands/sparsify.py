"""The command `sparsify`, which trains a pretrained trunk to compute fewer tokens."""

import argparse
from typing import Any

from esvit_scale.commands import option_types
from esvit_scale.commands.parser import add_overrides, command
from esvit_scale.commands.pretrain import add_crops_option, run_config


def add(commands: Any) -> None:
    """Declare `sparsify`."""
    sparsify = command(
        commands,
        "sparsify",
        _sparsify,
        "train a pretrained trunk to prune tokens, against its dense self, as pretrain does a run",
    )
    sparsify.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="dense weights: a run dir, step folder, exported folder or file of weights",
    )
    sparsify.add_argument(
        "--keep",
        type=option_types.fraction,
        metavar="X",
        help="fraction of its tokens that the first pruning stage keeps (default: that of the config, 0.7 in the presets)",
    )
    sparsify.add_argument(
        "--config",
        default="sparsify",
        metavar="CONFIG",
        help="name of a preset, or a YAML file (default: sparsify, for plain vision transformers; sparsify_swin for Swin)",
    )
    sparsify.add_argument("--labels", action="store_true", help="also learn the labels of the training set")
    add_overrides(sparsify, "config values to change, for example data.train=/data/shards name=sparse")
    add_crops_option(sparsify)


def _sparsify(options: argparse.Namespace) -> int:
    from esvit_scale.train import signals

    signals.install()
    from esvit_scale.train import sparsifying

    config = sparsifying.resolve(options.checkpoint, options.config, options.overrides, options.keep, options.labels)
    keep = [] if options.keep is None else ["--keep", str(options.keep)]
    return run_config(options, " ".join([options.checkpoint, *keep, options.config, *options.overrides]), config)
