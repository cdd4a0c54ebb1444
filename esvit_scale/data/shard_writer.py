"""Images → WebDataset tars with a manifest, by any number of processes and jobs.

What goes where is planned before anything is read (shard_plan.py), so every shard is written on its own
(planned_shard.py) and an interrupted run goes on with the shards it has not written (set_folder.py). The same source
and options give the same bytes.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial as bind
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale.data import manifest as manifests
from esvit_scale.data import pool, set_folder
from esvit_scale.data.image_folder import printable
from esvit_scale.data.keys import keys_of
from esvit_scale.data.left_out import ARCHIVES, CUT, LeftOut, of_bad, refuse
from esvit_scale.data.manifest import MANIFEST, Manifest, Shard
from esvit_scale.data.planned_sets import PlannedSet, plan_of, planned_sets
from esvit_scale.data.planned_shard import shard_name, write_planned
from esvit_scale.data.set_folder import PARTIAL, Intent, NoSamples
from esvit_scale.data.shard_file import Sample, write_shard
from esvit_scale.data.shard_plan import SAMPLES_PER_SHARD, Recipe, ShardPlan, fingerprint
from esvit_scale.data.shard_verify import verify
from esvit_scale.data.sources import SourceOptions, source_record
from esvit_scale.division import share
from esvit_scale.errors import UserError
from esvit_scale.progress import say

__all__ = ["Sample", "create", "keys_of", "merge", "verify", "write_samples", "write_source"]

SAID = 20  # bad images that are named on stderr; all are in the quarantine


class Part(NamedTuple):
    """The i-th of n parts of a set's shards, 1 ≤ i ≤ n."""

    i: int
    n: int

    def of(self, shards: int) -> range:
        return range(shards)[share(shards, self.i - 1, self.n)]


def create(source: Path, destination: Path, samples_per_shard: int = SAMPLES_PER_SHARD, seed: int = 0) -> Manifest:
    """A folder of images as one shard set, with everything else as `esvit-scale shards create` has it by default."""
    if samples_per_shard < 1:
        raise UserError(f"samples per shard: {samples_per_shard} is not a count; nearest: 1")
    recipe = Recipe(samples_per_shard=samples_per_shard, seed=seed)
    return write_source(str(source), Path(destination), SourceOptions(kind="folder"), recipe)[""]


def write_source(
    where: str,
    destination: Path,
    options: SourceOptions,
    recipe: Recipe,
    workers: int = 1,
    part: Part | None = None,
    strict: bool = False,
) -> dict[str, Manifest]:
    """Write a source as a shard set, or as the sets `train` and `val` in folders of these names.

    A file that cannot be used is left out and is a row of quarantine.jsonl. A destination that already holds the set of
    the same source and options is left as it is; one that holds part of it is completed.

    Args:
        part: write only this part of every set's shards, and leave the manifest to `merge`.
        strict: everything in the source must be used, but for what the recipe leaves out by itself.

    Returns:
        Manifests by split, the empty name for a single set; empty after a part.

    Raises:
        UserError: source missing or without usable images, destination in use or holding something else; with
            `strict`, something is left out: of the listing before anything is written, of the images at the end.
        RestartCanHelp: the source's file system is gone, or a worker was killed.
    """
    sets = planned_sets(where, options, recipe)
    if strict:
        refuse([planned.left_out for planned in sets.values()], where)
    if part and recipe.drop_duplicates:
        raise UserError(
            "--drop-duplicates with --shard-range would read everything once per part; run "
            f"`esvit-scale shards duplicates {where} --out keep.txt` first and give every part --keep keep.txt"
        )
    _refuse_nested(destination, list(sets))
    finished = {}
    for name, planned in sets.items():
        record = {"source": source_record(options), "recipe": recipe.record(), "split": name}
        manifest = _write_set(planned, destination / name, where, recipe, record, workers, part, strict)
        if manifest is not None:
            finished[name] = manifest
    return finished


def _refuse_nested(destination: Path, names: list[str]) -> None:
    """Raises UserError where a set would be written inside another, or one of another number of parts stands."""
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


def merge(destination: Path, strict: bool = False) -> dict[str, Manifest]:
    """The manifest of a set (or of `train` and `val`) whose parts have all been written, and everything into place.

    Raises:
        UserError: parts are missing, or there is nothing to finish.
    """
    folders = [f for f in (destination, destination / "train", destination / "val") if f.is_dir()]
    unfinished = [f for f in folders if (f / PARTIAL).is_dir()]
    if not unfinished:
        done = [f for f in folders if manifests.is_shard_set(f)]
        if not done:
            raise UserError(
                f"{destination}: no parts of a shard set in it; write them with `shards create --shard-range i/n`"
            )
        for folder in done:
            say(f"{folder}: is finished; nothing to do")
        return {_split_name(f, destination): manifests.load(f) for f in done}
    finished = {}
    for folder in unfinished:
        with set_folder.held(folder):
            intent = set_folder.read_intent(folder)
            set_folder.settle(folder, intent.fingerprint if intent else None)
            if manifests.is_shard_set(folder):
                finished[_split_name(folder, destination)] = manifests.load(folder)
            elif intent is None:
                raise UserError(f"{folder}: no plan of a shard set in it; run its parts again")
            else:
                finished[_split_name(folder, destination)] = _finished(folder, intent, str(folder), strict)
    return finished


