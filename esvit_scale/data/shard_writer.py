"""Writing of images as shard sets (WebDataset tars with a manifest), by any number of processes and jobs.

    images ─ sources/ ─► numbered samples ─ shard_plan.py ─► which sample goes into which shard, before one is read
           ─ planned_shard.py ─► one tar: read, checked, re-encoded where asked ─ set_folder.py ─► moved into place

So every shard is written independently, and an interrupted run continues with the shards that are missing. The same
source and options give the same bytes.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial as bind
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale import store_urls
from esvit_scale.data import manifest as manifests
from esvit_scale.data import pool, set_folder
from esvit_scale.data.image_folder import printable
from esvit_scale.data.keys import keys_of
from esvit_scale.data.left_out import ARCHIVES, CUT, LeftOut, of_bad, refuse
from esvit_scale.data.manifest import MANIFEST, Manifest
from esvit_scale.data.planned_sets import PlannedSet, plan_of, planned_sets
from esvit_scale.data.planned_shard import shard_name, write_planned
from esvit_scale.data.remote import outbox as outboxes
from esvit_scale.data.remote import source_files
from esvit_scale.data.remote.outbox import Outbox
from esvit_scale.data.set_folder import PARTIAL, Intent, NoSamples
from esvit_scale.data.shard_file import Sample, counted, write_shard
from esvit_scale.data.shard_plan import SAMPLES_PER_SHARD, Recipe, ShardPlan, fingerprint
from esvit_scale.data.shard_table import Shard
from esvit_scale.data.shard_verify import verify
from esvit_scale.data.sources import SourceOptions, source_record
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.progress import say

__all__ = ["Sample", "create", "keys_of", "merge", "verify", "write_samples", "write_source"]

SAID = 20  # at most so many bad images are named on stderr; the quarantine names all of them


class Part(NamedTuple):
    """The i-th of n parts of a set's shards (`--shard-range i/n`), 1 ≤ i ≤ n."""

    i: int
    n: int

    def of(self, shards: int) -> range:
        """Return the numbers of the shards that belong to this part of a set of `shards` shards."""
        return range(shards)[share(shards, self.i - 1, self.n)]


class Writing(NamedTuple):
    """One set that is to be written, and how."""

    planned: PlannedSet
    where: str  # the source, for messages
    recipe: Recipe
    options: dict[str, Any]  # for the manifest
    workers: int
    part: Part | None
    strict: bool

    @property
    def identity(self) -> str:
        """Return the hash that identifies the set before it is written."""
        return fingerprint(self.planned.source, self.recipe, self.planned.chosen)


def create(source: Path, destination: Path, samples_per_shard: int = SAMPLES_PER_SHARD, seed: int = 0) -> Manifest:
    """Write a folder of images as one shard set; other options have the defaults of `esvit-scale shards create`."""
    if samples_per_shard < 1:
        raise UserError(f"samples per shard: {samples_per_shard} is not a positive number; nearest: 1")
    recipe = Recipe(samples_per_shard=samples_per_shard, seed=seed)
    return write_source(str(source), Path(destination), SourceOptions(kind="folder"), recipe)[""]


