"""Frozen features: evaluated, or given out as arrays."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import add_checkpoint, add_loading, command, group, on_all_ranks, positive


def add(commands: Any) -> None:
    evaluate = group(commands, "evaluate", "evaluate frozen features")
    knn = command(evaluate, "knn", _knn, "k-nearest-neighbour accuracy")
    add_checkpoint(knn)
    _add_sets(knn)
    knn.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for knn.json")
    knn.add_argument("--k", type=positive, nargs="+", metavar="K", help="neighbours that vote (default: 10 20 100 200)")
    shots = "also with N training samples of each class, for each N"
    knn.add_argument("--shots", type=positive, nargs="+", default=[], metavar="N", help=shots)
    knn.add_argument("--tries", type=positive, default=5, metavar="T", help="draws of those samples (default: 5)")
    _add_features(knn)

    embed = command(commands, "embed", _embed, "features of images, as arrays")
    add_checkpoint(embed)
    embed.add_argument("--data", type=Path, required=True, metavar="D", help="shards, or a folder of images")
    embed.add_argument(
        "--out", type=Path, required=True, metavar="F.npz", help="file of arrays: features, keys, labels"
    )
    _add_features(embed)


def _add_sets(parser: argparse.ArgumentParser) -> None:
    for name, metavar, use in (("--train", "T", "learn from"), ("--test", "V", "classify")):
        parser.add_argument(
            name, type=Path, required=True, metavar=metavar, help=f"labelled shards or class folders to {use}"
        )


def _add_features(parser: argparse.ArgumentParser) -> None:
    add_loading(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the trunk (default: fp32)")
    parser.add_argument(
        "--stored", choices=("fp32", "fp16"), default="fp32", help="of the features on disk (default: fp32)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder that keeps features for the next evaluation (default: features/ beside the output)",
    )


def _loading(o: argparse.Namespace, folder: Path) -> Any:
    """The options of `_add_features`; features are kept in `folder`/features unless the user says where."""
    from esvit_scale.evaluate.features import Loading

    return Loading(o.batch, o.workers, None, o.precision, o.stored, o.cache or folder / "features")


def _knn(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import knn

    ks, loading = o.k or knn.KS, _loading(o, o.out)
    on_all_ranks(lambda: knn.run_knn(o.checkpoint, o.train, o.test, o.out, ks, o.shots, o.tries, loading))
    return 0


def _embed(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import features

    on_all_ranks(lambda: features.run_embed(o.checkpoint, o.data, o.out, _loading(o, o.out.parent)))
    return 0
