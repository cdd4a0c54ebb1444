"""The `shards` commands: write, check, describe and show shards of images."""

import argparse
from pathlib import Path
from typing import Any

from esvit_scale.commands import option_types, shard_options, shard_writing
from esvit_scale.commands.parser import command, group, positive
from esvit_scale.errors import UserError
from esvit_scale.store_urls import is_set_url


def add(commands: Any) -> None:
    """Declare `shards` and its subcommands."""
    shards = group(commands, "shards", "write, check, describe and show shards of images")
    shard_writing.add_create(shards)
    shard_writing.add_merge(shards)
    shard_writing.add_split(shards)
    shard_writing.add_subset(shards)
    _add_duplicates(shards)
    _add_verify(shards)
    _add_stats(shards)
    _add_show(shards)
    _add_upload(shards)
    _add_index(shards)


def _add_duplicates(shards: Any) -> None:
    duplicates = command(
        shards, "duplicates", _duplicates, "find duplicate images and write a keep-list for `shards create --keep`"
    )
    shard_options.add_source(duplicates)
    duplicates.add_argument("--out", type=Path, required=True, metavar="LIST", help="keep-list file to write")
    duplicates.add_argument(
        "--near",
        type=option_types.distance,
        nargs="?",
        const=3,
        metavar="BITS",
        help=(
            "also drop similar images: those whose 64-bit perceptual hashes differ in at most BITS bits, 0..7 (without BITS: "
            "3; default: drop the same files only)"
        ),
    )
    shard_options.add_workers(duplicates)
    shard_options.add_work_dir(duplicates)


def _add_verify(shards: Any) -> None:
    verify = command(shards, "verify", _verify, "check sizes, sha256, counts and that every image decodes")
    verify.add_argument("root", type=option_types.set_or_folder, metavar="DST", help="folder or URL of the shard set")
    verify.add_argument(
        "--repair",
        nargs="?",
        const="",
        metavar="SRC",
        help="make damaged indexes again, and damaged tars from their source SRC (default: only report)",
    )
    shard_options.add_workers(verify)


def _add_stats(shards: Any) -> None:
    stats = command(shards, "stats", _stats, "print sizes, bytes, classes, and mean and std of the pixels of a set")
    stats.add_argument("root", type=option_types.set_or_folder, metavar="DST", help="folder or URL of the shard set")
    stats.add_argument("--plot", type=Path, metavar="PNG", help="image file to draw the statistics to (default: none)")
    stats.add_argument(
        "--json", action="store_true", help="print JSON with the number of samples of every class (default: a table)"
    )
    shard_options.add_workers(stats)


def _add_show(shards: Any) -> None:
    show = command(shards, "show", _show, "write a contact sheet of random images of a set")
    show.add_argument("root", type=option_types.set_or_folder, metavar="DST", help="folder or URL of the shard set")
    show.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, ending in .png or .html")
    show.add_argument("--count", type=positive, default=64, metavar="N", help="images on the sheet (default: 64)")
    show.add_argument(
        "--bands",
        type=option_types.bands,
        metavar="R,G,B",
        help="numbers of the channels to show, from 1: three as red, green and blue, or one as grey (default: the first)",
    )
    show.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the choice (default: 0)")


def _add_upload(shards: Any) -> None:
    upload = command(shards, "upload", _upload, "copy a finished set to an object store; an interrupted run continues")
    upload.add_argument("root", type=Path, metavar="SET", help="folder of the shard set")
    upload.add_argument("url", metavar="URL", help="address of the set's folder, such as s3://bucket/photos")


def _add_index(shards: Any) -> None:
    index = command(
        shards,
        "index",
        _index,
        "write old, missing or damaged indexes of a set anew, with checksums; or write those of NVIDIA DALI",
    )
    index.add_argument("root", type=Path, metavar="SET", help="folder of the shard set")
    index.add_argument(
        "--format",
        choices=("checksums", "dali"),
        default="checksums",
        help="checksums: add one of every image to the set's indexes; dali: write NAME.idx instead, for NVIDIA DALI (default: "
        "checksums)",
    )
    index.add_argument(
        "--out", type=Path, metavar="DIR", help="with dali: folder for NAME.idx (default: beside the tars)"
    )
    shard_options.add_workers(index)


def _index(options: argparse.Namespace) -> int:
    from esvit_scale.data import checksums, dali_index
    from esvit_scale.data import manifest as manifests

    if options.out and options.format != "dali":
        raise UserError("--out: only with --format dali; the set's own indexes lie beside its tars")
    try:
        if options.format == "dali":
            found, folder = manifests.load(options.root), options.out or options.root
            dali_index.write(found, folder)
            print(f"{folder}: {len(found.shards)} indexes for DALI (fn.readers.webdataset)")
            return 0
        added = checksums.add(options.root, shard_options.workers(options))
    except OSError as error:
        raise UserError(f"{error.filename or options.root}: {error.strerror or error}") from None
    print(f"{options.root}: {'indexes with checksums were written' if added else 'its indexes have checksums already'}")
    return 0


def _upload(options: argparse.Namespace) -> int:
    from esvit_scale.data.remote import upload

    if not is_set_url(options.url):
        raise UserError(f"{options.url}: not the address of a folder in a store, such as s3://bucket/photos")
    sent = upload.upload(options.root, options.url)
    print(f"{options.url}: complete ({sent} shards sent now); train with data.train={options.url}")
    return 0


def _duplicates(options: argparse.Namespace) -> int:
    from esvit_scale.data import duplicates, sources
    from esvit_scale.data.remote import source_files
    from esvit_scale.progress import say

    splits = sources.open_source(options.source, shard_options.source_options(options))
    if len(splits) > 1:
        raise UserError(
            f"{options.source}: is divided into {' and '.join(splits)}; run `shards duplicates` on each of these folders"
        )
    [source] = splits.values()
    for note in source.notes:
        say(note)
    dropped = duplicates.find(source, options.near, shard_options.workers(options))
    duplicates.write_lists(source, dropped, options.out)
    source_files.discard_if_remote(options.source, options.work_dir)
    kept = len(source) - len(dropped)
    print(
        f"{options.out}: keeps {kept} of {len(source)} images; {options.out}.dropped.tsv names the other {len(dropped)}"
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_repair, shard_verify

    if options.repair is not None:
        for line in shard_repair.repair(options.root, options.repair, shard_options.workers(options)):
            print(line)
    problems = shard_verify.verify(options.root, shard_options.workers(options))
    if problems:
        raise UserError("\n".join(problems))
    print(f"{options.root}: every shard agrees with the manifest")
    return 0


def _stats(options: argparse.Namespace) -> int:
    from esvit_scale.data import shard_stats

    stats = shard_stats.gather(options.root, shard_options.workers(options))
    print(shard_stats.as_json(stats) if options.json else shard_stats.table(stats))
    if options.plot:
        from esvit_scale.report import shard_pages

        _write_file(options.plot, shard_pages.overview(stats))
    return 0


def _show(options: argparse.Namespace) -> int:
    if options.out.suffix not in (".png", ".html"):
        raise UserError(f"--out {options.out}: must end in .png or .html")
    from esvit_scale.data import manifest as manifests
    from esvit_scale.report import shard_pages

    found = manifests.load(options.root)
    manifests.check_sizes(found)
    shown = shard_pages.draw_samples(found, options.count, options.seed, options.bands)
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
