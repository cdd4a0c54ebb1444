"""Shard sets of the first images of another set, so that a sweep can vary the number of unique images."""

from pathlib import Path

import numpy as np

from esvit_scale import files
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import Manifest
from esvit_scale.errors import UserError
from esvit_scale.scaling.sweep_file import Sweep


def path_of(sweep: Sweep, unique: int) -> Path:
    """Return the folder for the sweep's shard set of the first `unique` images."""
    return sweep.folder / "data" / f"first-{unique}"


def make(sweep: Sweep, unique: int, source: Path) -> None:
    """Create a shard set of the first `unique` images of `source`: links to its first shards, and a new manifest."""
    data, folder = manifests.load(source), path_of(sweep, unique)
    if data.remote:
        raise UserError(f"{data.remote.url}: unique_images needs a set on a file system; copy the set first")
    if manifests.is_shard_set(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    shards = data.shards[: sums(data).index(unique) + 1]
    for shard in shards:
        path = data.root.resolve() / shard.name
        for link in (path, manifests.index_path(path)):
            if link.exists() and not (folder / link.name).is_symlink():
                (folder / link.name).symlink_to(link)
    content = manifests.dump(shards, data.classes, f"{data.source}, first {unique}", "sweep")
    files.write_bytes(folder / manifests.MANIFEST, content)


def sums(data: Manifest) -> list[int]:
    """Return the cumulative numbers of images in the first 1, 2, … shards."""
    totals: list[int] = np.cumsum(data.shards.samples).tolist()
    return totals