def write_samples(
    samples: Iterable[Sample],
    destination: Path,
    classes: Sequence[str] = (),
    samples_per_shard: int = SAMPLES_PER_SHARD,
    source: str = "",
) -> Manifest:
    """Write samples that a program made, in their order, as a shard set.

    Args:
        source: says what the samples are; a destination that holds a set of the same source is left as it is.

    Raises:
        UserError: no samples, or a destination in use or holding something else.
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
                shards = _stream(samples, partial, samples_per_shard)
                if not shards:
                    raise UserError(f"{destination}: no samples to write")
                set_folder.publish(partial, shards, classes, source, {})
    except OSError as error:
        raise UserError(f"{error.filename or destination}: {error.strerror or error}") from error
    return manifests.load(destination)


def _write_set(
    planned: PlannedSet,
    destination: Path,
    where: str,
    recipe: Recipe,
    options: dict[str, Any],
    workers: int,
    part: Part | None,
    strict: bool,
) -> Manifest | None:
    source = planned.source
    identity = fingerprint(source, recipe, planned.chosen)
    partial = destination / PARTIAL
    try:
        with set_folder.held(destination, f"part-{part.i}-of-{part.n}" if part else ""):
            set_folder.settle(destination, identity, shared=part is not None)
            if manifests.is_shard_set(destination):
                found = set_folder.existing(destination, identity)
                if strict:
                    refuse([LeftOut(found.left_out)], str(destination))
                return found
            with _removed_on_failure(partial, keep_records=True, shared=part is not None):
                partial.mkdir(exist_ok=True)
                plan, known = plan_of(planned, recipe, workers, partial / "duplicates.npy")
                known += [_archive_row(file, reason) for file, reason in source.damaged]
                listed = planned.left_out.rows()
                intent = Intent(identity, plan.shards, plan.samples, source.classes, options, known, listed)
                begun = set_folder.read_intent(destination)
                if begun is None:
                    set_folder.write_intent(destination, intent)
                elif begun.classes != source.classes:
                    raise UserError(
                        f"{destination}: was begun by a version that numbered the classes otherwise; delete {partial} to "
                        "begin again"
                    )
                _write_shards(plan, partial, part, workers)
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


def _write_shards(plan: ShardPlan, partial: Path, part: Part | None, workers: int) -> None:
    ours = part.of(plan.shards) if part else range(plan.shards)
    done = set(set_folder.records(partial))
    left = [number for number in ours if number not in done]
    if len(left) < len(ours):
        say(f"{partial.parent}: {len(ours) - len(left)} of {len(ours)} shards are there; going on with the rest")
    set_folder.clear_asides(partial, left)
    samples = sum(plan.count(range(number, number + 1)) for number in left)
    said = 0
    try:
        for number, written in pool.each(bind(write_planned, plan, partial), left, workers, samples, "images"):
            set_folder.write_record(partial, number, written)
            for row in written.bad:
                said += 1
                if said <= SAID:
                    say(f"{row['file']}: left out: {row['reason']}")
    finally:
        if said > SAID:
            say(f"and {said - SAID} more left out; {set_folder.QUARANTINE} names all of them")


def _archive_row(file: str, reason: str) -> dict[str, Any]:
    """A row of the quarantine for an archive of which only a part can be read."""
    return {"file": printable(file), "reason": reason, "what": ARCHIVES, "kind": CUT}


def _finished(destination: Path, intent: Intent, where: str, strict: bool) -> Manifest:
    try:
        return set_folder.finish(destination, intent, strict)
    except NoSamples as error:
        shutil.rmtree(destination / PARTIAL)
        raise UserError(f"{where}: none of its {intent.samples} image files can be used (first: {error})") from None


@contextmanager
def _removed_on_failure(partial: Path, keep_records: bool = False, shared: bool = False) -> Iterator[None]:
    """`.partial` is worth keeping when a shard in it is whole, or when all is done but moving it into place."""
    try:
        yield
    except BaseException:
        done = set_folder.records(partial) if keep_records else []
        if done:
            say(f"{partial.parent}: stopped with {len(done)} shards written; the same command goes on from here")
        elif partial.exists() and not shared and not (partial / MANIFEST).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _stream(samples: Iterable[Sample], folder: Path, samples_per_shard: int) -> list[Shard]:
    shards: list[Shard] = []
    keys: set[str] = set()
    stream = iter(samples)
    for number in count():
        first = next(stream, None)
        if first is None:
            break
        some = chain([first], islice(stream, samples_per_shard - 1))
        shards.append(write_shard(folder / shard_name(number), some, keys))
    return shards


def _split_name(folder: Path, destination: Path) -> str:
    return "" if folder == destination else folder.name
