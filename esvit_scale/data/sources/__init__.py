"""Sources of images: one module per kind of source; each gives numbered samples that are read on demand (base.py)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from esvit_scale import store_urls
from esvit_scale.data import manifest as manifests
from esvit_scale.data.image_folder import list_images
from esvit_scale.data.left_out import BESIDE_ARCHIVES, LeftOut
from esvit_scale.data.remote import source_files
from esvit_scale.data.sources.base import SET_FILES, Source, count_beside, is_image, read_classes, visible_files
from esvit_scale.data.sources.folder import FolderSource
from esvit_scale.data.sources.imagenet import imagenet_sources
from esvit_scale.data.sources.img2dataset import img2dataset_source
from esvit_scale.data.sources.layout import folder_kind
from esvit_scale.data.sources.listing import list_source
from esvit_scale.data.sources.mds import MdsSource
from esvit_scale.data.sources.members import member_folder
from esvit_scale.data.sources.parquet import parquet_source
from esvit_scale.data.sources.table import member_table, table_source
from esvit_scale.data.sources.tars import tar_source
from esvit_scale.data.sources.zips import zip_source
from esvit_scale.data.tar_names import COMPRESSED_TARS
from esvit_scale.errors import UserError, nearest

BY_SUFFIX = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".tar": "tars",
    ".zip": "zips",
    ".txt": "list",
    ".lst": "list",
    ".list": "list",
}
KINDS = ("folder", "imagenet", "img2dataset", "mds", *dict.fromkeys(BY_SUFFIX.values()))


@dataclass(frozen=True)
class SourceOptions:
    """The options of `esvit-scale shards create` that say how a source is read."""

    kind: str | None = None  # one of KINDS; None: detected
    root: Path | str | None = None  # folder or URL where relative paths of lists and tables start
    image_column: str | None = None  # of a table
    label: str | None = None  # a column of a table; for other sources `parent`, `archive`, `last` or `none`
    caption: str | None = None  # a column of a table
    classes: Path | None = None  # file of class names, one per line
    quoted: bool = False  # whether fields of a TSV may be quoted, as those of a CSV are
    work_dir: Path | None = None  # folder for what is fetched of a source in a store; not recorded
    members: Sequence[str] = ()  # of a folder: what belongs to a sample beside its image, of audio, video and text
    audio_column: str | None = None  # of a table
    video_column: str | None = None  # of a table
    fields: Sequence[str] = ()  # columns of a table that become fields of the sample's .json

    @property
    def modal(self) -> bool:
        """Return whether samples are read that have more than an image and its caption."""
        return bool(self.members or self.audio_column or self.video_column or self.fields)


def source_record(options: SourceOptions) -> dict[str, Any]:
    """Return the options as plain values for the manifest, from which a repair of the shards reads the source again.

    Those about members are recorded only where they are given, so that the manifests of other sets stay the same.
    """
    modal = ("members", "audio_column", "video_column", "fields")
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
        if name != "work_dir" and (value or name not in modal)
    }


def open_source(where: str, options: SourceOptions) -> dict[str, Source]:
    """Open a source of images. Return its splits by name, such as `train` and `val`; without splits, under the name "".

    Raises:
        UserError: the source is missing, of an unknown kind, or not readable as the kind that it is.
    """
    try:
        return _open(where, options)
    except OSError as error:  # a folder that cannot be listed, no space for temporary files, …
        raise UserError(f"{error.filename or where}: {error.strerror or error}") from None


def _open(where: str, options: SourceOptions) -> dict[str, Source]:
    if store_urls.protocol(where):
        options = replace(options, root=_start_of(where, options))
        where = str(source_files.fetch(where, options.work_dir))
    path = Path(where)
    kind, note = (options.kind, "") if options.kind else _kind(where, options)
    if kind not in KINDS:
        raise UserError(f"--from {kind}: unknown kind of source{nearest(kind, KINDS)}")
    classes = read_classes(options.classes)
    if kind in ("folder", "imagenet", "img2dataset") and not path.is_dir():
        list_images(path)  # raises UserError with a hint about what is there instead
        raise UserError(f"{path}: not a folder")
    if kind not in ("list", "folder", "imagenet", "img2dataset") and not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if kind == "imagenet":
        return dict(imagenet_sources(path, _folder_label(options.label), classes))
    try:
        source = _single(kind, where, path, options, classes)
    except UserError as error:
        if note:
            raise UserError(f"{error} ({note})") from None
        raise
    source.notes += filter(None, [note])
    if options.label not in (None, "none") and not source.classes:
        raise UserError(f"{where}: --label {options.label}: none of its {len(source)} images has a class")
    return {"": source}


def _start_of(url: str, options: SourceOptions) -> Path | str | None:
    """Return where relative paths start of a list or table in a store: by default at its folder there."""
    if options.root is not None or not url.lower().endswith(tuple(BY_SUFFIX)):
        return options.root
    return url.rpartition("/")[0]


def _single(kind: str, where: str, path: Path, options: SourceOptions, classes: tuple[str, ...] | None) -> Source:
    if options.modal and not (kind == "tars" and options.members):
        return _modal(kind, path, options, classes)
    if kind == "folder":
        return FolderSource(path, _folder_label(options.label), classes)
    if kind == "img2dataset":
        return img2dataset_source(path, options.label, classes)
    if kind == "mds":
        return MdsSource(path, options.image_column, options.label, options.caption, classes)
    if kind == "list":
        return list_source(where, options.root, options.label, classes)
    if kind in ("csv", "tsv"):
        columns = (options.image_column, options.label, options.caption)
        separator, quoted = ("\t", options.quoted) if kind == "tsv" else (",", True)
        return table_source(path, separator, quoted, options.root, *columns, classes)
    if kind == "parquet":
        left = LeftOut()
        files = [path] if path.is_file() else visible_files(path, (".parquet", ".pq"), left)
        if not files:
            raise UserError(f"{path}: holds no .parquet files{', only ' + left.short() if left else ''}")
        columns = (options.image_column, options.label, options.caption)
        source = parquet_source(files, options.root, *columns, classes)
        source.left_out.update(left)
        return source
    if kind == "tars":
        source = tar_source(path, options.label, classes, bool(options.members))
        if path.is_dir() and manifests.is_shard_set(path):
            _count_beside_set(path, source.left_out)
        return source
    return zip_source(path, options.label, classes)


def _modal(kind: str, path: Path, options: SourceOptions, classes: tuple[str, ...] | None) -> Source:
    """Open a source of samples of several members. Raises UserError for a kind of source that has none."""
    if kind == "folder" and not (options.audio_column or options.video_column or options.fields):
        return member_folder(path, options.members, _folder_label(options.label), classes)
    if kind not in ("csv", "tsv") or options.members:
        raise UserError(
            f"{path}: taken for {kind}; --members reads a folder (--from folder) or tars, and --audio-column, --video-column and "
            "--fields read a CSV or TSV table"
        )
    named = {
        "image": options.image_column,
        "audio": options.audio_column,
        "video": options.video_column,
        "label": options.label,
        "caption": options.caption,
    }
    separator, quoted = ("\t", options.quoted) if kind == "tsv" else (",", True)
    return member_table(path, separator, quoted, options.root, named, options.fields, classes)


def _count_beside_set(folder: Path, left: LeftOut) -> None:
    """Count, in `left`, the files in a shard set's folder that do not belong to the set."""
    shards = [shard.name for shard in manifests.load(folder).shards]
    own = {*SET_FILES, *shards, *(Path(name).with_suffix(".index.jsonl").name for name in shards)}
    count_beside(folder, left, BESIDE_ARCHIVES, own)


