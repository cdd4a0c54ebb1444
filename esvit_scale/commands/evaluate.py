"""Frozen features: evaluated, or given out as arrays."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands import look
from esvit_scale.commands.parser import add_checkpoint, add_loading, command, group, on_all_ranks


def add(commands: Any) -> None:
    evaluate = group(commands, "evaluate", "evaluate frozen features")
    knn = command(evaluate, "knn", _evaluate_knn, "k-nearest-neighbour accuracy")
    add_checkpoint(knn)
    knn.add_argument("--train", type=Path, required=True, metavar="T", help="labelled shards or class folders to vote")
    knn.add_argument(
        "--test", type=Path, required=True, metavar="V", help="labelled shards or class folders to classify"
    )
    knn.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for knn.json")
    add_loading(knn)

    look.add_to(evaluate)

    embed = command(commands, "embed", _embed, "features of images, as arrays")
    add_checkpoint(embed)
    embed.add_argument("--data", type=Path, required=True, metavar="D", help="shards, or a folder of images")
    embed.add_argument(
        "--out", type=Path, required=True, metavar="F.npz", help="file of arrays: features, keys, labels"
    )
    add_loading(embed)


def _evaluate_knn(options: argparse.Namespace) -> int:
    from esvit_scale.evaluate import knn

    o = options
    on_all_ranks(lambda: knn.run_knn(o.checkpoint, o.train, o.test, o.out, batch=o.batch, workers=o.workers))
    return 0


def _embed(options: argparse.Namespace) -> int:
    from esvit_scale.evaluate import features

    o = options
    on_all_ranks(lambda: features.run_embed(o.checkpoint, o.data, o.out, batch=o.batch, workers=o.workers))
    return 0
