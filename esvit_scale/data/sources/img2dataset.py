"""What img2dataset leaves: numbered tars, parquet files or folders, each with NAME_stats.json when it is complete."""

from collections.abc import Sequence
from pathlib import Path

from esvit_scale.data.image_folder import printable
from esvit_scale.data.left_out import ARCHIVES, UNFINISHED
from esvit_scale.data.sources.base import Source
from esvit_scale.data.sources.folder import FolderSource
from esvit_scale.data.sources.tars import TarSource
from esvit_scale.errors import UserError


def is_img2dataset(root: Path) -> bool:
    return next(root.glob("*_stats.json"), None) is not None


def img2dataset_source(root: Path, label: str | None, classes: Sequence[str] | None) -> Source:
    """Images with their captions and metadata, from its output formats `webdataset` and `files`; what it had not
    finished is left out and said.

    Raises:
        UserError: nothing complete there, or another output format.
    """
    complete = {p.name.removesuffix("_stats.json") for p in root.glob("*_stats.json")}
    if not complete:
        raise UserError(
            f"{root}: no *_stats.json in it: img2dataset has finished nothing there, or this is not its folder"
        )
    tars = sorted(p for p in root.glob("*.tar") if not p.name.startswith("."))
    if tars:
        source: Source = TarSource([p for p in tars if p.stem in complete], root, label, classes)
        unfinished = [p for p in tars if p.stem not in complete]
        source.notes += [f"{p}: left out: img2dataset has not finished it" for p in unfinished]
        for path in unfinished:
            source.left_out.add(ARCHIVES, UNFINISHED, printable(path.name))
        return source
    if any(p.is_dir() and p.name in complete for p in root.iterdir()):
        return FolderSource(root, "none", captions=True)
    raise UserError(
        f"{root}: neither tars nor folders beside *_stats.json; of output_format=parquet give the image files' column: "
        "--from parquet --image-column jpg --caption caption"
    )
