"""Shards of images: write, check, describe and show them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esvit_scale.commands import option_types
from esvit_scale.commands.parser import command, group, positive
from esvit_scale.errors import UserError

if TYPE_CHECKING:
    from esvit_scale.data.manifest import Manifest
    from esvit_scale.data.shard_plan import Recipe
    from esvit_scale.data.sources import SourceOptions


def add(commands: Any) -> None:
    shards = group(commands, "shards", "write, check, describe and show shards of images")
    _add_create(shards)
    _add_merge(shards)
    _add_split(shards)
    _add_duplicates(shards)
    _add_verify(shards)
    _add_stats(shards)
    _add_show(shards)


def _add_create(shards: Any) -> None:
    create = command(
        shards, "create", _create, "images from anywhere → tar shards and a manifest; goes on where it was"
    )
    _add_source(create)
    create.add_argument("destination", type=Path, metavar="DST", help="folder to make")
    size = create.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="images in a tar (default: 1000)"
    )
    size.add_argument(
        "--bytes-per-shard",
        type=option_types.size,
        metavar="SIZE",
        help="of image files in a tar, e.g. 500M, instead of a number",
    )
    create.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order in which images are put into shards (default: 0)"
    )
    create.add_argument("--no-shuffle", action="store_true", help="keep the source's order")
    create.add_argument("--min-side", type=positive, default=0, metavar="PX", help="leave out smaller images")
    create.add_argument("--drop-duplicates", action="store_true", help="leave out files whose bytes came before")
    create.add_argument("--keep", type=Path, metavar="LIST", help="write only what `shards duplicates` listed")
    create.add_argument(
        "--short-side", type=positive, metavar="PX", help="shrink larger images; default: keep the bytes"
    )
    create.add_argument(
        "--quality", type=option_types.quality, metavar="Q", help="encode again, 1..100 (default then: 90)"
    )
    create.add_argument("--format", choices=("jpeg", "webp"), help="encode again")
    create.add_argument(
        "--val-fraction",
        type=option_types.fraction,
        default=0.0,
        metavar="F",
        help="write DST/train and DST/val, by seed and key",
    )
    _add_workers(create)
    create.add_argument(
        "--shard-range",
        type=option_types.part,
        metavar="I/N",
        help="write the I-th of N parts (from 1); `shards merge` finishes",
    )


def _add_merge(shards: Any) -> None:
    merge = command(shards, "merge", _merge, "finish a set whose parts were written with --shard-range")
    merge.add_argument("destination", type=Path, metavar="DST", help="folder of the parts")


def _add_split(shards: Any) -> None:
    split = command(
        shards, "split", _split, "a shard set → DST/train and DST/val, by seed and key; files keep their bytes"
    )
    split.add_argument("source", metavar="SET", help="folder of shards")
    split.add_argument("destination", type=Path, metavar="DST", help="folder to make")
    split.add_argument(
        "--val-fraction", type=option_types.fraction, required=True, metavar="F", help="of the samples, 0 < F < 1"
    )
    split.add_argument("--samples-per-shard", type=positive, default=1000, metavar="N", help="(default: 1000)")
    split.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    _add_workers(split)


def _add_duplicates(shards: Any) -> None:
    duplicates = command(
        shards, "duplicates", _duplicates, "find the same and similar images → a keep-list for `shards create --keep`"
    )
    _add_source(duplicates)
    duplicates.add_argument("--out", type=Path, required=True, metavar="LIST", help="keep-list to write")
    duplicates.add_argument(
        "--near",
        type=option_types.distance,
        nargs="?",
        const=3,
        metavar="BITS",
        help="similar ones too: perceptual hashes that differ in at most BITS of 64 bits, 0..7 (default: 3)",
    )
    _add_workers(duplicates)


def _add_verify(shards: Any) -> None:
    verify = command(shards, "verify", _verify, "check sizes, sha256, counts and that every image decodes")
    verify.add_argument("root", type=Path, metavar="DST", help="folder of shards")
    verify.add_argument(
        "--repair",
        nargs="?",
        const="",
        metavar="SRC",
        help="write damaged indexes again, and damaged tars from their source",
    )
    _add_workers(verify)


def _add_stats(shards: Any) -> None:
    stats = command(shards, "stats", _stats, "sizes, bytes and classes of a set")
    stats.add_argument("root", type=Path, metavar="DST", help="folder of shards")
    stats.add_argument("--plot", type=Path, metavar="PNG", help="draw them too")
    stats.add_argument("--json", action="store_true", help="JSON instead of the table, with the count of every class")
    _add_workers(stats)


def _add_show(shards: Any) -> None:
    show = command(shards, "show", _show, "a contact sheet of images drawn from the whole set")
    show.add_argument("root", type=Path, metavar="DST", help="folder of shards")
    show.add_argument("--out", type=Path, required=True, metavar="FILE", help=".png or .html")
    show.add_argument("--count", type=positive, default=64, metavar="N", help="images (default: 64)")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder, list, table, tar, zip, …; - for a list on stdin")
    source = parser.add_argument_group("source")
    source.add_argument(
        "--from",
        dest="kind",
        metavar="KIND",
        help="folder, imagenet, img2dataset, list, csv, tsv, parquet, tars or zips; by default seen from what SRC is",
    )
    source.add_argument("--root", type=Path, metavar="DIR", help="where a list's or table's relative paths start")
    source.add_argument("--image-column", metavar="COLUMN", help="of a table: paths or image bytes")
    source.add_argument(
        "--label",
        metavar="HOW",
        help="a table's column; of other sources parent (folder), archive (its name), last (a line's last word) or none",
    )
    source.add_argument("--caption", metavar="COLUMN", help="of a table")
    source.add_argument("--classes", type=Path, metavar="FILE", help="class names in the order of their numbers")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core)")


def _create(options: argparse.Namespace) -> int:
    from esvit_scale.data.reencode import Reencode
    from esvit_scale.data.shard_plan import Recipe

    recipe = Recipe(
        samples_per_shard=options.samples_per_shard,
        bytes_per_shard=options.bytes_per_shard,
        seed=options.seed,
        shuffle=not options.no_shuffle,
        min_side=options.min_side,
        reencode=Reencode(options.short_side, options.quality, options.format),
        keep=options.keep,
        drop_duplicates=options.drop_duplicates,
        val_fraction=options.val_fraction,
    )
    return _write(options.source, options, _source_options(options), recipe, options.shard_range)


def _split(options: argparse.Namespace) -> int:
    from esvit_scale.data import manifest
    from esvit_scale.data.shard_plan import Recipe
    from esvit_scale.data.sources import SourceOptions

    manifest.load(Path(options.source))  # says what is wrong with it
    recipe = Recipe(samples_per_shard=options.samples_per_shard, seed=options.seed, val_fraction=options.val_fraction)
    return _write(options.source, options, SourceOptions(kind="tars"), recipe, None)


def _write(
    source: str,
    options: argparse.Namespace,
    source_options: "SourceOptions",
    recipe: "Recipe",
    part: tuple[int, int] | None,
) -> int:
    from esvit_scale.data import shard_writer

    chosen = shard_writer.Part(*part) if part else None
    sets = shard_writer.write_source(source, options.destination, source_options, recipe, _workers(options), chosen)
    if part:
        print(
            f"{options.destination}: part {part[0]} of {part[1]} is written; after all of them: esvit-scale shards merge"
        )
    _say_sets(options.destination, sets)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_writer

    _say_sets(options.destination, shard_writer.merge(options.destination))
    return 0


def _duplicates(options: argparse.Namespace) -> int:
    from esvit_scale.data import duplicates, progress, sources

    splits = sources.open_source(options.source, _source_options(options))
    if len(splits) > 1:
        raise UserError(f"{options.source}: comes as {' and '.join(splits)}; look for duplicates in each folder alone")
    [source] = splits.values()
    for note in source.notes:
        progress.say(note)
    dropped = duplicates.find(source, options.near, _workers(options))
    duplicates.write_lists(source, dropped, options.out)
    kept = len(source) - len(dropped)
    print(f"{options.out}: keeps {kept} of {len(source)}; {options.out}.dropped.tsv names the other {len(dropped)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_repair, shard_verify

    if options.repair is not None:
        for line in shard_repair.repair(options.root, options.repair, _workers(options)):
            print(line)
    problems = shard_verify.verify(options.root, _workers(options))
    if problems:
        raise UserError("\n".join(problems))
    print(f"{options.root}: every shard is as its manifest says")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_stats

    stats = shard_stats.gather(options.root, _workers(options))
    print(shard_stats.as_json(stats) if options.json else shard_stats.table(stats))
    if options.plot:
        from esvit_scale.report import shard_pages

        _write_file(options.plot, shard_pages.overview(stats))
    return 0


def _show(options: argparse.Namespace) -> int:
    if options.out.suffix not in (".png", ".html"):
        raise UserError(f"--out {options.out}: ends in neither .png nor .html")
    from esvit_scale.data import manifest
    from esvit_scale.report import shard_pages

    found = manifest.load(options.root)
    manifest.check_sizes(found)
    shown = shard_pages.chosen_samples(found, options.count, options.seed)
    if options.out.suffix == ".png":
        _write_file(options.out, shard_pages.contact_sheet(shown))
    else:
        title = f"{options.root.resolve().name}: {len(shown)} of {found.samples} samples"
        _write_file(options.out, shard_pages.contact_page(shown, title).encode())
    print(options.out)
    return 0


def _write_file(path: Path, content: bytes) -> None:
    from esvit_scale import files

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _say_sets(destination: Path, sets: "Mapping[str, Manifest]") -> None:
    for name, manifest in sets.items():
        classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
        print(f"{destination / name}: {manifest.samples} samples in {len(manifest.shards)} shards{classes}")


def _source_options(options: argparse.Namespace) -> "SourceOptions":
    from esvit_scale.data.sources import SourceOptions

    return SourceOptions(
        options.kind, options.root, options.image_column, options.label, options.caption, options.classes
    )


def _workers(options: argparse.Namespace) -> int:
    from esvit_scale.data import pool

    return int(options.workers or pool.cores())