def write_source(
    where: str,
    destination: Path | str,
    options: SourceOptions,
    recipe: Recipe,
    workers: int = 1,
    part: Part | None = None,
    strict: bool = False,
    work_dir: Path | None = None,
) -> dict[str, Manifest]:
    """Write a source as one shard set, or as the sets `train` and `val` in folders of these names.

    A file that cannot be used is left out and recorded in quarantine.jsonl. A destination that already holds the set of the
    same source and options is left as it is; one that holds part of it is completed.

    Args:
        where: path or URL of the source, or `-` for a list on stdin.
        destination: a folder, or its URL in a store, to which each shard is sent as soon as it is written.
        part: write only this part of every set's shards, and leave the manifest to `merge`.
        strict: raise UserError when anything is left out that the recipe does not ask to leave out: before anything is
            written if the source's listing leaves it out, at the end if it is an unusable image.
        work_dir: folder for files on their way from or to a store; None: the cache's default folder.

    Returns:
        The manifests by name of the split ("" for a single set); none after a part.

    Raises:
        UserError: the recipe contradicts itself, the source is missing or has no usable images, or the destination is in
            use or holds something else.
        RestartCanHelp: the source's file system or the store does not answer, or a worker process was killed.
    """
    recipe.check()
    if options.modal and recipe.drop_duplicates:
        raise UserError(
            "--drop-duplicates: compares images, and samples of several members may have none; leave it out"
        )
    if isinstance(destination, str):
        outboxes.check_writable(destination)
    sets = planned_sets(where, options, recipe)
    if strict:
        refuse([planned.left_out for planned in sets.values()], where)
    if part and recipe.drop_duplicates:
        raise UserError(
            "--drop-duplicates: with --shard-range every part would read the whole source; run "
            f"`esvit-scale shards duplicates {where} --out keep.txt` first, and give every part --keep keep.txt instead"
        )
    if isinstance(destination, str):
        outboxes.refuse_nested(destination, list(sets))
    else:
        _refuse_nested(destination, list(sets))
    finished = {}
    for name, planned in sets.items():
        record = {"source": source_record(options), "recipe": recipe.record(), "split": name}
        writing = Writing(planned, where, recipe, record, workers, part, strict)
        if isinstance(destination, str):
            manifest = _write_remote(writing, store_urls.join(destination, name).rstrip("/"), work_dir)
        else:
            manifest = _write_set(writing, destination / name)
        if manifest is not None:
            finished[name] = manifest
    if not part:  # another part may need what was fetched
        source_files.discard_if_remote(where, options.work_dir)
    return finished


def _refuse_nested(destination: Path, names: list[str]) -> None:
    """Raise UserError when the sets would be written inside another set, or where a split or single set already exists."""
    for folder in (destination.parent, *([destination] if names != [""] else [])):
        if manifests.is_shard_set(folder) or (folder / PARTIAL / set_folder.PLAN).is_file():
            raise UserError(
                f"{folder}: already holds another shard set, written with other options; choose a new folder, or delete "
                "this one first"
            )
    if names == [""] and any(manifests.is_shard_set(destination / part) for part in ("train", "val")):
        raise UserError(
            f"{destination}: already holds the sets of a split (train, val), written with other options; choose a new "
            "folder, or delete this one first"
        )


def merge(destination: Path | str, strict: bool = False, work_dir: Path | None = None) -> dict[str, Manifest]:
    """Finish a set (or `train` and `val`) whose parts are all written: write its manifest and move its files into place.

    Raises:
        UserError: parts are missing, or there is nothing to finish; with `strict`, something was left out.
    """
    if isinstance(destination, str):
        return _merge_remote(destination, strict, work_dir)
    folders = [f for f in (destination, destination / "train", destination / "val") if f.is_dir()]
    unfinished = [f for f in folders if (f / PARTIAL).is_dir()]
    if not unfinished:
        done = [f for f in folders if manifests.is_shard_set(f)]
        if not done:
            raise UserError(
                f"{destination}: no parts of a shard set in it; write them with `shards create --shard-range i/n`"
            )
        for folder in done:
            say(f"{folder}: this set is finished; nothing to do")
        return {_split_name(f, destination): manifests.load(f) for f in done}
    finished = {}
    for folder in unfinished:
        with set_folder.held(folder):
            intent = set_folder.read_intent(folder)
            set_folder.settle(folder, intent.fingerprint if intent else None)
            if manifests.is_shard_set(folder):
                finished[_split_name(folder, destination)] = manifests.load(folder)
            elif intent is None:
                raise UserError(f"{folder}: it holds no plan of a shard set; run its parts again")
            else:
                finished[_split_name(folder, destination)] = _finished(folder, intent, str(folder), strict)
    return finished


