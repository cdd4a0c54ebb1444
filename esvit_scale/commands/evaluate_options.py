"""Options that several `evaluate` commands share, and `embed`."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.option_types import set_or_folder
from esvit_scale.commands.parser import add_loading, positive


def add_sets(parser: argparse.ArgumentParser) -> None:
    """Declare the labelled sets of an evaluation, --train and --test."""
    for name, metavar, use in (("--train", "T", "learn from"), ("--test", "V", "classify")):
        parser.add_argument(
            name,
            type=set_or_folder,
            required=True,
            metavar=metavar,
            help=f"labelled shards (folder or URL), or a folder with one subfolder for each class, to {use}",
        )


def add_windows(parser: argparse.ArgumentParser) -> None:
    """Declare --size, --crop and --stride: the windows that cover an image in dense evaluations."""
    size = "pixels to resize an image's short side to (default: the size of the run's global crops)"
    parser.add_argument("--size", type=positive, metavar="N", help=size)
    crop = "side in pixels of the windows that cover an image (default: --size)"
    parser.add_argument("--crop", type=positive, metavar="N", help=crop)
    stride = "pixels between windows (default: two thirds of --crop)"
    parser.add_argument("--stride", type=positive, metavar="N", help=stride)


def add_whole(parser: argparse.ArgumentParser) -> None:
    """Declare --whole."""
    whole = (
        "resize the whole image to the crop's square, for small pictures that fill their frame; others are distorted "
        "(default: resize the short side to 256/224 of the crop and cut out the centre)"
    )
    parser.add_argument("--whole", action="store_true", help=whole)


def add_stage(parser: argparse.ArgumentParser) -> None:
    """Declare --stage, for features of images."""
    stage = (
        "take all cells of the map of this stage, from 1, instead of their mean over the last stage, for pictures whose "
        "parts keep their place (default: the mean)"
    )
    parser.add_argument("--stage", type=positive, metavar="N", help=stage)


def add_features(parser: argparse.ArgumentParser, cache: str = "features/ beside the output") -> None:
    """Declare the options of feature extraction; `cache` says in the help where features are kept without --cache."""
    add_loading(parser)
    add_precision(parser)
    parser.add_argument(
        "--stored", choices=("fp32", "fp16"), default="fp32", help="number format of stored features (default: fp32)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help=f"folder that keeps features for the next evaluation (default: {cache})",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Declare --precision."""
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="precision that the trunk runs in (default: fp32)"
    )


def extraction_options(o: argparse.Namespace, folder: Path | None) -> Any:
    """Return the values of the options that `add_features` adds.

    Without --cache, features are kept in `folder`/features, or nowhere if `folder` is None.
    """
    from esvit_scale.evaluate.features import ExtractionOptions

    cache = o.cache or (folder / "features" if folder else None)
    whole, stage = getattr(o, "whole", False), getattr(o, "stage", None)  # not every evaluation has these two
    return ExtractionOptions(o.batch, o.workers, None, o.precision, o.stored, cache, whole, stage)
