"""Checks of the labels that a run learns from (`objective.classes`), before its first step and in every batch."""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from esvit_scale.config import Config
from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.stream import Batch, TrainingData
from esvit_scale.errors import UserError

LOOKED_THROUGH = 100_000  # labels of a set that are read before training, spread evenly over it: about a second
NAMED = 3  # keys that a message names


def check(config: Config, data: TrainingData) -> None:
    """Check the labels of the training data before training; nothing is checked where the run learns none.

    The labels of plain tars and of sets in object stores are checked as they come, batch by batch.

    Raises:
        UserError: a set names other classes than the config, a sample has no label or one out of range, or all samples
            are of one class.
    """
    if not config.objective.classes:
        return
    sets = [one.manifest for one in data.sets] if isinstance(data, MixedSets) else []
    sets = [data] if isinstance(data, Manifest) else sets
    seen: set[int] = set()
    for manifest in sets:
        _check_names(config, manifest)
        if manifest.remote:
            return
        for key, label in _labels(manifest):
            if problem := _problem(config, label):
                raise UserError(f"{manifest.root}: sample {key}: {problem}")
            seen.add(label)
    if sets and len(seen) == 1:
        names = config.objective.class_names
        (label,) = seen
        raise UserError(
            f"data.train: all samples are of one class, {names[label] if names else label}; classification needs two"
        )


def bad_keys(config: Config, batch: Batch) -> list[str]:
    """Return "KEY: what is wrong" for the samples of a batch with labels from which nothing can be learned, a few at most."""
    if not config.objective.classes:
        return []
    found = ((key, _problem(config, label)) for key, label in zip(batch.keys, batch.labels.tolist(), strict=True))
    return list(islice((f"{key}: {problem}" for key, problem in found if problem), NAMED))


def _check_names(config: Config, manifest: Manifest) -> None:
    names = config.objective.class_names
    if names and manifest.classes and tuple(names) != manifest.classes:
        raise UserError(
            f"{manifest.root}: its classes are not those of objective.class_names; class numbers would mean other classes"
        )


def _problem(config: Config, label: int) -> str:
    """Return what is wrong with a label, or ""."""
    classes = config.objective.classes
    if label < 0:
        return "has no label; write the set from class folders or a table with labels, or leave the sample out"
    if label >= classes:
        return f"label {label} is out of range: objective.classes={classes} allows 0 to {classes - 1}"
    return ""


def _labels(manifest: Manifest) -> Iterator[tuple[str, int]]:
    """Yield keys and labels of at most LOOKED_THROUGH samples; damaged ones are left to the loader."""
    reader, starts = ShardReader(manifest), np.cumsum([0, *manifest.shards.samples])
    count = min(manifest.samples, LOOKED_THROUGH)
    try:
        for number in np.linspace(0, manifest.samples - 1, count).round().astype(int).tolist():
            shard = int(np.searchsorted(starts, number, side="right")) - 1
            try:
                entry = reader.entry(shard, number - int(starts[shard]))
                yield entry.key, reader.label(shard, entry)
            except (BadImage, OSError):
                continue
    finally:
        reader.close()
