"""Options that several `shards` commands share: the source of images and the number of worker processes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from esvit_scale.commands import option_types
from esvit_scale.commands.parser import positive
from esvit_scale.machine import usable_cpus

if TYPE_CHECKING:
    from esvit_scale.data.sources import SourceOptions


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the argument SRC and the options that say how to read it."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="source of the images: folder, list, table, tar, zip, …, or the URL of one; - for a list on stdin",
    )
    source = parser.add_argument_group("source")
    source.add_argument(
        "--from",
        dest="kind",
        metavar="KIND",
        help="kind of source: folder, imagenet, img2dataset, mds, list, csv, tsv, parquet, tars or zips (default: detected)",
    )
    source.add_argument(
        "--root",
        type=option_types.destination,
        metavar="DIR",
        help="folder or URL at which relative paths of a list or table start (default: that of the list or table)",
    )
    source.add_argument(
        "--image-column",
        metavar="COLUMN",
        help="table column that holds image paths or image bytes (default: the one named path, file, image, …)",
    )
    source.add_argument(
        "--label",
        metavar="HOW",
        help=(
            "where classes come from: a column of a table; for other sources parent (folder of the image), archive (name of "
            "the tar or zip), last (last word of a list's line) or none (default: depends on the source)"
        ),
    )
    source.add_argument("--caption", metavar="COLUMN", help="table column that holds captions (default: no captions)")
    source.add_argument(
        "--members",
        metavar="KINDS",
        help="what belongs to a sample of a folder or tar beside its image, by name: some of audio,video,text (default: nothing)",
    )
    source.add_argument(
        "--audio-column", metavar="COLUMN", help="table column that holds paths of sound (default: no sound)"
    )
    source.add_argument(
        "--video-column",
        metavar="COLUMN",
        help="table column that holds paths of videos, or of folders of frames (default: no video)",
    )
    source.add_argument(
        "--fields", metavar="COLUMNS", help="table columns that become fields of the sample's .json (default: none)"
    )
    source.add_argument(
        "--quoted",
        action="store_true",
        help="read fields of a TSV as quoted, like those of a CSV (default: not quoted)",
    )
    source.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="text file with one class name per line, in the order of the class numbers (default: from the source)",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Add the option --workers."""
    parser.add_argument("--workers", type=positive, metavar="N", help="worker processes (default: one per CPU core)")


def add_work_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option --work-dir."""
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="folder for files on their way from or to a store (default: below that of temporary files)",
    )


def source_options(options: argparse.Namespace) -> "SourceOptions":
    """Return the values of the options that `add_source` adds, as SourceOptions."""
    from esvit_scale.data.sources import SourceOptions
    from esvit_scale.data.sources.members import parse_members

    return SourceOptions(
        options.kind,
        options.root,
        options.image_column,
        options.label,
        options.caption,
        options.classes,
        options.quoted,
        options.work_dir,
        parse_members(options.members or ""),
        options.audio_column,
        options.video_column,
        tuple(filter(None, (name.strip() for name in (options.fields or "").split(",")))),
    )


def workers(options: argparse.Namespace) -> int:
    """Return the number of worker processes: --workers, or one per usable CPU core."""
    return int(options.workers or usable_cpus())
