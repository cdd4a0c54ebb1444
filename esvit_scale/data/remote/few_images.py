"""The images of a few samples of a shard set, without the rest of it: for pictures, not for training.

Of a remote set, shards outside the cache stay there. Their indexes are fetched, and from the tars only the bytes of the
images. No checksum covers these.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

from esvit_scale import store_urls
from esvit_scale.data import manifest as manifests
from esvit_scale.data.manifest import Index, Manifest
from esvit_scale.data.remote.shard_cache import ShardFiles
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.data.shard_table import Shard
from esvit_scale.errors import UserError

THREADS = 8


def encoded_images(manifest: Manifest, keys: set[str]) -> dict[str, bytes]:
    """Return the image files of the samples with these keys, as far as the set has them.

    Raises:
        UserError: the store denies access, or an object is missing or damaged.
        StoreUnreachable: the store does not answer.
    """
    found: dict[str, bytes] = {}
    without_index = list(range(len(manifest.shards)))
    if manifest.remote is not None:
        without_index = _collect_from_store(manifest, keys, found)
    shards = ShardFiles(manifest)
    for number in without_index:
        if len(found) == len(keys):
            break
        path, _ = shards.path(number)
        found |= _chosen(manifests.read_index(path), keys, partial(_read, path))
    return found


def _collect_from_store(manifest: Manifest, keys: set[str], found: dict[str, bytes]) -> list[int]:
    """Add images of a remote set to `found` until all are there; return the numbers of the shards without an index."""
    assert manifest.remote is not None
    url, options, _ = manifest.remote
    without_index = []
    with closing(Store(url, options, manifest.root.parent)) as store, ThreadPoolExecutor(THREADS) as pool:
        jobs = [pool.submit(_images_of_shard, manifest.root, shard, keys, store) for shard in manifest.shards]
        try:
            for number, job in enumerate(jobs):
                if (images := job.result()) is None:
                    without_index.append(number)
                else:
                    found |= images
                if len(found) == len(keys):
                    break
        except Denied as error:
            raise UserError(f"{error}; set {store_urls.credentials(url)}") from None
        except Missing as error:
            raise UserError(f"{error}; the manifest lists it: upload the shard again") from None
        finally:
            pool.shutdown(cancel_futures=True)
    return without_index


def _images_of_shard(root: Path, shard: Shard, keys: set[str], store: Store) -> dict[str, bytes] | None:
    """Return the chosen images of a shard, from the cache or the store; None if it is in neither with an index."""
    path = root / shard.name
    if path.is_file() and path.stat().st_size == shard.bytes:
        return _chosen(manifests.read_index(path), keys, partial(_read, path))
    try:
        index = manifests.parse_index(store.read(manifests.index_path(path).name, at_start=True), shard.name)
    except (Missing, ValueError):
        return None
    return _chosen(index, keys, partial(_read_object, store, shard.name))


def _chosen(index: Index, keys: set[str], read: Callable[[int, int], bytes]) -> dict[str, bytes]:
    places = {entry.key: manifests.image_member(entry) for entry in index if entry.key in keys}
    return {key: read(*place) for key, place in places.items() if place}


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as tar:
        tar.seek(offset)
        return tar.read(size)


def _read_object(store: Store, name: str, offset: int, size: int) -> bytes:
    data = store.read(name, at_start=True, start=offset, stop=offset + size)
    if len(data) > size:  # a web server that does not know ranges sends the whole file
        data = data[offset : offset + size]
    if len(data) != size:
        raise UserError(f"{store_urls.join(store.url, name)}: {len(data)} bytes came of an image of {size}")
    return data
