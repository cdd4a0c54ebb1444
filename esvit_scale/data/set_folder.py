"""The folder of a shard set while the set is written: locks, leftovers of interrupted runs, and the move into place.

Everything is written into `.partial` inside the folder. A plan (`plan.json`) says what is being written, and each shard
that is complete has a record (`shard-000000.json`). When all records are there, the files move out of `.partial`, the
manifest last.
"""

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale import files
from esvit_scale.data import manifest as manifests
from esvit_scale.data.left_out import LeftOut, of_bad, refuse
from esvit_scale.data.manifest import MANIFEST, Manifest
from esvit_scale.data.planned_shard import Bad, Written, shard_name
from esvit_scale.data.shard_table import Shard
from esvit_scale.errors import UserError
from esvit_scale.progress import say

PARTIAL = ".partial"
PLAN = "plan.json"
QUARANTINE = "quarantine.jsonl"
LOCK_ATTEMPTS = 10


class Intent(NamedTuple):
    """The content of plan.json: what an unfinished set is going to be."""

    fingerprint: str
    shards: int
    samples: int  # planned, bad ones included
    classes: tuple[str, ...]
    options: dict[str, Any]
    bad: list[Bad]  # quarantine rows that are known before a shard is written
    left_out: Sequence[dict[str, Any]] = ()  # rows of left_out.LeftOut: what the source's listing left out


class NoSamples(Exception):
    """Error for a set whose samples are all bad; the message gives the first one's name and reason."""


@contextmanager
def held(destination: Path, part: str = "") -> Iterator[None]:
    """Lock a folder against other writers during the block; create it if missing, and then remove it if it stays empty.

    Args:
        part: name of a part of the set; several parts may be written at once, but no part by two runs at once.

    Raises:
        UserError: another process has the lock.
    """
    made = not destination.exists()
    destination.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if made:
            stack.callback(_remove_if_empty, destination)
        _lock(stack, destination, os.O_RDONLY | os.O_DIRECTORY, fcntl.LOCK_SH if part else fcntl.LOCK_EX, destination)
        if part:
            (destination / PARTIAL).mkdir(exist_ok=True)
            lock = destination / PARTIAL / f"{part}.lock"
            _lock(stack, lock, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX, destination)
        yield


def _lock(stack: ExitStack, path: Path, flags: int, kind: int, destination: Path) -> None:
    handle = os.open(path, flags)
    stack.callback(os.close, handle)
    for attempt in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:  # possibly held by workers of a run that was killed a moment ago
            time.sleep(0.1 if attempt + 1 < LOCK_ATTEMPTS else 0)
        except OSError:
            return  # a file system without locks
    raise UserError(f"{destination}: another process is writing this shard set; wait until it has finished")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def settle(destination: Path, fingerprint: str | None, shared: bool = False) -> None:
    """Finish or remove what an interrupted run left, and refuse a folder that holds something else.

    Args:
        fingerprint: identifies the set to be written; None for a stream of samples, which cannot be continued.
        shared: other parts may be working in the folder.

    Raises:
        UserError: the folder holds other files, or an unfinished set of another source.
    """
    partial = destination / PARTIAL
    if (partial / MANIFEST).is_file():  # interrupted while a finished set was moved into place
        commit(partial)
    elif manifests.is_shard_set(destination) and partial.exists() and not shared:
        shutil.rmtree(partial)  # interrupted after the move, before this removal
    elif partial.exists():
        intent = read_intent(destination)
        if intent is not None and intent.fingerprint != fingerprint:
            raise UserError(
                f"{destination}: holds an unfinished set of other images or options ({len(records(partial))} of "
                f"{intent.shards} shards are written); run its own command to finish it, or delete {partial} to discard it"
            )
        if intent is None and not shared:
            shutil.rmtree(partial)
    if not manifests.is_shard_set(destination):
        others = sorted(p.name for p in destination.iterdir() if not p.name.startswith("."))
        if others:
            raise UserError(
                f"{destination}: holds other files ({', '.join(others[:3])}, …); choose an empty or new folder"
            )


def existing(destination: Path, source: str) -> Manifest:
    """Return the manifest of the finished set in the folder, if it was written from `source` (a fingerprint).

    Raises:
        UserError: the set is another one.
    """
    manifest = manifests.load(destination)
    if not source or manifest.source != source:
        raise UserError(
            f"{destination}: already holds another shard set ({manifest.samples} samples); "
            "choose a new folder, or delete this one first"
        )
    manifests.check_sizes(manifest)  # raises UserError for a damaged set
    say(f"{destination}: already holds this set ({manifest.samples} samples); nothing to do")
    return manifest


def write_intent(destination: Path, intent: Intent) -> None:
    """Write the plan of a set into its folder's `.partial`."""
    (destination / PARTIAL).mkdir(exist_ok=True)
    files.write_json(destination / PARTIAL / PLAN, intent._asdict())


