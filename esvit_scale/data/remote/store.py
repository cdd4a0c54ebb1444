"""Access to the objects of one shard set in a store, through fsspec: every request is bounded, paced and retried.

The libraries below retry each in its own way, hand out fragments of a broken transfer, and some replace an object's tail
by that of another version. So an object is written to a temporary file, and shard_cache.py compares it with the
manifest before it gets its name.
"""

import asyncio
import copy
import errno
import fcntl
import importlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from esvit_scale import store_urls
from esvit_scale.data.remote.locks import ByteLocks, open_own
from esvit_scale.errors import RestartCanHelp, UserError, nearest

T = TypeVar("T")

log = logging.getLogger("esvit_scale")

CONNECTIONS = 16  # transfers at a time on a node
RESERVED = 4  # of these, kept free for shards that a process waits for
REQUESTS_PER_SECOND = 100  # at most, on a node
BUDGET_S = 300.0  # seconds of waiting between attempts, after which a request that keeps failing ends the job
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 30.0  # seconds between two attempts
INSTALL = {  # protocol → what to install for it
    "s3": "'esvit-scale[s3]'",
    "gs": "gcsfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
}
# Our own retries take the place of the libraries', which multiply (25 requests for one of s3fs) and ignore Retry-After.
DEFAULTS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60},
        "max_concurrency": 1,  # connections of one transfer
    },
}
# Listings are not cached: another process may have replaced what they say. Nor are file systems: a fork would inherit
# their connections.
UNCACHED = {"use_listings_cache": False, "skip_instance_cache": True}
DENIED, MISSING, REFUSED = (401, 403), (404, 410), (405, 501)  # HTTP status; the last: a server cannot do it, ever
LIBRARIES = ("aiohttp", "botocore", "aiobotocore", "s3fs", "gcsfs", "google", "azure", "huggingface_hub", "requests")
MISTAKES = ("ParamValidationError", "InvalidS3AddressingStyleError")  # of a library, about an address or an option
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound")


class StoreUnreachable(RestartCanHelp):
    """Error for a store that did not serve a request within the budget of retries."""


class Denied(Exception):
    """Error for an object that the store refuses to give to these credentials."""


class Missing(Exception):
    """Error for an object that is not there."""


class TooLong(Exception):
    """Error for an object of more bytes than a transfer may write; `size` is its length if the store said it."""

    def __init__(self, size: int | None, most: int) -> None:
        super().__init__(f"{size or f'more than {most}'} bytes came")
        self.size = size