def _merge_remote(destination: str, strict: bool, work_dir: Path | None) -> dict[str, Manifest]:
    """Finish the set, or `train` and `val`, whose parts were written to a store."""
    finished = {}
    for name, intent in outboxes.unfinished(destination).items():
        url = store_urls.join(destination, name).rstrip("/")
        outbox = Outbox(url, work_dir, intent.fingerprint if intent else None)
        try:
            with set_folder.held(outbox.folder):
                found = outbox.settle()
                if found is None and intent is not None:
                    found = _finished(outbox.folder, intent, url, strict)
                    outbox.publish()
            if found is not None:
                finished[name] = found
        except UserError as error:
            raise UserError(str(error).replace(str(outbox.folder), url)) from None
        finally:
            outbox.close()
    return finished


def write_samples(
    samples: Iterable[Sample],
    destination: Path,
    classes: Sequence[str] = (),
    samples_per_shard: int = SAMPLES_PER_SHARD,
    source: str = "",
) -> Manifest:
    """Write the samples that a program generates as a shard set, in the given order.

    Args:
        source: identifies the samples; a destination that holds a set of the same source is left as it is.

    Raises:
        UserError: there are no samples, or the destination is in use or holds something else.
    """
    destination = Path(destination)
    partial = destination / PARTIAL
    try:
        with set_folder.held(destination):
            set_folder.settle(destination, None)
            if manifests.is_shard_set(destination):
                return set_folder.existing(destination, source)
            partial.mkdir()
            with _removed_on_failure(partial):
                modalities = Counter[str]()
                shards = _stream(samples, partial, samples_per_shard, modalities)
                if not shards:
                    raise UserError(f"{destination}: no samples to write")
                set_folder.publish(partial, shards, classes, source, {}, modalities=modalities)
    except OSError as error:
        raise UserError(f"{error.filename or destination}: {error.strerror or error}") from error
    return manifests.load(destination)


def _write_set(writing: Writing, destination: Path, outbox: Outbox | None = None) -> Manifest | None:
    """Write a set into a folder, or through it to a store; return its manifest, or None after a part."""
    planned, where, recipe, options, workers, part, strict = writing
    source, identity, partial = planned.source, writing.identity, destination / PARTIAL
    try:
        with set_folder.held(destination, f"part-{part.i}-of-{part.n}" if part else ""):
            found = outbox.settle(part.of if part else range) if outbox else _settled(destination, identity, part)
            if found is not None:
                if strict:
                    refuse([LeftOut(found.left_out)], str(destination))
                return found
            with _removed_on_failure(partial, keep_records=True, shared=part is not None, outbox=outbox):
                partial.mkdir(exist_ok=True)
                plan, known = plan_of(planned, recipe, workers, partial / "duplicates.npy")
                known += [_archive_row(file, reason) for file, reason in source.damaged]
                listed = planned.left_out.rows()
                intent = Intent(identity, plan.shards, plan.samples, source.classes, options, known, listed)
                _begin(destination, intent)
                if outbox:
                    outbox.begin()
                _write_shards(plan, partial, part, workers, outbox)
                if part:
                    if strict:
                        written = part.of(plan.shards)
                        refuse(
                            [of_bad(chain.from_iterable(set_folder.read_record(partial, n).bad for n in written))],
                            where,
                        )
                    return None
                return _finished(destination, intent, where, strict)
    except OSError as error:
        raise UserError(f"{error.filename or destination}: {error.strerror or error}") from error


def _write_remote(writing: Writing, url: str, work_dir: Path | None) -> Manifest | None:
    """Write a set to a store; return its manifest, or None after a part. Raises errors as `write_source`."""
    outbox = Outbox(url, work_dir, writing.identity)
    try:
        manifest = _write_set(writing, outbox.folder, outbox)
        if manifest is not None and manifests.is_shard_set(outbox.folder):
            outbox.publish()
        return manifest
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise UserError(
                f"{error}; shards lie in this folder until {url} has them, up to {outboxes.UPLOADS + 2 * writing.workers} at "
                "a time: name a larger one with --work-dir"
            ) from None
        raise UserError(str(error).replace(str(outbox.folder), url)) from None
    finally:
        outbox.close()


