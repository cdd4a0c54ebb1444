"""Sources of images in a store: their archives and tables are fetched to this machine, each once, and read as local ones.

So a source in a bucket gives the same set, byte for byte, as a local copy of it. A copy is kept until the set is written,
so that an interrupted run continues. Image files that a list names by URL are not fetched before: url_files.py.
"""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import webdataset as wds

from esvit_scale import files, store_urls
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import MANIFEST, index_path
from esvit_scale.data.remote import place
from esvit_scale.data.remote.shard_cache import REPLACED
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.progress import Progress

READ = (".tar", ".zip", ".parquet", ".pq", ".csv", ".tsv", ".txt", ".lst", ".list", ".mds")
BESIDE = ("index.json", "_stats.json")  # files that say something about archives
ATTEMPTS = 3  # of a file that changes while it is fetched
THREADS = 8
SPARE = 1 << 30  # bytes that must stay free on the disk
DEEPEST = 64  # folders below each other in a source

_in_use: dict[Path, int] = {}  # handles with this process's locks on what it has fetched


def fetch(url: str, work_dir: Path | None = None) -> Path:
    """Fetch a source from a store, as far as it is not here yet; return its file or folder on this machine.

    Args:
        url: of an archive, table, list or MDS file, tars with braces, a shard set, or a folder of such files.
        work_dir: folder in which it is kept; None: the cache's default folder.

    Raises:
        UserError: there is no such source, access is denied, or the disk has too little room.
        RestartCanHelp: a file kept changing; StoreUnreachable: the store does not answer.
    """
    if problem := store_urls.secret_in_url(url):
        raise UserError(f"{url.partition('://')[0]}://…: {problem}")
    folder, names = _parts(url.rstrip("/"))
    here = _kept(url, work_dir)
    if here not in _in_use:
        _in_use[here] = _held(here)
    root = here / (re.sub(r"[^A-Za-z0-9._-]+", "-", folder.rpartition("/")[2]) or "source")
    try:
        with (here / "lock").open("w") as lock, closing(Store(folder, {}, here.parent)) as store:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = _wanted(store, names)
            if not found:
                raise UserError(
                    f"{url}: holds no {', '.join(READ)} files; a folder of single images is read by a list of URLs"
                )
            _fetch_all(store, found, root, here / "versions")
    except Denied as error:
        raise UserError(f"{error}; set {store_urls.credentials(url)}") from None
    except Missing as error:
        raise UserError(str(error)) from None
    return root / names[0] if names and "{" not in url else root


def discard_if_remote(url: str, work_dir: Path | None = None) -> None:
    """Remove what was fetched of a source, unless another run on this machine reads it; a local source stays."""
    if not store_urls.protocol(url):
        return
    here = _kept(url, work_dir)
    handle = _in_use.pop(here, None) or _held(here)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(here, ignore_errors=True)
    except BlockingIOError:
        pass  # the last of the runs removes it
    finally:
        os.close(handle)


def _held(here: Path) -> int:
    """Make the folder of a source, and return a handle with a shared lock, which keeps other runs from removing it."""
    while True:
        here.mkdir(parents=True, exist_ok=True)
        handle = os.open(here / "in-use", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(handle, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), (here / "in-use").stat()):
                return handle
        os.close(handle)  # it was removed meanwhile


def _kept(url: str, work_dir: Path | None) -> Path:
    above = work_dir if work_dir is not None else place.cache_folder(None)
    return above / f".reading-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"


def _parts(url: str) -> tuple[str, list[str]]:
    """Return the URL of a folder, and the names of the files in it that are meant; none: all."""
    if "{" not in url and not url.lower().endswith(READ):
        return url, []
    urls = wds.shardlists.expand_urls(url)
    folders = {one.rpartition("/")[0] for one in urls}
    if len(folders) > 1:
        raise UserError(f"{url}: its tars lie in {len(folders)} folders; give one, or a list of the tars' images")
    return next(iter(folders)), [one.rpartition("/")[2] for one in urls]