def _folder_label(label: str | None) -> str | None:
    if label not in (None, "none", "parent"):
        raise UserError(
            f"--label {label}: for a folder of images it can be 'parent' (the folder that holds the image is the class) or "
            "'none'; without --label the class is the first-level subfolder"
        )
    return label


def _kind(where: str, options: SourceOptions) -> tuple[str, str]:
    """Return the kind of a source, and a line for the user about other kinds that it could be taken for, or ""."""
    path = Path(where)
    if where == "-":
        return "list", ""
    if path.is_file():
        if path.name.lower().endswith(COMPRESSED_TARS):
            raise UserError(f"{path}: a compressed tar cannot be read in random order; decompress it first")
        if path.suffix.lower() not in BY_SUFFIX:
            if is_image(path.name):
                list_images(path)  # a file, not a folder
            raise UserError(
                f"{path}: not a readable kind of source; save a table as CSV (UTF-8), or give a folder, list, .tsv, "
                ".parquet, .tar or .zip"
            )
        return BY_SUFFIX[path.suffix.lower()], ""
    if not path.is_dir():
        return "folder", ""
    entries = [p for p in path.iterdir() if not p.name.startswith(".")]
    squeezed = any(p.name.lower().endswith(COMPRESSED_TARS) for p in entries)
    if squeezed and not any(p.is_dir() or is_image(p.name) for p in entries):
        return "tars", ""  # tar_source raises UserError about compressed tars
    meant = options.image_column or options.caption or options.label not in (None, "none", "parent")
    return folder_kind(path, bool(meant))
