"""Opening of a shard set by its URL: its manifest is fetched into the set's folder in the cache.

That folder holds what a set's folder holds, as far as it has been fetched, and a file that says where the rest is. So a
path to it can be given to whatever reads shard sets. A set that is written again under its URL gets another folder.
"""

import getpass
import hashlib
import json
import os
import re
import stat
import tempfile
from contextlib import closing, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from esvit_scale import files, store_urls
from esvit_scale.config import Data
from esvit_scale.data.manifest import MANIFEST, REMOTE, Manifest, Remote, load
from esvit_scale.data.remote.room import Room, make_folder
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.errors import UserError

MANIFESTS = ".manifests"  # the newest manifest of every set, by its URL, with the version of its object
GB = 10**9


def open_set(place: str, data: Data | None = None) -> Manifest:
    """Read the manifest of the set that a path or URL names; of a URL, it is fetched if it is not in the cache yet.

    Raises:
        UserError: there is no set, or the store denies access.
        StoreUnreachable: the store does not answer.
    """
    return load(local_folder(place, data))


def local_folder(place: str, data: Data | None = None) -> Path:
    """Return the folder of a set: the path itself, or, for a URL, the set's folder in the cache.

    Args:
        data: the keys of the config that say where the cache is, how large, and what the URL's library takes; None:
            their defaults.

    Raises:
        UserError, StoreUnreachable: as `open_set`.
    """
    if not store_urls.is_set_url(place):
        return Path(place)
    if problem := store_urls.secret_in_url(place):
        raise UserError(f"{place.partition('://')[0]}://…: {problem}")
    data = data or Data()
    limit = None if data.cache_gb is None else int(data.cache_gb * GB)
    return _attached(
        place.rstrip("/"), str(cache_folder(data.cache_dir)), limit, json.dumps(data.storage_options or {})
    )


def of_node(manifest: Manifest, cache_dir: str | None) -> Manifest:
    """Return a manifest whose `root` is the set's folder on this node: variables in `cache_dir` differ between nodes.

    A manifest of a local set is returned unchanged.
    """
    if manifest.remote is None:
        return manifest
    return replace(manifest, root=cache_folder(cache_dir) / manifest.root.name)


def cache_folder(cache_dir: str | None) -> Path:
    """Return the cache's folder on this node.

    Raises:
        UserError: a variable in its name is not set on this node, or the default folder is not the user's alone.
    """
    if cache_dir is None:
        return _private_folder()
    path = os.path.expandvars(cache_dir)
    if unset := re.search(r"\$\w+|\$\{\w+\}", path):
        raise UserError(f"data.cache_dir: {cache_dir}: {unset[0]} is not set on this node")
    return Path(path).expanduser().absolute()


def _private_folder() -> Path:
    """Return the user's own folder in the folder for temporary files, which all users share; create it if needed.

    Raises:
        UserError: the folder is not the user's alone, or cannot be made.
    """
    folder = Path(tempfile.gettempdir()) / f"esvit-scale-{_user()}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UserError(
                f"data.cache_dir: the default, {folder}, is not a folder that only you may write: remove it, or name a "
                "folder of yours"
            )
        if status.st_mode & 0o077:  # made by an earlier version; private data sets are nobody else's to read
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: the default, {folder}: {error.strerror or error}; name another folder"
        ) from None
    return folder


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


@lru_cache  # one look at the store per process and set
def _attached(url: str, cache: str, limit: int | None, options: str) -> Path:
    try:
        make_folder(Path(cache) / MANIFESTS)
        with closing(Store(url, json.loads(options), Path(cache))) as store:
            manifest = _manifest_bytes(url, Path(cache) / MANIFESTS, store)
        folder = Path(cache) / _folder_name(url, manifest)
        make_folder(folder)
        files.write_bytes(folder / MANIFEST, manifest)
        recorded = Remote(url, json.loads(options), limit)._asdict() | {"folder": os.path.realpath(folder)}
        files.write_json(folder / REMOTE, recorded)
        Room(Path(cache), limit).forget()  # the manifests count, too
    except Missing:
        raise UserError(
            f"{url}: not a finished shard set (no {MANIFEST}); write a set with `esvit-scale shards create SRC DST` and "
            f"upload its folder, {MANIFEST} last"
        ) from None
    except Denied as error:
        raise UserError(f"{error}; set {store_urls.credentials(url)}") from None
    except OSError as error:
        raise UserError(f"data.cache_dir: {cache}: {error.strerror or error}") from None
    return folder


def _manifest_bytes(url: str, folder: Path, store: Store) -> bytes:
    """Return the bytes of a set's manifest; fetch them only if the store has another version than `folder`."""
    # One file, replaced in one step: the ranks of a node open a set at the same time.
    cached = folder / hashlib.sha256(url.encode()).hexdigest()[:16]  # the version in the first line, then the manifest
    version = " ".join(store.version(MANIFEST).split()).encode()
    with suppress(FileNotFoundError):
        recorded, _, content = cached.read_bytes().partition(b"\n")
        if recorded == version:
            return content
    content = store.read(MANIFEST, at_start=True)
    files.write_bytes(cached, version + b"\n" + content)
    return content


def _folder_name(url: str, manifest: bytes) -> str:
    """Return the name of a set's folder in the cache: readable, and different for another URL or another manifest."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2])[:60] or "set"
    return f"{last}-{hashlib.sha256(url.encode() + manifest).hexdigest()[:16]}"
