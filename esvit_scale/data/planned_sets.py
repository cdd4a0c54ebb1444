"""Planning of shard sets: which sets are made from a source (one, or `train` and `val`), and of which samples."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esvit_scale import files
from esvit_scale.data.duplicates import duplicates
from esvit_scale.data.image_folder import printable
from esvit_scale.data.keys import Keys
from esvit_scale.data.left_out import DUPLICATE, IMAGES, NOT_CHOSEN, NOT_KEPT, LeftOut
from esvit_scale.data.planned_shard import Bad
from esvit_scale.data.shard_plan import Recipe, ShardPlan, balanced, keep_listed, split
from esvit_scale.data.sources import SourceOptions, open_source
from esvit_scale.data.sources.base import Source
from esvit_scale.errors import UserError
from esvit_scale.progress import say


class PlannedSet(NamedTuple):
    """A shard set to be written from a source: the only one, `train` or `val`."""

    source: Source
    keys: Keys
    chosen: NDArray[np.int64]  # numbers, in the source, of the set's samples, ascending
    left_out: LeftOut  # what is known to be left out before an image is read


def planned_sets(where: str, options: SourceOptions, recipe: Recipe) -> dict[str, PlannedSet]:
    """Return the sets to be written from a source, by name (empty for a single set), without reading an image.

    Raises:
        UserError: the source cannot be opened, a split is empty, or a keep-list belongs to another source.
    """
    sources = open_source(where, options)
    for line in chain.from_iterable(source.notes for source in sources.values()):
        say(printable(line))
    if recipe.val_fraction and len(sources) > 1:
        raise UserError(
            f"--val-fraction: {where} is divided into {' and '.join(sources)} already; leave the option out"
        )
    sets: dict[str, PlannedSet] = {}
    for name, source in sources.items():
        keys = Keys(len(source), source.path, source.name)
        chosen = keep_listed(source, recipe.keep, where) if recipe.keep else np.arange(len(source))
        if recipe.label_fraction < 1 and (labels := source.labels()) is not None:
            chosen = balanced(keys, labels, chosen, recipe)
        parts = split(keys, chosen, recipe) if recipe.val_fraction else {name: chosen}
        left = LeftOut(source.left_out.rows())
        if len(chosen) < len(source):
            first = int(np.setdiff1d(np.arange(len(source)), chosen, assume_unique=True)[0])
            left.add(
                IMAGES,
                NOT_KEPT if recipe.keep else NOT_CHOSEN,
                printable(source.name(first)),
                len(source) - len(chosen),
                asked=True,
            )
        for part, numbers in parts.items():
            sets[part] = PlannedSet(source, keys, numbers, left)
            left = LeftOut()  # only the first set lists what the source leaves out
    return sets


def plan_of(
    planned: PlannedSet, recipe: Recipe, workers: int, cache: Path | None = None
) -> tuple[ShardPlan, list[Bad]]:
    """Return the shard plan of a set, and a quarantine row for each duplicate that the plan leaves out.

    Args:
        cache: file in which the list of duplicates is stored, since finding them reads all samples.
    """
    source, chosen = planned.source, planned.chosen
    rows: list[Bad] = []
    if recipe.drop_duplicates:
        pairs = _cached(cache, lambda: duplicates(source, chosen, workers))
        names = [[printable(source.name(i)) for i in pair] for pair in pairs.tolist()]
        rows = [
            {"file": dropped, "reason": f"the same bytes as {first}", "kind": DUPLICATE} for dropped, first in names
        ]
        chosen = np.setdiff1d(chosen, pairs[:, 0], assume_unique=True)
    return ShardPlan(source, planned.keys, recipe, chosen), rows


def _cached(cache: Path | None, find: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
    if cache is None or not cache.exists():
        found = find()
        if cache is None:
            return found
        with files.replacing(cache) as tmp, tmp.open("wb") as file:
            np.save(file, found)
    return np.asarray(np.load(cache))
