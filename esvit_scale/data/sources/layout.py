"""Detection of the kind of source that a folder is, by the files in it."""

from pathlib import Path

from esvit_scale.data import manifest as manifests
from esvit_scale.data.image_folder import printable, walk
from esvit_scale.data.left_out import LeftOut
from esvit_scale.data.sources.base import is_image
from esvit_scale.data.sources.img2dataset import is_img2dataset
from esvit_scale.data.sources.mds import is_mds
from esvit_scale.errors import UserError

ARCHIVES = {".tar": "tars", ".zip": "zips", ".parquet": "parquet", ".pq": "parquet"}


def folder_kind(root: Path, archives_meant: bool) -> tuple[str, str]:
    """Return the kind of source that a folder is, and a line for the user if it holds files of other kinds too, or "".

    Tars, zips or parquet files directly in the folder decide its kind, unless the folder's image files have more than
    half as many bytes as these. Then it is a folder of images, beside the archive that they came from or the table that
    describes them.

    Args:
        archives_meant: whether options were given that only archives and tables have, so that these decide in any case.
    """
    if is_mds(root):
        return "mds", ""
    if splits := [part for part in ("train", "val") if is_mds(root / part)]:
        raise UserError(f"{root}: holds MDS data sets in folders; give one of them, such as {root / splits[0]}")
    if (root / "Data" / "CLS-LOC").is_dir() or ((root / "train").is_dir() and (root / "val").is_dir()):
        return "imagenet", ""
    if manifests.is_shard_set(root):
        return "tars", ""
    if is_img2dataset(root):
        return "img2dataset", ""
    found: dict[str, list[Path]] = {}
    for folder in (root, root / "data"):  # data/ is where the repositories of Hugging Face have their files
        for path in sorted(folder.iterdir()) if folder.is_dir() and not found else ():
            if path.suffix.lower() in ARCHIVES and not path.name.startswith(".") and path.is_file():
                found.setdefault(ARCHIVES[path.suffix.lower()], []).append(path)
    kind = next((kind for kind in dict.fromkeys(ARCHIVES.values()) if kind in found), None)
    if kind is None:
        return "folder", ""
    first = printable(found[kind][0].name)
    images, held = _images(root)
    if not archives_meant and 2 * held > sum(path.stat().st_size for path in found[kind]):
        number = len(found[kind])
        return "folder", (
            f"{root}: taken for a folder of {images:,} images; {number:,} {found[kind][0].suffix} files in it are left out "
            f"(first: {first}); --from {kind} reads these instead"
        )
    others = [f"--from folder reads its {images:,} image files"] if images else []
    others += [
        f"--from {other} reads its {len(paths):,} {paths[0].suffix} files"
        for other, paths in found.items()
        if other != kind
    ]
    return kind, f"{root}: taken for {kind} because of {first}; {', '.join(others)}" if others else ""


def _images(root: Path) -> tuple[int, int]:
    """Return the number of image files below a folder, and the sum of their sizes in bytes."""
    number = held = 0
    for path in walk(root, LeftOut()):
        if is_image(path) and (root / path).is_file():
            number, held = number + 1, held + (root / path).stat().st_size
    return number, held