def _wanted(store: Store, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return what is known of every file that is to be fetched ("size", "sha256", …), by its path below the folder."""
    if names:
        return {name: store.info(name) for name in names}
    with suppress(Missing):
        return _of_set(store)
    found = dict(_below(store, ""))
    return {name: info for name, info in found.items() if name.lower().endswith((*READ, *BESIDE))}


def _below(store: Store, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, info) of the files below a folder; UserError: deeper than any real source, as in a folder that lists itself."""
    if folder.count("/") > DEEPEST:
        raise UserError(f"{store.url}: more than {DEEPEST} folders below each other ({folder[:60]}…)")
    for name, info in sorted(store.infos(folder).items()):
        path = f"{folder}/{name}" if folder else name
        if name.startswith("."):
            continue
        if info.get("type") == "directory":
            yield from _below(store, path)
        else:
            yield path, info


def _of_set(store: Store) -> dict[str, dict[str, Any]]:
    """Return the files of a shard set as its manifest lists them, which needs no listing of the folder; Missing: no set."""
    wanted: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        files.write_bytes(Path(folder) / MANIFEST, store.read(MANIFEST, at_start=True))
        try:
            shards = manifests.load(Path(folder)).shards
        except UserError as error:
            raise UserError(str(error).replace(folder, store.url)) from None
    for shard in shards:
        if shard.index_sha256:
            wanted[index_path(Path(shard.name)).name] = {"sha256": shard.index_sha256}
        wanted[shard.name] = {"size": shard.bytes, "sha256": shard.sha256}
    return wanted | {MANIFEST: store.info(MANIFEST)}


def _fetch_all(store: Store, found: Mapping[str, dict[str, Any]], root: Path, versions: Path) -> None:
    missing = {name: info for name, info in found.items() if not _is_here(name, info, root, versions)}
    need = sum(int(info.get("size") or 0) for info in missing.values())
    root.mkdir(exist_ok=True)
    free = shutil.disk_usage(root).free
    if need > free - SPARE:
        raise UserError(
            f"{store.url}: its {len(missing)} files need {need / 1e9:.1f} GB on this machine while the set is written, and "
            f"{root.parent.parent} has {free / 1e9:.1f} GB: name a larger disk with --work-dir (or TMPDIR)"
        )
    with ThreadPoolExecutor(THREADS) as pool, Progress(len(missing), "files fetched") as shown:
        jobs = [pool.submit(_fetch_one, store, name, info, root, versions) for name, info in missing.items()]
        try:
            for number, job in enumerate(as_completed(jobs), 1):
                job.result()
                shown.to(number)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _version(info: Mapping[str, Any]) -> str:
    keys = ("sha256", "ETag", "etag", "mtime")
    return f"{info.get('size')} {next((info[key] for key in keys if info.get(key)), '')}"


def _recorded(name: str, versions: Path) -> Path:
    return versions / hashlib.sha256(name.encode()).hexdigest()[:32]


def _is_here(name: str, info: Mapping[str, Any], root: Path, versions: Path) -> bool:
    with suppress(OSError):
        return (root / name).is_file() and _recorded(name, versions).read_text() == _version(info)
    return False


def _fetch_one(store: Store, name: str, info: Mapping[str, Any], root: Path, versions: Path) -> None:
    """Fetch a file that has the manifest's sha256, or is the same object before and after the transfer, of its length."""
    if "sha256" not in info and info.get("size") is None:  # listed by a web server
        info = store.info(name)
    for _ in range(ATTEMPTS):
        with files.replacing(root / name) as tmp:
            store.fetch(name, tmp, urgent=True)
            size = tmp.stat().st_size
            if "sha256" in info:
                after, whole = info, files.sha256(tmp) == info["sha256"]
            else:
                after = store.info(name)
                whole = after.get("size") in (None, size) and _version(after) == _version(info)
        if whole:
            versions.mkdir(exist_ok=True)
            files.write_text(_recorded(name, versions), _version(info))
            return
        info = after
    if "sha256" in info:
        raise UserError(f"{store_urls.join(store.url, name)}: its sha256 differs from the manifest's: {REPLACED}")
    raise RestartCanHelp(
        f"{store_urls.join(store.url, name)}: changed during {ATTEMPTS} transfers; run the command again"
    )