class Store:
    """The objects below one URL. Make one per process: fsspec's file systems do not survive a fork.

    Args:
        url: the folder's address.
        options: what the URL's library takes (data.storage_options), without secrets.
        folder: the cache's folder on this node, whose lock files bound the requests of all processes.
    """

    def __init__(self, url: str, options: Mapping[str, Any], folder: Path) -> None:
        self.url, self._folder = url, folder
        self.requests_per_second = 0.0  # of the node; REQUESTS_PER_SECOND where that is more
        self._fs, self._root = _file_system(url, options)
        self._locks = ByteLocks(folder / ".connections")  # byte i: connection i
        self._mutex, self._closed = threading.Lock(), threading.Event()
        self._in_use: set[int] = set()  # this process's connections, whose locks do not exclude each other

    def close(self) -> None:
        """Close the connections and end the retries; call it before a fork, which would share open connections."""
        self._closed.set()
        session = next((s for name in ("_s3creator", "_session") if (s := getattr(self._fs, name, None))), None)
        if session is not None:
            with suppress(Exception):
                self._fs.close_session(self._fs.loop, session)

    def read(
        self,
        name: str,
        *,
        at_start: bool = False,
        start: int | None = None,
        stop: int | None = None,
        urgent: bool = True,
    ) -> bytes:
        """Return the bytes of a small object, or bytes start..stop-1 of any object.

        Args:
            at_start: whether a run is starting: access that is denied is then an error at once and not retried.
            urgent: whether a process waits for the bytes.

        Raises:
            Denied: the store refuses access, and `at_start` is set.
            Missing, StoreUnreachable: as `fetch`.
        """
        path = f"{self._root}/{name}"
        data: bytes = self._retried(name, lambda: self._fs.cat_file(path, start=start, end=stop), urgent, at_start)
        return data

    def version(self, name: str) -> str:
        """Return a text that changes when an object is replaced (its ETag, or time and size).

        Raises:
            Denied: the store refuses access.
            Missing, StoreUnreachable: as `fetch`.
        """
        found = self.info(name)
        keys = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created", "size")
        return " ".join(str(found[key]) for key in keys if found.get(key) is not None)

    def put(self, path: Path, name: str | None = None) -> None:
        """Upload a file. The libraries send large files in parts that appear together, or not at all.

        Args:
            name: of the object below the store's URL; None: the file's.

        Raises:
            Denied: the store refuses it.
            StoreUnreachable: the store does not take it, after BUDGET_S of retries.
        """
        name = name or path.name
        self._make_folder(name)
        self._retried(name, lambda: self._fs.put_file(str(path), f"{self._root}/{name}"), True, True)

    def write(self, name: str, data: bytes) -> None:
        """Write a small object; the errors are those of `put`."""
        self._make_folder(name)
        self._retried(name, lambda: self._fs.pipe_file(f"{self._root}/{name}", data), True, True)

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects and folders in a folder; the errors are those of `version`."""
        return list(self.infos(folder))

    def infos(self, folder: str) -> dict[str, dict[str, Any]]:
        """Return what the store says of the objects and folders in a folder ("size", …) by name; errors as `version`."""
        path = f"{self._root}/{folder}".rstrip("/") + ("/" if "http" in self._fs.protocol else "")
        found = self._retried(folder, lambda: self._fs.ls(path, detail=True), True, True)
        named = {str(one["name"]).rstrip("/").rpartition("/")[2]: one for one in found}
        return {name: one for name, one in named.items() if name}

    def info(self, name: str) -> dict[str, Any]:
        """Return what the store says of an object ("size", perhaps "ETag", …); the errors are those of `version`."""
        found: dict[str, Any] = self._retried(name, lambda: self._fs.info(f"{self._root}/{name}"), True, True)
        return found

    def remove(self, name: str) -> None:
        """Remove an object, or a folder and all in it; the errors are those of `version`."""
        self._retried(name, lambda: self._fs.rm(f"{self._root}/{name}", recursive=True), True, True)

    def _make_folder(self, name: str) -> None:
        if "file" in self._fs.protocol:  # object stores have no folders
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)

    def holds(self, name: str, size: int) -> bool:
        """Return whether there is an object of this name with `size` bytes.

        Raises:
            Denied, StoreUnreachable: as `version`.
        """
        try:
            return bool(self.info(name).get("size") == size)
        except Missing:
            return False

    def fetch(self, name: str, target: Path, *, urgent: bool, most: int | None = None) -> None:
        """Write an object to the file `target`. The caller must compare what arrived, which may be a fragment.

        Args:
            urgent: whether a process waits for the object; transfers ahead of need leave some connections free.
            most: bytes; a longer object ends the transfer after the piece that exceeds them (64 KiB of s3, 5 MiB of http),
                or after the first one if the store says its length.

        Raises:
            TooLong: the object is longer than `most`.
            Missing: the object is not there.
            UserError: the library does not take the address or an option.
            StoreUnreachable: the store does not serve it, after BUDGET_S of retries.
        """
        path = f"{self._root}/{name}"
        self._retried(name, lambda: self._fs.get_file(path, str(target), callback=_bounded_by(most)), urgent, False)

    def _retried(self, name: str, request: Callable[[], T], urgent: bool, at_start: bool) -> T:
        """Return the result of a request, which is repeated for up to BUDGET_S while its failure may be temporary.

        Args:
            urgent: whether a process waits for the result.
            at_start: raise Denied at once. Later, access may be denied because a credential has expired and will be
                renewed, so the request is repeated.
        """
        url, waited, attempt = store_urls.join(self.url, name), 0.0, 0
        while True:
            try:
                with self._connection(urgent):
                    return request()
            except Exception as error:
                kind = _kind(error)
                if kind is Missing:
                    raise Missing(f"{url}: no such object") from None
                if kind is Denied and at_start:
                    raise Denied(f"{url}: access denied ({_words(error)})") from None
                if kind is UserError:
                    raise UserError(f"{url}: {_words(error)}; correct the address or data.storage_options") from None
                if kind is None:
                    raise
                delay = max(_delay(attempt), _retry_after(error))
                attempt, waited = attempt + 1, waited + delay
                if waited > BUDGET_S or self._closed.is_set():
                    raise StoreUnreachable(
                        f"{url}: {_words(error)}, after {attempt} attempts; nothing that was saved is lost; the same "
                        "command continues when the store answers"
                    ) from None
                log.log(
                    logging.WARNING if attempt > 2 else logging.DEBUG,
                    "%s: %s; trying again in %.1f s (attempt %d)",
                    *(url, _words(error), delay, attempt + 1),
                )
                self._closed.wait(delay)

    @contextmanager
    def _connection(self, urgent: bool) -> Iterator[None]:
        """Hold one of the node's connections during the block, which starts when the node's request rate allows it."""
        while (number := self._free_connection(CONNECTIONS if urgent else CONNECTIONS - RESERVED)) is None:
            time.sleep(0.01)
        try:
            _pace(self._folder / ".pace", max(self.requests_per_second, REQUESTS_PER_SECOND))
            yield
        finally:
            with self._mutex:
                self._in_use.discard(number)
                self._locks.unlock(number)

    def _free_connection(self, count: int) -> int | None:
        with self._mutex:
            for number in random.sample(range(count), count):
                if number not in self._in_use and self._locks.try_exclusive(number):
                    self._in_use.add(number)
                    return number
        return None


def _bounded_by(most: int | None) -> Any:
    """Return an fsspec callback that raises TooLong in a transfer of more than `most` bytes."""

    def check(size: int | None, value: int, **_: Any) -> None:
        if most is not None and value and max(size or 0, value) > most:
            raise TooLong(size, most)

    return importlib.import_module("fsspec.callbacks").Callback(hooks={"bound": check})


def _pace(path: Path, rate: float) -> None:
    """Wait for this request's turn: the file holds the time at which the node's next request may start.

    Args:
        rate: requests per second.
    """
    handle = open_own(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        now = time.time()
        with suppress(ValueError):
            turn = float(os.pread(handle, 32, 0) or b"0")
            now = turn if now < turn < now + 60 else now  # a clock that was set back does not stop the node
        os.pwrite(handle, b"%-31.6f\n" % (now + 1 / rate), 0)
    finally:
        os.close(handle)
    time.sleep(max(now - time.time(), 0))


def _file_system(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the fsspec file system of a URL and the folder's path in it.

    Raises:
        UserError: its library is not installed, or does not take the options.
    """
    kind = store_urls.protocol(url)
    install = f"pip install {INSTALL[kind]}" if kind in INSTALL else "install the library that fsspec names"
    try:
        url_to_fs = importlib.import_module("fsspec.core").url_to_fs
        fs, root = url_to_fs(url, **_joined_options(kind, options))
    except ImportError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}; {install}") from None
    except (TypeError, ValueError) as error:
        if "Protocol not known" in str(error):
            near = nearest(url.partition("://")[0], (*store_urls.WHERE, *store_urls.SAME_AS))
            raise UserError(f"{url}: no library knows this protocol{near}") from None
        raise UserError(f"{url}: data.storage_options: {' '.join(str(error).split())}") from None
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs, str(root).rstrip("/")


