"""Shards of images: write and check them."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands.parser import command, group, positive
from esvit_scale.errors import UserError


def add(commands: Any) -> None:
    shards = group(commands, "shards", "write and check shards of images")
    create = command(
        shards, "create", _shards_create, "an image folder (class subfolders, or flat) → tar shards and a manifest"
    )
    create.add_argument("source", type=Path, metavar="SRC", help="folder of images")
    create.add_argument("destination", type=Path, metavar="DST", help="folder to make")
    create.add_argument(
        "--samples-per-shard", type=positive, default=1000, metavar="N", help="images in a tar (default: 1000)"
    )
    create.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the order in which images are put into shards (default: 0)"
    )
    verify = command(shards, "verify", _shards_verify, "check sizes, sha256, counts and that every image decodes")
    verify.add_argument("root", type=Path, metavar="DST", help="folder of shards")


def _shards_create(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_writer

    manifest = shard_writer.create(options.source, options.destination, options.samples_per_shard, options.seed)
    classes = f", {len(manifest.classes)} classes" if manifest.classes else ""
    print(f"{options.destination}: {manifest.samples} samples in {len(manifest.shards)} shards{classes}")
    return 0


def _shards_verify(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_writer

    problems = shard_writer.verify(options.root)
    if problems:
        raise UserError("\n".join(problems))
    print(f"{options.root}: every shard is as its manifest says")
    return 0
