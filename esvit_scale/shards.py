"""`esvit_scale.shards.create`, the command `shards create` as a Python function."""

from pathlib import Path
from typing import Literal

from esvit_scale.commands import option_types
from esvit_scale.data import shard_writer
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.reencode import Reencode
from esvit_scale.data.shard_plan import Recipe
from esvit_scale.data.sources import SourceOptions
from esvit_scale.machine import usable_cpus


def create(
    source: str | Path,
    destination: str | Path,
    *,
    kind: str | None = None,
    label: str | None = None,
    root: str | Path | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    shuffle: bool = True,
    min_side: int = 0,
    short_side: int | None = None,
    quality: int | None = None,
    format: Literal["jpeg", "png", "webp"] | None = None,
    drop_duplicates: bool = False,
    val_fraction: float = 0.0,
    channels: int = 3,
    bits: int = 8,
    workers: int | None = None,
    work_dir: str | Path | None = None,
) -> dict[str, Manifest]:
    """Write images as tar shards with a manifest, and return the manifests; an interrupted call continues.

    Args:
        source: folder, list, table, tar, zip, … of images.
        destination: folder or URL (s3://…) to write the shard set to.
        kind: kind of source (`--from` of the command); None: detected.
        label: where classes come from (`--label`); None: depends on the source.
        root: folder at which relative paths of a list or table start; None: that of the list or table.
        samples_per_shard: images per tar.
        seed: random seed of the order of images and of `val_fraction`.
        shuffle: False keeps the source's order.
        min_side: pixels; images whose shorter side is below are left out.
        short_side: pixels; images whose shorter side is above are shrunk to it. None: they keep their bytes.
        quality: of JPEG or WebP, 1..100; re-encodes every image. None: they keep their bytes.
        format: re-encodes every image in this format. None: they keep their bytes.
        drop_duplicates: leave out files with the same bytes as an earlier one.
        val_fraction: fraction of samples for destination/val; the rest goes to destination/train.
        channels, bits: of every image.
        workers: worker processes; None: one per CPU core.
        work_dir: folder for files on their way from or to a store; None: below that of temporary files.

    Returns:
        The manifests by name of the split: "train" and "val" with `val_fraction`, else "".

    Raises:
        UserError: a value is out of its range or does not go with another one, the source is missing or has no usable
            images, or the destination holds something else.
    """
    recipe = Recipe(
        samples_per_shard=samples_per_shard,
        seed=seed,
        shuffle=shuffle,
        min_side=min_side,
        reencode=Reencode(short_side, quality, format),
        drop_duplicates=drop_duplicates,
        val_fraction=val_fraction,
        channels=channels,
        bits=bits,
    )
    options = SourceOptions(kind=kind, root=Path(root) if root else None, label=label)
    return shard_writer.write_source(
        str(source),
        option_types.destination(str(destination)),
        options,
        recipe,
        workers or usable_cpus(),
        work_dir=Path(work_dir) if work_dir else None,
    )
