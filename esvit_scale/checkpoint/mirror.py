"""Copies of checkpoints in an object store (`train.mirror`): where they lie, whose they are, and how a run is restored.

s3://bucket/runs/NAME/
  owner.json                      the id of the run that may write here, which mirror.json in its run dir repeats
  latest, best                    names of step folders, as in checkpoints/ of the run dir
  checkpoints/step-00000100/…     the files of a checkpoint, and last files.json: their sizes and sha256
  checkpoints/step-00000100.log.txt, …   the run's records (RECORDS), as they were when it was sent

A step folder with files.json is complete. mirror_sender.py writes all this.
"""

import getpass
import json
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from esvit_scale import config as configs
from esvit_scale import files, store_urls, yaml_text
from esvit_scale.checkpoint import step_folders
from esvit_scale.config import Config
from esvit_scale.data.remote.store import Denied, Missing, Store
from esvit_scale.errors import RestartCanHelp, UserError, first_line
from esvit_scale.run_keys import LENGTH_KEYS, MAY_DIFFER
from esvit_scale.run_stages import key_of

log = logging.getLogger("esvit_scale")

RECORDS = (  # of a run dir, beside checkpoints/; config.yaml last, because with it a folder is a run dir
    *("metrics.jsonl", "quarantine.jsonl", "summary.json", "environment.json", "attention.json"),
    *("prototype_loss.json", "lengthened.jsonl", "log.txt", "config.yaml"),
)
LISTED = "files.json"  # in each step folder of the store: name → [bytes, sha256]
OWNER = "owner.json"  # in the store: id, user, host and time of the run's first start
ID = "mirror.json"  # in the run dir: the id that owner.json has
ATTEMPTS = 3  # number of transfers of a file that arrives damaged each time
SLOWEST = 1e6  # bytes/s; a slower transfer counts as a hang
# Keys that a restore does not compare: the data may have moved and the run may be made longer, which
# train/run_dir.py checks once the run dir is there.
COMPARED_LATER = (*MAY_DIFFER, *LENGTH_KEYS, "stages", "data.train", "data.mix")


class Damaged(Exception):
    """Error for a checkpoint in a mirror that cannot be restored."""


class NotOurs(UserError):
    """Error for a mirror that holds the checkpoints of another run."""


def url_of(config: Config) -> str:
    """Return the address of a run's mirror: train.mirror and the name of the run dir."""
    return store_urls.join(str(config.train.mirror), config.run_path.name)


@contextmanager
def opened(config: Config) -> Iterator[Store]:
    """Yield the store of a run's mirror, opened with data.storage_options if data.train has the same protocol."""
    url = url_of(config)
    same = store_urls.protocol(url) == store_urls.protocol(config.data.train or "")
    options = (config.data.storage_options or {}) if same else {}
    with TemporaryDirectory() as locks, closing(Store(url, options, Path(locks))) as store:
        yield store


# --- whose mirror it is ----------------------------------------------------------------------------------------------


def claim(config: Config) -> int:
    """Write this run's id into its mirror, as a test that it can be written; return the step of its newest checkpoint.

    The step is 0 if there is no checkpoint or no mirror. Call it on rank 0 while holding the run's lock. If the run is
    resumed, a mirror that fails is only logged as a warning.

    Raises:
        UserError: the mirror holds another run's checkpoints; or, at the beginning of a run, it cannot be written.
        StoreUnreachable: at the beginning of a run, the store does not answer.
    """
    if config.train.mirror is None:
        return 0
    try:
        with opened(config) as store:
            own(store, config.run_path)
            return step_folders.step_of(Path(_latest(store) or "")) or 0
    except NotOurs:
        raise
    except Exception as error:
        problem = f"train.mirror: {url_of(config)} cannot be written: {first_line(error)}"
        if step_folders.has_checkpoints(config.run_path):
            log.warning("%s; the run goes on, and every checkpoint is tried anew", problem)
            return 0
        if isinstance(error, RestartCanHelp):
            raise
        raise UserError(f"{problem}; {_hint(config, error)}") from None


def own(store: Store, run: Path) -> None:
    """Write a run's id into its mirror.

    A mirror with another id is taken over only if it has no checkpoint, the same user began it, and this run dir has
    no id yet.

    Raises:
        NotOurs: the mirror is another run's.
    """
    ours, there = _id_of(run), _owner(store)
    if there is None or there["id"] != ours:
        if there is not None and (ours is not None or not _is_mine(there) or _latest(store) is not None):
            raise _not_ours(store, there)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        there = {"id": ours or uuid.uuid4().hex, "user": _user(), "host": socket.gethostname(), "began": began}
    if ours is None:
        files.write_json(run / ID, {"id": there["id"]})
    store.write(OWNER, json.dumps(there).encode())


