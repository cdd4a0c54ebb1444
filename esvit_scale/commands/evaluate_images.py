"""The `evaluate` commands with a score for images as wholes: classes, neighbours, copies."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.evaluate_options import add_features, add_sets, add_stage, add_whole, extraction_options
from esvit_scale.commands.option_types import set_or_folder
from esvit_scale.commands.parser import add_checkpoint, command, count, on_all_ranks, positive, rank
from esvit_scale.errors import UserError


def add(evaluate: Any) -> None:
    """Declare `evaluate knn`, `linear`, `transfer`, `retrieval` and `copies`."""
    _add_knn(evaluate)
    _add_linear(evaluate)
    _add_transfer(evaluate)
    _add_retrieval(evaluate)
    _add_copies(evaluate)


def _add_knn(evaluate: Any) -> None:
    knn = command(evaluate, "knn", _knn, "k-nearest-neighbour accuracy")
    add_checkpoint(knn)
    add_sets(knn)
    knn.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write knn.json to")
    ks = "numbers of neighbours that vote (default: 10 20 100 200)"
    knn.add_argument("--k", type=positive, nargs="+", metavar="K", help=ks)
    shots = (
        "for each N, also report the accuracy with only N training samples of each class (default: all samples only)"
    )
    knn.add_argument("--shots", type=positive, nargs="+", default=[], metavar="N", help=shots)
    tries = "random draws of the --shots samples to average over (default: 5)"
    knn.add_argument("--tries", type=positive, default=5, metavar="T", help=tries)
    add_whole(knn)
    add_stage(knn)
    add_features(knn)


def _add_linear(evaluate: Any) -> None:
    linear = command(evaluate, "linear", _linear, "accuracy of linear classifiers, by three protocols")
    add_checkpoint(linear)
    add_sets(linear)
    linear.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write linear.json to")
    protocols = ("official", "grid", "logistic")
    linear.add_argument(
        "--protocol", nargs="+", choices=protocols, default=protocols, help="protocols to run (default: all three)"
    )
    linear.add_argument(
        "--epochs", type=positive, default=100, metavar="E", help="epochs of SGD, for official and grid (default: 100)"
    )
    linear.add_argument(
        "--sgd-batch", type=positive, default=256, metavar="N", help="samples in a batch of SGD (default: 256)"
    )
    augment = (
        "official and grid: train on random crops of the images instead of on stored features; runs the trunk on every "
        "image in every epoch"
    )
    linear.add_argument("--augment", action="store_true", help=augment)
    fraction = (
        "fraction of each class's training samples to learn from, in (0, 1]; 0.01 and 0.1 are the semi-supervised "
        "protocols (default: 1)"
    )
    linear.add_argument("--fraction", type=float, default=1.0, metavar="F", help=fraction)
    seed = "random seed of the held-out split, the order of samples and the initial weights (default: 0)"
    linear.add_argument("--seed", type=count, default=0, metavar="S", help=seed)
    add_whole(linear)
    add_features(linear)


def _add_transfer(evaluate: Any) -> None:
    transfer = command(evaluate, "transfer", _transfer, "a linear classifier on each of many data sets")
    transfer.add_argument(
        "list",
        type=Path,
        metavar="LIST.yaml",
        help="YAML list of data sets with their metrics, or `elevater`, the shipped list of 20",
    )
    add_checkpoint(transfer)
    transfer.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write transfer.json to")
    transfer.add_argument(
        "--root", type=Path, metavar="DIR", help="folder that the list's relative paths start at (default: the list's)"
    )
    transfer.add_argument(
        "--baseline",
        type=Path,
        metavar="F.json",
        help="transfer.json of another checkpoint to compare with (default: none)",
    )
    backbone = (
        "other weights to evaluate in the same way and compare with: timm:NAME@FILE (a network of timm and its file), "
        "timm:NAME (from the Hugging Face cache), hf:FOLDER (of timm, or a CLIP of transformers), a .safetensors file or "
        "anything else that --checkpoint takes; nothing is downloaded (default: none)"
    )
    transfer.add_argument("--backbone", nargs="+", default=[], metavar="B", help=backbone)
    scores = "CSV file of published scores to show beside ours: model,dataset,setting,score,source (default: none)"
    transfer.add_argument("--published", type=Path, metavar="F.csv", help=scores)
    shots = "also learn from only N training images of each class, N at least 2, for each N (default: none)"
    transfer.add_argument("--shots", type=positive, nargs="+", default=[], metavar="N", help=shots)
    seeds = "random seeds that draw the --shots images and the held-out part, for a spread (default: 1)"
    transfer.add_argument("--seeds", type=positive, default=1, metavar="S", help=seeds)
    add_features(transfer)


def _add_retrieval(evaluate: Any) -> None:
    retrieval = command(evaluate, "retrieval", _retrieval, "how well similar features find images of the same class")
    add_checkpoint(retrieval)
    retrieval.add_argument(
        "--data",
        type=set_or_folder,
        required=True,
        metavar="D",
        help="images to search: labelled shards (folder or URL), a folder with one subfolder for each class, or a folder of the "
        "revisited Oxford or Paris set (jpg/ and gnd_*.json)",
    )
    retrieval.add_argument(
        "--queries",
        type=set_or_folder,
        metavar="Q",
        help="labelled set whose images are the queries (default: every image of --data queries all others)",
    )
    retrieval.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write retrieval.json and a picture to"
    )
    ks = "numbers of nearest images for R@k of labelled sets (default: 1 2 4 8)"
    retrieval.add_argument("--k", type=positive, nargs="+", metavar="K", help=ks)
    size = "revisited sets: pixels to which a longer side above it is reduced (default: the size of the run's crops)"
    retrieval.add_argument("--size", type=positive, metavar="N", help=size)
    add_features(retrieval)


def _add_copies(evaluate: Any) -> None:
    copies = command(evaluate, "copies", _copies, "copy detection: finding the originals of distorted images, µAP")
    add_checkpoint(copies)
    copies.add_argument(
        "--data",
        type=set_or_folder,
        required=True,
        metavar="D",
        help="images to search and to distort: shards (folder or URL), a folder of images, or a folder of Copydays "
        "(original/ beside strong/, jpegqual/N/ or crops/N/)",
    )
    copies.add_argument(
        "--distractors", type=set_or_folder, metavar="D", help="set of further images to search (default: none)"
    )
    copies.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write copies.json and a picture to"
    )
    attacks = ("crop", "jpeg", "strong")
    copies.add_argument(
        "--attack", nargs="+", choices=attacks, help="distortions of generated copies (default: all three)"
    )
    queries = "largest number of images to distort, evenly spaced (default: 1000)"
    copies.add_argument("--queries", type=positive, default=1000, metavar="N", help=queries)
    size = "side in pixels of the square to which whole images are resized (default: the size of the run's crops)"
    copies.add_argument("--size", type=positive, metavar="N", help=size)
    seed = "random seed of distortions and bootstrap (default: 0)"
    copies.add_argument("--seed", type=count, default=0, metavar="S", help=seed)
    add_features(copies)


def _knn(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import knn

    ks, options = o.k or knn.KS, extraction_options(o, o.out)
    on_all_ranks(lambda: knn.run_knn(o.checkpoint, o.train, o.test, o.out, options, ks, o.shots, o.tries))
    return 0


def _linear(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import linear

    settings = linear.ProbeSettings(o.protocol, o.epochs, o.sgd_batch, o.augment, o.fraction, o.seed)
    options = extraction_options(o, o.out)
    on_all_ranks(lambda: linear.run_linear(o.checkpoint, o.train, o.test, o.out, settings, options))
    return 0


def _transfer(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import transfer

    if 1 in o.shots:
        raise UserError("--shots 1: one image of each class must be held out to select the penalty; nearest: --shots 2")
    protocol, options = transfer.Protocol(o.seeds, tuple(sorted(set(o.shots)))), extraction_options(o, o.out)
    others = {"backbones": o.backbone, "published_scores": o.published, "protocol": protocol}
    on_all_ranks(lambda: transfer.run_transfer(o.list, o.checkpoint, o.out, options, o.root, o.baseline, **others))
    return 0


def _retrieval(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import retrieval
    from esvit_scale.report import retrieval_figure

    ks, options = sorted(set(o.k or retrieval.KS)), extraction_options(o, o.out)

    def run() -> None:
        result = retrieval.run_retrieval(o.checkpoint, o.data, o.out, options, ks, o.queries, o.size)
        if rank() == "0":
            print(retrieval_figure.write(result, o.data, o.queries, o.out))

    on_all_ranks(run)
    return 0


def _copies(o: argparse.Namespace) -> int:
    from esvit_scale.evaluate import copies
    from esvit_scale.report import copies_figure

    settings = copies.CopySettings(o.attack, o.queries, o.size, o.seed)
    options = extraction_options(o, o.out)

    def run() -> None:
        result = copies.run_copies(o.checkpoint, o.data, o.out, settings, options, o.distractors)
        if rank() == "0":
            print(copies_figure.write(result, o.out))

    on_all_ranks(run)
    return 0
