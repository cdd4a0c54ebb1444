"""Frozen features: evaluated, or given out as arrays."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands import look
from esvit_scale.commands.parser import add_checkpoint, add_loading, command, count, group, on_all_ranks, positive


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

    linear = command(evaluate, "linear", _linear, "accuracy of linear classifiers, by three protocols")
    add_checkpoint(linear)
    _add_sets(linear)
    linear.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for linear.json")
    protocols = ("official", "grid", "logistic")
    linear.add_argument("--protocol", nargs="+", choices=protocols, default=protocols, help="default: all three")
    linear.add_argument("--epochs", type=positive, default=100, metavar="E", help="of SGD (default: 100)")
    linear.add_argument("--sgd-batch", type=positive, default=256, metavar="N", help="of SGD (default: 256)")
    images = "official and grid: train over random crops of the images, not over kept features (a forward an image and epoch)"
    linear.add_argument("--augment", action="store_true", help=images)
    share = "learn from this share of every class: 0.01 or 0.1 for the semi-supervised protocols (default: 1)"
    linear.add_argument("--fraction", type=float, default=1.0, metavar="F", help=share)
    linear.add_argument("--seed", type=count, default=0, metavar="S", help="of splits, order and heads (default: 0)")
    _add_features(linear)

    transfer = command(evaluate, "transfer", _transfer, "a linear classifier on each of many data sets")
    transfer.add_argument(
        "list", type=Path, metavar="LIST.yaml", help="data sets with their metrics; `elevater`: the shipped list of 20"
    )
    add_checkpoint(transfer)
    transfer.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for transfer.json")
    transfer.add_argument("--root", type=Path, metavar="DIR", help="where the list's relative paths start")
    transfer.add_argument(
        "--baseline", type=Path, metavar="F.json", help="transfer.json of another checkpoint, to compare with"
    )
    _add_features(transfer)

    look.add_to(evaluate)

    embed = command(commands, "embed", _embed, "features of images, as arrays")
    add_checkpoint(embed)
    embed.add_argument("--data", type=Path, required=True, metavar="D", help="shards, or a folder of images")
    embed.add_argument(
        "--out", type=Path, required=True, metavar="F.npz", help="file of arrays: features, keys, labels, classes"
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
    from esvit_scale.evaluate.features import ExtractionOptions

    return ExtractionOptions(o.batch, o.workers, None, o.precision, o.stored, o.cache or folder / "features")


def _knn(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import knn

    ks, loading = o.k or knn.KS, _loading(o, o.out)
    on_all_ranks(lambda: knn.run_knn(o.checkpoint, o.train, o.test, o.out, loading, ks, o.shots, o.tries))
    return 0


def _linear(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import linear

    recipe = linear.ProbeSettings(o.protocol, o.epochs, o.sgd_batch, o.augment, o.fraction, o.seed)
    on_all_ranks(lambda: linear.run_linear(o.checkpoint, o.train, o.test, o.out, recipe, _loading(o, o.out)))
    return 0


def _transfer(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import transfer

    on_all_ranks(lambda: transfer.run_transfer(o.list, o.checkpoint, o.out, _loading(o, o.out), o.root, o.baseline))
    return 0


def _embed(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import features

    on_all_ranks(lambda: features.run_embed(o.checkpoint, o.data, o.out, _loading(o, o.out.parent)))
    return 0