def _owner(store: Store) -> dict[str, Any] | None:
    with suppress(Missing, ValueError):
        found = json.loads(store.read(OWNER, at_start=True))
        if isinstance(found, dict) and found.get("id"):
            return found
    return None


def _id_of(run: Path) -> str | None:
    with suppress(FileNotFoundError, ValueError, AttributeError):
        return json.loads((run / ID).read_bytes()).get("id")
    return None


def _is_mine(owner: dict[str, Any]) -> bool:
    return owner.get("user") == _user()


def _not_ours(store: Store, owner: dict[str, Any]) -> NotOurs:
    who, host, began = (owner.get(key, "?") for key in ("user", "host", "began"))
    return NotOurs(
        f"train.mirror: {store.url} holds the checkpoints of another run (of {who}, begun on {host} at {began}); set "
        "name= or train.mirror= to another place; to continue that run here, remove "
        f"{store_urls.join(store.url, OWNER)}"
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return "?"


def _hint(config: Config, error: Exception) -> str:
    if isinstance(error, Denied):
        return f"set {store_urls.credentials(url_of(config))}"
    return "correct the address, or make the bucket; train.mirror=null does without"


# --- restore ---------------------------------------------------------------------------------------------------------


def restore(config: Config, grant: Callable[[float], None] = lambda seconds: None) -> None:
    """Fetch the newest complete checkpoint of a run from its mirror, if the run dir has none and the mirror has one.

    The one that `latest` names is tried first, then earlier ones, then later ones. The one that `best` names is also
    fetched.

    Args:
        grant: gets, before each transfer, the seconds that it may take.

    Raises:
        UserError: the mirror is another run's, the store denies access, or no checkpoint there can be used.
        StoreUnreachable: the store does not answer.
    """
    run = config.run_path
    if config.train.mirror is None or step_folders.has_checkpoints(run) or (run / "config.yaml").exists():
        return
    try:
        with opened(config) as store:
            names = _candidates(store)
            if not names:
                return
            owner = _owner(store)
            if owner is not None and not _is_mine(owner):
                raise _not_ours(store, owner)
            name = _fetch_first(store, config, names, grant)
            if name is None:
                return
            _fetch_best(store, run, name, grant)
            step_folders.write_latest(run / "checkpoints" / name)
    except Denied as error:
        raise UserError(f"{error}; {_hint(config, error)}") from None


def is_complete(store: Store, name: str) -> bool:
    """Return whether a mirror has all of a step folder."""
    try:
        store.version(f"checkpoints/{name}/{LISTED}")
    except Missing:
        return False
    return True


def _latest(store: Store) -> str | None:
    return _pointer(store, step_folders.LATEST)


def _pointer(store: Store, pointer: str) -> str | None:
    """Return the name of the step folder that the object `pointer` (latest or best) holds; None without a valid one."""
    with suppress(Missing):
        name = store.read(pointer, at_start=True)[:200].decode("ascii", "replace").strip()
        return name if step_folders.step_of(Path(name)) is not None else None
    return None


def _candidates(store: Store) -> list[str]:
    """Return the names of a mirror's step folders in the order in which a restore tries them.

    First the one that `latest` names, then earlier ones from the newest down, then later ones, which may be incomplete.
    """
    found, latest = set[str](), _latest(store)
    with suppress(Missing):
        found = {name for name in store.names("checkpoints") if step_folders.step_of(Path(name)) is not None}
    ordered = sorted(found, key=lambda name: step_folders.step_of(Path(name)) or 0, reverse=True)
    if latest is None:
        return ordered
    newest = step_folders.step_of(Path(latest)) or 0
    later = [name for name in ordered if (step_folders.step_of(Path(name)) or 0) > newest]
    return [latest, *(name for name in ordered if name != latest and name not in later), *later]


def _fetch_first(store: Store, config: Config, names: list[str], grant: Callable[[float], None]) -> str | None:
    """Fetch the first of the step folders that can be used, with the run's records, and return its name.

    Returns:
        None if no checkpoint of the mirror was ever complete: the run was ended before its first was sent.

    Raises:
        UserError: none can be used, or the mirror holds a run of another config.
    """
    run, latest, problems = config.run_path, _latest(store), list[str]()
    for name in names:
        if name != latest and not is_complete(store, name):
            continue  # its upload or removal was interrupted
        log.warning("%s: fetching %s from %s …", run, name, store.url)
        try:
            _check_config(store, name, config)
            run.mkdir(parents=True, exist_ok=True)
            with _fetched(store, run, name, grant):
                for record in RECORDS[:-1]:  # before the folder is renamed: a start that finds it resumes
                    _fetch_record(store, run, name, record)
                if owner := _owner(store):
                    files.write_json(run / ID, {"id": owner["id"]})
            _fetch_record(store, run, name, RECORDS[-1])
        except (Damaged, Missing) as error:
            problems.append(str(error))
            log.warning("%s; trying another checkpoint", error)
        else:
            return name
    for folder in (run / "checkpoints", run):
        with suppress(OSError):
            folder.rmdir()
    if problems:
        raise UserError(
            f"{store.url}: no checkpoint there can be used ({len(problems)} tried; {problems[0]}); repair it, or set "
            "name= to start another run from step 0"
        )
    log.warning("%s: has no complete checkpoint; %s starts from step 0", store.url, run)
    return None


@contextmanager
def _fetched(store: Store, run: Path, name: str, grant: Callable[[float], None]) -> Iterator[None]:
    """Fetch a step folder under a temporary name, run the block, and then rename the folder to `name`.

    Raises:
        Damaged: a file arrived with another size or sha256 than listed ATTEMPTS times, or the list is unreadable.
        Missing: a file is not there.
    """
    prefix = f"checkpoints/{name}"
    with files.new_folder(run / prefix) as tmp:
        for relative, (size, sha256) in _listed(store, prefix).items():
            target, url = tmp / relative, store_urls.join(store.url, f"{prefix}/{relative}")
            if not target.resolve().is_relative_to(tmp.resolve()):
                raise Damaged(f"{store.url}/{prefix}/{LISTED}: {relative!r} is no file of this folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            for attempt in range(ATTEMPTS):
                grant(size / SLOWEST)
                store.fetch(f"{prefix}/{relative}", target, urgent=True)
                if target.stat().st_size == size and files.sha256(target) == sha256:
                    break
                log.warning("%s: is not what was sent (attempt %d)", url, attempt + 1)
            else:
                raise Damaged(f"{url}: is not what was sent")
        yield


def _listed(store: Store, prefix: str) -> dict[str, tuple[int, str]]:
    try:
        found = json.loads(store.read(f"{prefix}/{LISTED}", at_start=True))
        listed = {str(name): (int(size), str(sha256)) for name, (size, sha256) in found.items()}
    except (ValueError, TypeError, AttributeError):
        listed = {}
    if not listed:
        raise Damaged(f"{store.url}/{prefix}/{LISTED}: is no list of files")
    return listed


def _fetch_record(store: Store, run: Path, name: str, record: str) -> None:
    with suppress(Missing):
        files.write_bytes(run / record, store.read(f"checkpoints/{name}.{record}"))


def _fetch_best(store: Store, run: Path, newest: str, grant: Callable[[float], None]) -> None:
    """Fetch the step folder that the mirror's `best` names, if it is of an earlier step; a failure is a warning."""
    best = _pointer(store, step_folders.BEST)
    if best is None or (step_folders.step_of(Path(best)) or 0) > (step_folders.step_of(Path(newest)) or 0):
        return
    try:
        if best != newest:
            with _fetched(store, run, best, grant):
                pass
    except (Damaged, Missing) as error:
        log.warning("%s; the run goes on without checkpoints/%s", error, step_folders.BEST)
    else:
        step_folders.write_best(run / "checkpoints" / best)


def _check_config(store: Store, name: str, config: Config) -> None:
    """Raise NotOurs when a mirrored checkpoint's config differs from the given one in a key that a run must keep."""
    url = f"{store.url}/checkpoints/{name}.config.yaml"
    try:
        text = store.read(f"checkpoints/{name}.config.yaml", at_start=True).decode()
        saved = configs.validate(yaml_text.parse(text, url), where=url)
    except (Missing, UnicodeError, UserError):
        return  # the run dir's checks decide, which also read the checkpoint's own config
    keys = [(d, key_of(d)) for d in configs.differences(saved, config)]
    differ = [d for d, key in keys if not any(f"{key}.".startswith(f"{same}.") for same in COMPARED_LATER)]
    if differ:
        raise NotOurs(
            f"train.mirror: {store.url} holds a run of another config ({'; '.join(differ)}); set name= or train.mirror= "
            "to another place"
        )
