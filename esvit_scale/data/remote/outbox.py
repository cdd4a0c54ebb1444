"""Writing of a shard set to a store: each shard is sent when it is written, and then removed from this machine.

What is being written lies in the store, below `.partial/` of the set: the plan, and a record of each shard that has
arrived, which is sent after the shard. So any machine can continue, and jobs can write parts of one set. The manifest is
sent last; then `.partial/` is removed.

    a killed run leaves        which the next one
    ------------------------   ------------------------------------------------
    a shard without a record   writes and sends again
    a shard with its record    leaves as it is
    the manifest, `.partial/`  finds finished; it removes `.partial/`
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from esvit_scale import files, store_urls
from esvit_scale.data import manifest as manifests
from esvit_scale.data import set_folder
from esvit_scale.data.hashing import hash64
from esvit_scale.data.manifest import MANIFEST, Manifest, index_path
from esvit_scale.data.planned_shard import Written
from esvit_scale.data.remote import place
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.data.remote.upload import send_verified
from esvit_scale.data.set_folder import PARTIAL, PLAN, QUARANTINE, Intent
from esvit_scale.errors import UserError
from esvit_scale.progress import say

log = logging.getLogger("esvit_scale")

UPLOADS = 4  # shards sent at a time; this machine's disk holds them and the shards that are being written
READERS = 8  # records read at a time


class Outbox:
    """A set in a store while it is written, and the folder on this machine through which its shards go.

    Args:
        url: URL of the set's folder in the store.
        work_dir: folder in which this one is made; None: the cache's default folder.
        fingerprint: identifies the set to be written; None: the set whose plan the store holds.
    """

    def __init__(self, url: str, work_dir: Path | None, fingerprint: str | None) -> None:
        check_writable(url)
        self.url, self._fingerprint = url.rstrip("/"), fingerprint
        self._above = work_dir if work_dir is not None else place.cache_folder(None)
        self.folder = self._above / f".writing-{hash64(f'{self.url} {fingerprint}'):016x}"
        self.partial = self.folder / PARTIAL
        self._store: Store | None = None
        self._pool = ThreadPoolExecutor(UPLOADS)
        self._jobs: set[Future[None]] = set()
        self.has_sent = False  # whether a shard may have arrived

    def settle(self, numbers: Callable[[int], range] = range) -> Manifest | None:
        """Look at what the store holds; return the set's manifest if it is finished.

        Otherwise the records in the folder are afterwards those of the shards that have arrived.

        Args:
            numbers: given how many shards the set has, returns the numbers of those that matter here.

        Raises:
            UserError: the store holds something else there, or denies access.
            StoreUnreachable: the store does not answer.
        """
        with self._clear_errors(), self._looking() as store:
            there = _infos(store, "")
            if MANIFEST in there:
                return self._finished(store, there)
            plan = _read_json(store, f"{PARTIAL}/{PLAN}")
            if plan is None:
                others = sorted(name for name in there if not name.startswith("."))
                if others:
                    raise UserError(
                        f"{self.url}: holds other files ({', '.join(others[:3])}, …); choose an empty or new folder"
                    )
                shutil.rmtree(self.partial, ignore_errors=True)
                return None
            self._compare(plan)
            (self.folder / MANIFEST).unlink(missing_ok=True)
            self.partial.mkdir(parents=True, exist_ok=True)
            files.write_json(self.partial / PLAN, plan)
            self._fetch_records(store, there, numbers(plan["shards"]))
            return None

    def begin(self) -> None:
        """Send the plan that lies in the folder, unless the store has it; so missing permissions show before any work."""
        with self._clear_errors(), self._looking() as store:
            if _read_json(store, f"{PARTIAL}/{PLAN}") is None:
                store.put(self.partial / PLAN, f"{PARTIAL}/{PLAN}")

    def send(self, number: int, written: Written) -> None:
        """Begin to send a shard; wait while UPLOADS others are on their way.

        Raises:
            UserError, StoreUnreachable, RestartCanHelp: this or an earlier shard could not be sent.
        """
        if self._store is None:  # made here, since the processes that write shards were forked before
            self._store = Store(self.url, {}, self._locks())
        self._wait(UPLOADS - 1)
        self.has_sent |= written.shard is not None
        self._jobs.add(self._pool.submit(self._send, self._store, number, written))

    def wait(self) -> None:
        """Wait until every shard has arrived; the errors are those of `send`."""
        self._wait(0)

    def publish(self) -> None:
        """Send the quarantine and the manifest of the finished set, and remove `.partial/`, and the folder here.

        Raises:
            UserError: the store holds other objects than were sent: somebody else writes there, or removed some.
            StoreUnreachable: the store does not answer.
        """
        manifest = manifests.load(self.folder)
        with self._clear_errors(), self._looking() as store:
            self._compare(_read_json(store, f"{PARTIAL}/{PLAN}"))
            there = _infos(store, "")
            changed = [s.name for s in manifest.shards if there.get(s.name, {}).get("size") != s.bytes]
            if changed:
                raise UserError(
                    f"{self.url}: {changed[0]} is not as it was sent ({len(changed)} of {len(manifest.shards)} shards): "
                    "somebody removed or replaced it; run the same command again to send it once more"
                )
            if (self.folder / QUARANTINE).is_file():
                store.put(self.folder / QUARANTINE)
            store.put(self.folder / MANIFEST)
            self._remove_plan(store)
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Remove the plan and the records from the store, unless a shard may lie there: the next run knows it by them."""
        with suppress(Exception), self._looking() as store:
            if not self.has_sent and all(name.startswith(".") for name in _infos(store, "")):
                store.remove(PARTIAL)

    def close(self) -> None:
        """End the transfers."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    def _send(self, store: Store, number: int, written: Written) -> None:
        tar = None
        if written.shard is not None:
            tar = self.partial / written.shard.name
            store.put(index_path(tar))
            send_verified(store, tar, written.shard.sha256)
        name = set_folder.record_name(number)
        store.write(f"{PARTIAL}/{name}", (json.dumps(set_folder.record(written), indent=2) + "\n").encode())
        set_folder.write_record(self.partial, number, written)
        if tar is not None:
            tar.unlink()
            index_path(tar).unlink()

    def _wait(self, most: int) -> None:
        while len(self._jobs) > most:
            done, self._jobs = wait(self._jobs, return_when=FIRST_COMPLETED)
            with self._clear_errors():
                for job in done:
                    job.result()

    def _compare(self, plan: dict[str, Any] | None) -> None:
        """Raise UserError if the plan in the store is that of another set, or None."""
        if plan is None or (self._fingerprint is not None and plan["fingerprint"] != self._fingerprint):
            raise UserError(
                f"{self.url}: holds an unfinished set of other images or options; run its own command to finish it, or "
                f"delete {self.url}/{PARTIAL} and the shards beside it to discard it"
            )

    def _finished(self, store: Store, there: dict[str, dict[str, Any]]) -> Manifest:
        """Return the manifest of the finished set in the store.

        Raises:
            UserError: it is another set than the one to be written, or shards of it are missing or of another size.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MANIFEST).write_bytes(store.read(MANIFEST, at_start=True))
        manifest = manifests.load(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._fingerprint is not None and manifest.source != self._fingerprint:
            raise UserError(
                f"{self.url}: already holds another shard set ({manifest.samples} samples); choose a new address, or delete "
                "this one first"
            )
        for shard in manifest.shards:
            if there.get(shard.name, {}).get("size") != shard.bytes:
                raise UserError(
                    f"{self.url}: its manifest is there, but {shard.name} is missing or has another size; delete "
                    f"{MANIFEST} there to write the set again"
                )
        if PARTIAL in there:  # interrupted after the manifest was sent
            self._remove_plan(store)
        say(f"{self.url}: already holds this set ({manifest.samples} samples); nothing to do")
        return manifest

    def _remove_plan(self, store: Store) -> None:
        try:
            store.remove(PARTIAL)
        except Missing:
            pass
        except Denied:
            log.warning("%s/%s: may not be removed with these credentials; it can be deleted", self.url, PARTIAL)

    def _fetch_records(self, store: Store, there: dict[str, dict[str, Any]], numbers: range) -> None:
        """Make the records in the folder those of shards that the store holds with the right size."""
        listed = _infos(store, PARTIAL)
        for number in set_folder.records(self.partial):
            if set_folder.record_name(number) not in listed:
                (self.partial / set_folder.record_name(number)).unlink()
        found = (int(name[6:-5]) for name in listed if name.startswith("shard-") and name[6:-5].isdecimal())
        wanted = [number for number in sorted(found) if number in numbers]

        def fetch(number: int) -> None:
            path = self.partial / set_folder.record_name(number)
            if not path.is_file():
                files.write_bytes(path, store.read(f"{PARTIAL}/{path.name}", at_start=True))
            shard = set_folder.read_record(self.partial, number).shard
            if shard is not None and there.get(shard.name, {}).get("size") != shard.bytes:
                path.unlink()

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fetch, wanted))

    def _locks(self) -> Path:
        self._above.mkdir(parents=True, exist_ok=True)
        return self._above

    @contextmanager
    def _looking(self) -> Iterator[Store]:
        with closing(Store(self.url, {}, self._locks())) as store:
            yield store

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except Denied as error:
            raise UserError(f"{error}; set {store_urls.credentials(self.url)}") from None
        except Missing as error:
            raise UserError(f"{error}; is there such a bucket? Make it first") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.url}/{PARTIAL}: the plan or a record is damaged ({error}); remove all that lies in {self.url}, "
                "and run the same command again"
            ) from None


