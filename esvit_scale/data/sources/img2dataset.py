"""The output of img2dataset as a source: numbered tars or folders, each with NAME_stats.json when it is complete."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from esvit_scale.data.image_folder import printable, walk
from esvit_scale.data.left_out import ARCHIVES, BESIDE_ARCHIVES, UNFINISHED, LeftOut
from esvit_scale.data.sources.base import Source, what_file
from esvit_scale.data.sources.folder import FolderSource
from esvit_scale.data.sources.tars import TarSource
from esvit_scale.errors import UserError


def is_img2dataset(root: Path) -> bool:
    """Return whether the folder holds a NAME_stats.json beside its NAME.tar, NAME.parquet or folder NAME."""
    return any(
        (root / name).is_dir() or (root / f"{name}.tar").is_file() or (root / f"{name}.parquet").is_file()
        for name in _complete(root)
    )


def _complete(root: Path) -> set[str]:
    """Return NAME of each NAME_stats.json: the names of the tars or folders that img2dataset has finished."""
    found = {p.name.removesuffix("_stats.json") for p in root.glob("*_stats.json") if not p.name.startswith(".")}
    return found - {""}


def img2dataset_source(root: Path, label: str | None, classes: Sequence[str] | None) -> Source:
    """Return a source of the images in img2dataset's output, with their captions and metadata.

    The output formats `webdataset` and `files` can be read. Parts that img2dataset has not finished are left out and
    reported.

    Raises:
        UserError: no part is complete, or the output format is another one.
    """
    complete = _complete(root)
    if not complete:
        raise UserError(
            f"{root}: holds no *_stats.json: either img2dataset has finished nothing there, or this is not its output folder"
        )
    tars = sorted(p for p in root.glob("*.tar") if not p.name.startswith("."))
    if tars:
        source: Source = TarSource([p for p in tars if p.stem in complete], root, label, classes)
        unfinished = [p for p in tars if p.stem not in complete]
        source.notes += [f"{p}: left out, since img2dataset has not finished it" for p in unfinished]
        for path in unfinished:
            source.left_out.add(ARCHIVES, UNFINISHED, printable(path.name))
        _count_others(root, source.left_out, {p.name for p in tars}, [p.stem for p in tars])
        return source
    entries = {p.name: p.is_dir() for p in root.iterdir()}
    folders = {name for name, is_folder in entries.items() if is_folder and name in complete}
    if folders:
        source = FolderSource(root, "none", captions=True, skip=entries.keys() - folders)
        _count_others(root, source.left_out, folders, folders)
        return source
    raise UserError(
        f"{root}: holds neither tars nor folders beside *_stats.json; for output_format=parquet name the column of the image "
        "files: --from parquet --image-column jpg --caption caption"
    )


def _count_others(root: Path, left: LeftOut, used: Collection[str], parts: Iterable[str]) -> None:
    """Count the files below `root` as left out, except those in `used` and the NAME_stats.json and NAME.parquet of each
    part NAME."""
    skip = {*used, *(f"{part}{ending}" for part in parts for ending in ("_stats.json", ".parquet"))}
    for path in walk(root, left, skip):
        unfinished = path.partition("/")[0].isdecimal() and "/" in path
        left.add(what_file(path), UNFINISHED if unfinished else BESIDE_ARCHIVES, printable(path))