def _settled(destination: Path, identity: str, part: Part | None) -> Manifest | None:
    """Finish or remove what an interrupted run left in a folder; return the manifest if it holds the finished set."""
    set_folder.settle(destination, identity, shared=part is not None)
    return set_folder.existing(destination, identity) if manifests.is_shard_set(destination) else None


def _begin(destination: Path, intent: Intent) -> None:
    """Write the plan of a set into its folder. Raises UserError if another version of this package began it."""
    begun = set_folder.read_intent(destination)
    if begun is None:
        set_folder.write_intent(destination, intent)
    elif begun.classes != intent.classes:
        raise UserError(
            f"{destination}: was begun by a version of esvit-scale that numbered the classes differently; delete "
            f"{destination / PARTIAL} to begin again"
        )


def _write_shards(plan: ShardPlan, partial: Path, part: Part | None, workers: int, outbox: Outbox | None) -> None:
    ours = part.of(plan.shards) if part else range(plan.shards)
    done = set(set_folder.records(partial))
    left = [number for number in ours if number not in done]
    if len(left) < len(ours):
        where = outbox.url if outbox else partial.parent
        say(f"{where}: {len(ours) - len(left)} of {len(ours)} shards are written; continuing with the rest")
    set_folder.clear_asides(partial, left)
    samples = sum(plan.count(range(number, number + 1)) for number in left)
    said = 0
    try:
        for number, written in pool.each(bind(write_planned, plan, partial), left, workers, samples, "images"):
            if outbox:
                outbox.send(number, written)
            else:
                set_folder.write_record(partial, number, written)
            for row in written.bad:
                said += 1
                if said <= SAID:
                    say(f"{row['file']}: left out: {row['reason']}")
        if outbox:
            outbox.wait()
    finally:
        if said > SAID:
            say(f"{said - SAID} more images left out; {set_folder.QUARANTINE} names all of them")


def _archive_row(file: str, reason: str) -> dict[str, Any]:
    """Return a quarantine row for an archive of which only the first part can be read."""
    return {"file": printable(file), "reason": reason, "what": ARCHIVES, "kind": CUT}


def _finished(destination: Path, intent: Intent, where: str, strict: bool) -> Manifest:
    try:
        return set_folder.finish(destination, intent, strict)
    except NoSamples as error:
        shutil.rmtree(destination / PARTIAL)
        raise UserError(f"{where}: none of its {intent.samples} image files can be used (first: {error})") from None


@contextmanager
def _removed_on_failure(
    partial: Path, keep_records: bool = False, shared: bool = False, outbox: Outbox | None = None
) -> Iterator[None]:
    """Remove `.partial` when an error ends the block, unless another run can use it.

    It stays when other parts share it, when it holds a finished set that only has to be moved into place, when shards
    have been sent from it, and, with `keep_records`, when it holds a complete shard.
    """
    try:
        yield
    except BaseException:
        done = set_folder.records(partial) if keep_records else []
        if done or (outbox and outbox.has_sent):  # what is on its way arrives
            where = outbox.url if outbox else partial.parent
            say(f"{where}: stopped with {len(done)} shards written; run the same command again to continue")
        elif not shared and not (partial / MANIFEST).exists():
            shutil.rmtree(partial, ignore_errors=True)
            if outbox:
                outbox.discard()
        raise


def _stream(samples: Iterable[Sample], folder: Path, samples_per_shard: int, modalities: Counter[str]) -> list[Shard]:
    """Write samples as shards; count in `modalities` what they have, if any of them has more than an image and a text."""
    found = Counter[str]()
    shards: list[Shard] = []
    keys: set[str] = set()
    stream = counted(samples, found)
    for number in count():
        first = next(stream, None)
        if first is None:
            break
        some = chain([first], islice(stream, samples_per_shard - 1))
        shards.append(write_shard(folder / shard_name(number), some, keys))
    if found.keys() & {"audio", "video"} or found["image"] < len(keys):
        modalities.update(found)
    return shards


def _split_name(folder: Path, destination: Path) -> str:
    return "" if folder == destination else folder.name
