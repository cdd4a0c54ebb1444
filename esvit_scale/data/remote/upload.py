"""Upload of a finished shard set to a store: shards and indexes first, the manifest last.

So nothing in the store looks like a set until all of it is there. What was uploaded is recorded beside the set, a line for
each shard with the version that the store gave it, so that an interrupted upload continues.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from esvit_scale import files, store_urls
from esvit_scale.data import checksums
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import MANIFEST, Manifest, index_path
from esvit_scale.data.remote import place
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.data.shard_table import Shard
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.progress import Progress

THREADS = 8
ATTEMPTS = 3  # uploads of a file whose bytes did not arrive as they were sent
PART = 50 << 20  # bytes of the parts in which s3fs sends files of more than two


def upload(root: Path, url: str) -> int:
    """Upload the set in a folder to a URL, without what an earlier upload has sent; return the number of shards sent.

    Raises:
        UserError: `root` is no undamaged set, or the store denies access.
        RestartCanHelp: a shard changed during the upload.
        StoreUnreachable: the store does not answer.
    """
    if problem := store_urls.secret_in_url(url):
        raise UserError(f"{url.partition('://')[0]}://…: {problem}")
    manifest = manifests.load(root)
    manifests.check_sizes(manifest)
    record = _record_path(root, url.rstrip("/"))
    try:
        with TemporaryDirectory() as locks, closing(Store(url.rstrip("/"), {}, Path(locks))) as store:
            number = _send_shards(manifest, store, record)
            store.put(root / MANIFEST)
    except Denied as error:
        raise UserError(f"{error}; set {store_urls.credentials(url)}") from None
    except Missing:
        raise UserError(f"{url}: there is no such bucket or folder; make it first") from None
    return number


def _record_path(root: Path, url: str) -> Path:
    """Return the file that records an upload: beside the set, or in the cache's default folder where that is read-only."""
    if os.access(root, os.W_OK):
        return root / f".uploaded-{_digest(url)}.jsonl"
    folder = place.cache_folder(None)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f".uploaded-{_digest(f'{root.resolve()} {url}')}.jsonl"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_record(record: Path) -> dict[str, str]:
    """Return what was sent, by the shards' names; a line that an interruption cut short is left out."""
    sent = {}
    for line in record.read_text().splitlines() if record.is_file() else ():
        with suppress(ValueError):
            name, version = json.loads(line)
            sent[name] = version
    return sent


def _send_shards(manifest: Manifest, store: Store, record: Path) -> int:
    """Send the shards that are not recorded as the store has them; return their number."""
    number, sent = 0, _read_record(record)
    with (
        ThreadPoolExecutor(THREADS) as pool,
        Progress(len(manifest.shards), "shards uploaded") as shown,
        record.open("a", buffering=1) as lines,
    ):
        lines.write("\n")  # ends a line that was cut short
        jobs = {
            pool.submit(_send, manifest.root, shard, store, sent.get(shard.name)): shard for shard in manifest.shards
        }
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                version, was_sent = job.result()
                if was_sent:
                    number += 1
                    lines.write(json.dumps([jobs[job].name, version]) + "\n")
                shown.to(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return number


def _send(root: Path, shard: Shard, store: Store, recorded: str | None) -> tuple[str, bool]:
    """Send a shard and its index; return the record of what the store now has, and whether anything was sent."""
    path, has_tar = root / shard.name, False
    content = f"{shard.sha256} {shard.index_sha256}".strip()
    if recorded is not None:
        try:
            version = store.version(shard.name)
            if recorded == f"{content} {version}":
                return recorded, False
            has_tar = recorded == f"{shard.sha256} {version}"  # sent before `shards index` wrote its index anew
        except Missing:
            pass
    if files.sha256(path) != shard.sha256:
        raise UserError(f"{path}: its sha256 differs from the manifest's; run `esvit-scale shards verify {root}`")
    if shard.index_sha256 and not checksums.has_index(root, shard):
        raise UserError(
            f"{index_path(path)}: missing, or not what the manifest says; run `esvit-scale shards index {root}`"
        )
    if index_path(path).is_file():
        store.put(index_path(path))
    if not has_tar:
        send_verified(store, path, shard.sha256)
    return f"{content} {store.version(shard.name)}", True


def send_verified(store: Store, path: Path, sha256: str) -> None:
    """Upload a file, and compare what the store then has with its sha256.

    An ETag that is the MD5 of the file, or of the MD5s of its parts, says so. Any other (of encrypted objects, or of other
    stores) says nothing, so the object is read back.

    Raises:
        RestartCanHelp: it arrived damaged ATTEMPTS times.
        Denied, Missing, StoreUnreachable: as `Store.put`.
    """
    for _ in range(ATTEMPTS):
        store.put(path)
        with suppress(Missing):
            found = store.info(path.name)
            if found.get("size") == path.stat().st_size and (
                _etag_fits(found, path) or _read_back(store, path) == sha256
            ):
                return
    raise RestartCanHelp(
        f"{store_urls.join(store.url, path.name)}: not as it was sent, {ATTEMPTS} times; run the same command again"
    )


def _etag_fits(found: Mapping[str, Any], path: Path) -> bool:
    """Return whether an object's ETag shows that its bytes are those of the file."""
    whole, _, parts = str(found.get("ETag", "")).strip('"').partition("-")
    if not re.fullmatch("[0-9a-f]{32}", whole):
        return False
    if not parts:
        return _md5_of_pieces(path)[0] == whole
    return parts == str(-(-path.stat().st_size // PART)) and _md5_of_pieces(path)[1] == whole


def _md5_of_pieces(path: Path) -> tuple[str, str]:
    """Return the MD5 of a file, and that of the MD5s of its parts of PART bytes."""
    whole, parts = _md5(), _md5()
    with path.open("rb") as file:
        while piece := file.read(PART):
            whole.update(piece)
            parts.update(_md5(piece).digest())
    return whole.hexdigest(), parts.hexdigest()


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _read_back(store: Store, path: Path) -> str:
    """Return the sha256 of the object with a file's name, of which there is a copy beside the file meanwhile."""
    with TemporaryDirectory(dir=path.parent if os.access(path.parent, os.W_OK) else None) as folder:
        copy = Path(folder) / path.name
        store.fetch(path.name, copy, urgent=True)
        return files.sha256(copy)
