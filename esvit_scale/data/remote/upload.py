"""Upload of a finished shard set to a store: shards and indexes first, the manifest last.

So nothing in the store looks like a set until all of it is there. What was uploaded is recorded beside the set with the
version that the store gave it, so that an interrupted upload continues.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from esvit_scale import files, store_urls
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import MANIFEST, Manifest, Shard, index_path
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.progress import Progress

THREADS = 8


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
    record = root / f".uploaded-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}.json"
    sent: dict[str, str] = json.loads(record.read_bytes()) if record.is_file() else {}
    try:
        with TemporaryDirectory() as locks, closing(Store(url.rstrip("/"), {}, Path(locks))) as store:
            number = _send_shards(manifest, store, sent, record)
            store.put(root / MANIFEST)
    except Denied as error:
        place = store_urls.WHERE.get(store_urls.protocol(url), "its credentials")
        raise UserError(f"{error}; set {place}") from None
    except Missing:
        raise UserError(f"{url}: there is no such bucket or folder; make it first") from None
    return number


def _send_shards(manifest: Manifest, store: Store, sent: dict[str, str], record: Path) -> int:
    """Send the shards that are not recorded in `sent` as the store has them; return their number."""
    number = 0
    with ThreadPoolExecutor(THREADS) as pool, Progress(len(manifest.shards), "shards uploaded") as shown:
        jobs = {
            pool.submit(_send, manifest.root, shard, store, sent.get(shard.name)): shard for shard in manifest.shards
        }
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                version, was_sent = job.result()
                number += was_sent
                sent[jobs[job].name] = version
                files.write_json(record, sent)
                shown.to(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return number


def _send(root: Path, shard: Shard, store: Store, recorded: str | None) -> tuple[str, bool]:
    """Send a shard and its index; return the record of what the store now has, and whether anything was sent."""
    if recorded is not None:
        try:
            if recorded == f"{shard.sha256} {store.version(shard.name)}":
                return recorded, False
        except Missing:
            pass
    path = root / shard.name
    if files.sha256(path) != shard.sha256:
        raise UserError(f"{path}: its sha256 differs from the manifest's; run `esvit-scale shards verify {root}`")
    if index_path(path).is_file():
        store.put(index_path(path))
    store.put(path)
    if not store.holds(shard.name, shard.bytes):
        raise RestartCanHelp(f"{store_urls.join(store.url, shard.name)}: not there after its upload; upload again")
    return f"{shard.sha256} {store.version(shard.name)}", True