def read_intent(destination: Path) -> Intent | None:
    """Return the plan of an unfinished set; None when there is no plan, or none that can be read."""
    try:
        raw = json.loads((destination / PARTIAL / PLAN).read_bytes())
        return Intent(**raw | {"classes": tuple(raw["classes"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_record(partial: Path, number: int, written: Written) -> None:
    """Write the record which says that shard `number` is complete."""
    files.write_json(partial / record_name(number), record(written))


def record(written: Written) -> dict[str, Any]:
    """Return the content of the record of a complete shard."""
    shard = written.shard._asdict() if written.shard else None
    found = {"shard": shard, "bad": written.bad, "formats": dict(written.formats), "turned": written.turned}
    return found | ({"modalities": dict(written.modalities)} if written.modalities else {})


def record_name(number: int) -> str:
    """Return the name of the record of shard `number`."""
    return f"shard-{number:06d}.json"


def records(partial: Path) -> list[int]:
    """Return the numbers of the shards that have a record, which means that they are complete, ascending."""
    return sorted(int(p.stem[6:]) for p in partial.glob("shard-*.json") if p.stem[6:].isdecimal())


def clear_asides(partial: Path, numbers: Iterable[int]) -> None:
    """Remove the temporary files of these shards that killed processes left behind."""
    names = {shard_name(number) for number in numbers}
    for path in partial.glob(".shard-*.partial"):
        if path.name[1:17] in names:
            path.unlink()


def read_record(partial: Path, number: int) -> Written:
    """Read the record of a shard. Raises OSError or ValueError."""
    raw = json.loads((partial / record_name(number)).read_bytes())
    return Written(
        Shard(**raw["shard"]) if raw["shard"] else None,
        raw["bad"],
        raw.get("formats", {}),
        raw.get("turned", 0),
        raw.get("modalities", {}),
    )


def finish(destination: Path, intent: Intent, strict: bool = False) -> Manifest:
    """Write the manifest and the quarantine from the records, and move everything into place.

    Raises:
        UserError: shards are missing; with `strict`, something of the source was left out.
        NoSamples: all samples were bad.
    """
    partial = destination / PARTIAL
    done = records(partial)
    missing = sorted(set(range(intent.shards)) - set(done))
    if missing:
        raise UserError(
            f"{destination}: {len(missing)} of {intent.shards} shards are not written yet (first: "
            f"{shard_name(missing[0])}); run the parts again that did not end with exit code 0"
        )
    written = [read_record(partial, number) for number in range(intent.shards)]
    shards = [w.shard for w in written if w.shard]
    bad = intent.bad + [row for w in written for row in w.bad]
    if not shards:
        raise NoSamples(f"{bad[0]['file']}: {bad[0]['reason']}" if bad else "there are none")
    left = LeftOut(intent.left_out)
    left.update(of_bad(bad))
    if strict:
        refuse([left], str(destination))
    formats, modalities = Counter[str](), Counter[str]()
    for w in written:
        formats.update(w.formats)
        modalities.update(w.modalities)
    if turned := sum(w.turned for w in written):
        say(f"{destination}: turned {turned} images to the orientation that their json records")
    publish(partial, shards, intent.classes, intent.fingerprint, intent.options, bad, left, formats, modalities)
    return manifests.load(destination)


def publish(
    partial: Path,
    shards: Sequence[Shard],
    classes: Sequence[str],
    source: str,
    options: dict[str, Any],
    bad: Sequence[Bad] = (),
    left_out: LeftOut | None = None,
    formats: Mapping[str, int] | None = None,
    modalities: Mapping[str, int] | None = None,
) -> None:
    """Write the manifest, and the quarantine if there is one, and move the finished set into place."""
    if bad:
        files.write_bytes(partial / QUARANTINE, "".join(json.dumps(row) + "\n" for row in bad).encode())
    rows = left_out.rows() if left_out else []
    content = manifests.dump(shards, classes, source, tool(), options, rows, formats, modalities)
    files.write_bytes(partial / MANIFEST, content)
    commit(partial)


def commit(partial: Path) -> None:
    """Move a finished set out of `.partial`, the manifest last, and remove `.partial`."""
    moved = [*partial.glob("shard-*.tar"), *partial.glob("shard-*.index.jsonl"), *partial.glob(QUARANTINE)]
    for path in sorted(moved):
        path.rename(partial.parent / path.name)
    files.sync_folder(partial.parent)
    (partial / MANIFEST).rename(partial.parent / MANIFEST)
    files.sync_folder(partial.parent)
    shutil.rmtree(partial)


def tool() -> str:
    """Return the name and version of this package, which the manifest records as the writer."""
    try:
        return f"esvit-scale {metadata.version('esvit-scale')}"
    except metadata.PackageNotFoundError:
        return "esvit-scale"
