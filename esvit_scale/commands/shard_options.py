"""Options that several `shards` commands share: the source and the number of processes."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from esvit_scale.commands.parser import positive
from esvit_scale.machine import usable_cpus

if TYPE_CHECKING:
    from esvit_scale.data.sources import SourceOptions


def add_source(parser: argparse.ArgumentParser) -> None:
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
    source.add_argument("--quoted", action="store_true", help="fields of a TSV may be quoted, as those of a CSV are")
    source.add_argument("--classes", type=Path, metavar="FILE", help="class names in the order of their numbers")


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core)")


def source_options(options: argparse.Namespace) -> "SourceOptions":
    from esvit_scale.data.sources import SourceOptions

    return SourceOptions(
        options.kind,
        options.root,
        options.image_column,
        options.label,
        options.caption,
        options.classes,
        options.quoted,
    )


def workers(options: argparse.Namespace) -> int:

    return int(options.workers or usable_cpus())