def _joined_options(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a protocol's library: ours, then those that fsspec takes from the environment, then those given.

    Later ones win. Options that are mappings are joined key by key: otherwise the user's `config_kwargs` would remove our
    time-outs, and our defaults the headers in FSSPEC_HTTPS. All is copied, because botocore writes into the options that it
    is given.
    """
    of_environment = importlib.import_module("fsspec.config").conf
    names = (kind, *(alias for alias, usual in store_urls.SAME_AS.items() if usual == kind))
    joined: dict[str, Any] = {}
    for part in (UNCACHED, _defaults(kind), *(of_environment.get(name, {}) for name in names), given):
        for key, value in part.items():
            before = joined.get(key)
            if isinstance(before, Mapping) and isinstance(value, Mapping):
                value = {**before, **value}
            joined[key] = copy.deepcopy(value)
    return joined


def _defaults(kind: str) -> Mapping[str, Any]:
    if kind == "https":
        with suppress(ImportError):
            aiohttp = importlib.import_module("aiohttp")
            # Its own time-out, 5 minutes for all of a transfer, would end every transfer of a large shard.
            return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)}}
    return DEFAULTS.get(kind, {})


def _kind(error: BaseException) -> type[Exception] | None:
    """Return the class of a library's error.

    Missing, Denied, UserError (an option or the address), StoreUnreachable (may be temporary), or None: none of them.
    """
    statuses = {status for each in _chain(error) if (status := _status(each)) is not None}
    if statuses & set(MISSING) or isinstance(error, FileNotFoundError):
        return Missing
    if statuses & set(DENIED) or isinstance(error, PermissionError) or type(error).__name__ in NO_CREDENTIALS:
        return Denied
    if statuses & set(REFUSED):
        return UserError
    if isinstance(error, OSError | asyncio.TimeoutError | TimeoutError):
        return None if _is_local(error) else StoreUnreachable
    # Some libraries look at options and addresses only when they make the first request.
    if isinstance(error, TypeError | ValueError | NotImplementedError) or type(error).__name__ in MISTAKES:
        return UserError
    return StoreUnreachable if type(error).__module__.partition(".")[0] in LIBRARIES else None


def _is_local(error: BaseException) -> bool:
    """Return whether an OSError is about a file of this machine, such as a full disk, rather than about the store."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of a library carries, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = next((getattr(error, n) for n in ("status", "status_code", "code") if hasattr(error, n)), None)
    return found if isinstance(found, int) else None


def _retry_after(error: BaseException) -> float:
    """Return the seconds that the server asked to wait (Retry-After), at most a minute; 0 if it did not."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        headers = getattr(each, "headers", None) or getattr(response, "headers", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        for name in ("Retry-After", "retry-after"):
            with suppress(TypeError, ValueError, AttributeError):
                return min(max(float(headers.get(name)), 0.0), 60.0)  # type: ignore[union-attr]
    return 0.0


def _delay(attempt: int) -> float:
    """Return the seconds to wait after failed attempt `attempt` (from 0): doubling, and randomised by up to a half so that
    processes do not all return at the same time."""
    return min(FIRST_DELAY_S * 2**attempt, LONGEST_DELAY_S) * random.uniform(0.5, 1.0)


def _words(error: BaseException) -> str:
    status = next((s for each in _chain(error) if (s := _status(each)) is not None), None)
    text = " ".join(str(error).split())[:160] or type(error).__name__
    return f"HTTP {status}: {text}" if status and str(status) not in text else text
