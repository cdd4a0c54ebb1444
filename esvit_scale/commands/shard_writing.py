"""The `shards` commands that write shard sets: create, merge, split."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_scale import store_urls
from esvit_scale.commands import option_types, shard_options
from esvit_scale.commands.parser import command, positive
from esvit_scale.errors import UserError

if TYPE_CHECKING:
    from esvit_scale.data.manifest import Manifest
    from esvit_scale.data.shard_plan import Recipe
    from esvit_scale.data.sources import SourceOptions


STRICT = "exit with code 2 when anything in the source is left out that no option asks to leave out"


def add_create(shards: Any) -> None:
    """Declare `shards create`."""
    create = command(
        shards, "create", _create, "write images as tar shards with a manifest; an interrupted run continues"
    )
    shard_options.add_source(create)
    create.add_argument(
        "destination",
        type=option_types.destination,
        metavar="DST",
        help="folder or URL (s3://…) to write the shard set to",
    )
    size = create.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="images per tar (default: 1000)"
    )
    size.add_argument(
        "--bytes-per-shard",
        type=option_types.size,
        metavar="SIZE",
        help="bytes of image files per tar, e.g. 500M; replaces --samples-per-shard (default: not set)",
    )
    create.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of the order of images and of --val-fraction (default: 0)",
    )
    create.add_argument("--no-shuffle", action="store_true", help="keep the source's order (default: shuffle)")
    _add_selection(create)
    _add_encoding(create)
    _add_pixels(create)
    _add_rotation(create)
    create.add_argument(
        "--val-fraction",
        type=option_types.fraction,
        default=0.0,
        metavar="F",
        help="fraction of samples for DST/val, the rest goes to DST/train, by seed and key (default: one set in DST)",
    )
    create.add_argument("--strict", action="store_true", help=STRICT)
    shard_options.add_workers(create)
    create.add_argument(
        "--shard-range",
        type=option_types.part,
        metavar="I/N",
        help="write only part I of N (from 1); `shards merge` finishes the set (default: write all)",
    )
    shard_options.add_work_dir(create)


def _add_selection(create: argparse.ArgumentParser) -> None:
    create.add_argument(
        "--min-side",
        type=positive,
        default=0,
        metavar="PX",
        help="leave out images whose shorter side is below PX pixels (default: keep all of at least 4 pixels)",
    )
    create.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="leave out files with the same bytes as an earlier one (default: keep them)",
    )
    create.add_argument(
        "--keep",
        type=Path,
        metavar="LIST",
        help="write only the images on a keep-list from `shards duplicates` (default: all)",
    )


def _add_encoding(create: argparse.ArgumentParser) -> None:
    create.add_argument(
        "--short-side",
        type=positive,
        metavar="PX",
        help="shrink images whose shorter side is above PX pixels to PX (default: keep their bytes)",
    )
    create.add_argument(
        "--quality",
        type=option_types.quality,
        metavar="Q",
        help="re-encode images with this quality of JPEG or WebP, 1..100 (default: keep their bytes; 90 when re-encoded)",
    )
    create.add_argument(
        "--format",
        choices=("jpg", "jpeg", "png", "webp", "keep"),
        default="keep",
        help="re-encode every image in this format, so that the set has one type (default: keep the bytes)",
    )


def _add_pixels(create: argparse.ArgumentParser) -> None:
    pixels = create.add_argument_group("pixels (default: pictures of any kind, used as 8-bit RGB)")
    pixels.add_argument(
        "--channels",
        type=option_types.channels,
        default=3,
        metavar="C",
        help="channels of every image, 1..16 (default: 3)",
    )
    pixels.add_argument(
        "--bits",
        type=int,
        choices=(8, 16),
        default=8,
        help="bits per channel; 16 is for TIFF, .npy and 16-bit grey (default: 8)",
    )


def _add_rotation(create: argparse.ArgumentParser) -> None:
    create.add_argument(
        "--rotate-as-noted",
        action="store_true",
        help="with --from img2dataset: restore the EXIF orientation that images lost, from their json (default: leave them)",
    )


def add_merge(shards: Any) -> None:
    """Declare `shards merge`."""
    merge = command(shards, "merge", _merge, "finish a set whose parts were written with --shard-range")
    merge.add_argument(
        "destination", type=option_types.destination, metavar="DST", help="folder or URL that the parts were written to"
    )
    merge.add_argument("--strict", action="store_true", help=STRICT)
    shard_options.add_work_dir(merge)


def add_split(shards: Any) -> None:
    """Declare `shards split`."""
    split = command(
        shards,
        "split",
        _split,
        "divide a shard set into DST/train and DST/val by seed and key; images keep their bytes",
    )
    split.add_argument("source", metavar="SET", help="folder or URL of the shard set")
    split.add_argument(
        "destination", type=option_types.destination, metavar="DST", help="folder or URL to write train/ and val/ to"
    )
    split.add_argument(
        "--val-fraction",
        type=option_types.fraction,
        required=True,
        metavar="F",
        help="fraction of the samples for DST/val, 0 < F < 1",
    )
    split.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="images per tar (default: 1000)"
    )
    split.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the split (default: 0)")
    shard_options.add_workers(split)
    shard_options.add_work_dir(split)


def add_subset(shards: Any) -> None:
    """Declare `shards subset`."""
    subset = command(
        shards,
        "subset",
        _subset,
        "write the same fraction of every class of a shard set as a set, by seed and key; images keep their bytes",
    )
    subset.add_argument("source", metavar="SET", help="folder or URL of the shard set, which has classes")
    subset.add_argument(
        "destination", type=option_types.destination, metavar="DST", help="folder or URL of the set to write"
    )
    subset.add_argument(
        "--fraction",
        type=option_types.fraction,
        required=True,
        metavar="F",
        help="fraction of every class's samples, 0 < F < 1 (0.01 is 1 %%); at least one sample of a class is taken",
    )
    subset.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="images per tar (default: 1000)"
    )
    subset.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the choice (default: 0)")
    shard_options.add_workers(subset)
    shard_options.add_work_dir(subset)


def _create(options: argparse.Namespace) -> int:
    from esvit_scale.data.reencode import CHOICES, Reencode
    from esvit_scale.data.shard_plan import Recipe

    if options.rotate_as_noted and options.kind != "img2dataset":
        raise UserError(
            "--rotate-as-noted: reads the json that img2dataset writes; name the source: --from img2dataset"
        )
    recipe = Recipe(
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.bytes_per_shard,
        seed=options.seed,
        shuffle=not options.no_shuffle,
        min_side=options.min_side,
        reencode=Reencode(options.short_side, options.quality, CHOICES[options.format]),
        keep=options.keep,
        drop_duplicates=options.drop_duplicates,
        val_fraction=options.val_fraction,
        channels=options.channels,
        bits=options.bits,
        rotate_as_noted=options.rotate_as_noted,
    )
    source = shard_options.source_options(options)
    return _write(options.source, options, source, recipe, options.shard_range, options.strict)


def _split(options: argparse.Namespace) -> int:
    return _write_part(options, val_fraction=options.val_fraction)


def _subset(options: argparse.Namespace) -> int:
    return _write_part(options, label_fraction=options.fraction)


def _write_part(options: argparse.Namespace, val_fraction: float = 0.0, label_fraction: float = 1.0) -> int:
    """Write a part of a shard set, or its two parts; the fractions are those of a recipe."""
    from esvit_scale.data.remote import place
    from esvit_scale.data.shard_plan import Recipe
    from esvit_scale.data.sources import SourceOptions

    # Raises UserError if it is not a shard set
    found = place.open_set(options.source)
    recipe = Recipe(
        samples_per_shard=options.samples_per_shard,
        seed=options.seed,
        channels=found.channels,
        bits=found.bits,
        val_fraction=val_fraction,
        label_fraction=label_fraction,
    )
    return _write(options.source, options, SourceOptions(kind="tars", work_dir=options.work_dir), recipe, None)


def _write(
    source: str,
    options: argparse.Namespace,
    source_options: "SourceOptions",
    recipe: "Recipe",
    part: tuple[int, int] | None,
    strict: bool = False,
) -> int:
    from esvit_scale.data import shard_writer

    chosen = shard_writer.Part(*part) if part else None
    workers = shard_options.workers(options)
    sets = shard_writer.write_source(
        source, options.destination, source_options, recipe, workers, chosen, strict, options.work_dir
    )
    if part:
        print(
            f"{options.destination}: part {part[0]} of {part[1]} is written; when all are, run `esvit-scale shards merge "
            f"{options.destination}`"
        )
    _say_sets(options.destination, sets)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_writer

    _say_sets(options.destination, shard_writer.merge(options.destination, options.strict, options.work_dir))
    return 0


_MIXED = (
    "holds images of several types ({}): pretraining and webdataset read them, but Hugging Face datasets may refuse or lose "
    "some; --format jpg (or png, webp) gives all images one type"
)


def _types(formats: "Mapping[str, int]") -> str:
    return ", ".join(f"{number:,} .{ext}" for ext, number in sorted(formats.items(), key=lambda item: -item[1]))


def _say_sets(destination: Path | str, sets: "Mapping[str, Manifest]") -> None:
    """Print samples, shards and classes of each set, and one table of the images left out, with a warning if many are.

    Also warn of mixed file formats, and of classes that only one of the sets has.
    """
    from esvit_scale.data.left_out import LeftOut
    from esvit_scale.progress import say

    left = LeftOut()
    for name, manifest in sets.items():
        place = destination / name if isinstance(destination, Path) else store_urls.join(destination, name).rstrip("/")
        classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
        print(f"{place}: {manifest.samples} samples in {len(manifest.shards)} shards{classes}")
        left.update(LeftOut(manifest.left_out))
        if len(manifest.formats) > 1:
            say(f"{place}: {_MIXED.format(_types(manifest.formats))}")
    if len(sets) > 1 and isinstance(destination, Path):  # a store would be asked for every index
        _say_classes_of_one_part(destination, sets)
    if left:
        print(left.table())
    if warning := left.warning(sum(manifest.samples for manifest in sets.values())):
        say(warning)


def _say_classes_of_one_part(destination: Path, sets: "Mapping[str, Manifest]") -> None:
    """Report on stderr how many classes have samples in only one of the sets (train or val), if any.

    Accuracy on a class cannot be measured if its samples are only in train.
    """
    from esvit_scale.data.evaluation import Items
    from esvit_scale.progress import say

    there: dict[str, set[str]] = {}
    for name, manifest in sets.items():
        labels = Items(manifest).labels()
        there[name] = {manifest.classes[i] for i in labels if 0 <= i < len(manifest.classes)}
    counts = {name: len(own.difference(*(o for n, o in there.items() if n != name))) for name, own in there.items()}
    if any(counts.values()):
        words = ", ".join(f"{count} have samples in {name} only" for name, count in counts.items())
        say(f"{destination}: of {len(set().union(*there.values()))} classes, {words}")
