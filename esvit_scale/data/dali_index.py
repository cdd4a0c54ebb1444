"""Indexes of a shard set in the text format of NVIDIA DALI, for its reader `fn.readers.webdataset(index_paths=…)`.

The first line is `v1.2` and the number of samples; then each sample has a line with extension, offset, size and name of
each of its members, all separated by spaces. Offsets are those of the members' bytes in the tar.
"""

from pathlib import Path

from esvit_scale import files
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import Entry, Manifest
from esvit_scale.errors import UserError

VERSION = "v1.2"


def write(manifest: Manifest, folder: Path) -> None:
    """Write the index of every shard of a set into a folder, as NAME.idx for NAME.tar.

    Raises:
        UserError: a shard is missing, or the set is not on this machine.
    """
    if manifest.remote:
        raise UserError(f"{manifest.remote.url}: DALI reads tars on a local disk; make the indexes where they lie")
    manifests.check_sizes(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in manifest.shards:
        entries = list(manifests.read_index(manifest.root / shard.name))
        lines = [f"{VERSION} {len(entries)}", *map(_line, entries)]
        files.write_text((folder / shard.name).with_suffix(".idx"), "".join(f"{line}\n" for line in lines))


def _line(entry: Entry) -> str:
    places = sorted((offset, size, ext) for ext, (offset, size) in entry.members.items())
    return " ".join(f"{ext} {offset} {size} {entry.key}.{ext}" for offset, size, ext in places)
