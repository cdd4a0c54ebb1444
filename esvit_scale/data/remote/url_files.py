"""Image files that a list or table names by URL: each is read from its store when a sample needs it."""

import errno
import os
import threading
from pathlib import Path

from esvit_scale import store_urls
from esvit_scale.data.remote import place
from esvit_scale.data.remote.store import Denied, Missing, Store

MOST_STORES = 32  # whose connections a process keeps open

_stores: dict[str, Store] = {}
_inherited: list[dict[str, Store]] = []  # of a parent process: never collected, which would close its connections
_of_process = 0
_lock = threading.Lock()


def read(url: str) -> bytes:
    """Return the bytes of the file at a URL.

    Raises:
        OSError: it is not there, or access is denied.
        StoreUnreachable: the store does not answer.
    """
    base, name = _parts(url)
    try:
        return _store(base).read(name, at_start=True)
    except Missing:
        raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
    except Denied:
        raise PermissionError(errno.EACCES, "access denied", url) from None


def _parts(url: str) -> tuple[str, str]:
    """Return the URL of a bucket or host, and the name of the object in it."""
    protocol, _, rest = url.partition("://")
    bucket, _, name = rest.partition("/")
    if store_urls.protocol(url) in ("file", "hf"):  # an absolute path; datasets/user/name
        bucket, _, name = rest.rpartition("/")
    return f"{protocol}://{bucket}", name


def _store(base: str) -> Store:
    """Return this process's store for a bucket or host; those that its parent made do not survive a fork."""
    global _of_process
    with _lock:
        if _of_process != os.getpid():
            _inherited.append(dict(_stores))
            _stores.clear()
            _of_process = os.getpid()
        if base not in _stores:
            if len(_stores) >= MOST_STORES:
                del _stores[next(iter(_stores))]  # not closed: another thread may be reading from it
            folder = place.cache_folder(None)
            Path(folder).mkdir(parents=True, exist_ok=True)
            _stores[base] = Store(base, {}, folder)
        return _stores[base]