def check_writable(url: str) -> None:
    """Raise UserError for the address of a web server, or one that holds a secret."""
    if problem := store_urls.secret_in_url(url):
        raise UserError(f"{url.partition('://')[0]}://…: {problem}")
    if store_urls.protocol(url) == "https":
        raise UserError(f"{url}: a web server cannot be written to; write to s3://…, gs://…, az://… or a folder")


def refuse_nested(url: str, names: list[str]) -> None:
    """Raise UserError when sets would be written inside another set, or where the sets of a split already exist.

    Args:
        names: of the sets to be written below the URL: [""] for a single one.
    """
    url = url.rstrip("/")
    above = url.rpartition("/")[0]
    others = [above] if "/" in above.partition("://")[2] else []
    others += [url] if names != [""] else [store_urls.join(url, name) for name in ("train", "val")]
    for other in others:
        if _holds_set(other):
            raise UserError(
                f"{other}: already holds another shard set, written with other options; choose a new address, or delete this "
                "one first"
            )


def unfinished(url: str) -> dict[str, Intent | None]:
    """Return the plans of the unfinished sets at a URL, by name: "" for a single one; None for a set that is finished.

    Raises:
        UserError: there is no set, finished or not, or access is denied.
    """
    found: dict[str, Intent | None] = {}
    for name in ("", "train", "val"):
        one = store_urls.join(url, name).rstrip("/")
        plan = _plan(one)
        if plan is not None or _holds_set(one):
            found[name] = plan
    if not found:
        raise UserError(f"{url}: no parts of a shard set in it; write them with `shards create --shard-range i/n`")
    return found


def _holds_set(url: str) -> bool:
    """Return whether there is a finished set at a URL; False where access is denied."""
    above = place.cache_folder(None)
    above.mkdir(parents=True, exist_ok=True)
    with closing(Store(url, {}, above)) as store:
        try:
            store.version(MANIFEST)
            return True
        except (Missing, Denied):
            return False


def _plan(url: str) -> Intent | None:
    look = Outbox(url, None, None)
    with look._clear_errors(), look._looking() as store:
        plan = _read_json(store, f"{PARTIAL}/{PLAN}")
        return None if plan is None else Intent(**plan | {"classes": tuple(plan["classes"])})


def _infos(store: Store, folder: str) -> dict[str, dict[str, Any]]:
    """Return what a store says about the objects in a folder, by name; empty without such a folder."""
    try:
        return store.infos(folder)
    except Missing:
        return {}


def _read_json(store: Store, name: str) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(store.read(name, at_start=True))
        return value
    except Missing:
        return None
