"""Checking a training and a test set (classes, labels, shared images) before the long computation of features."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.evaluation import Items, items_of
from esvit_scale.data.manifest import is_shard_set
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import source_info
from esvit_scale.evaluate.labels import require_classes, require_training_samples
from esvit_scale.parallel import collectives

log = logging.getLogger(__name__)

COMPARED = 500  # number of test images, evenly spaced, that are looked for in the training set
BLOCK = 500  # number of consecutive training images in a block where only some blocks are looked through


class Shared(NamedTuple):
    """The images of a test set that were found in a training set, byte by byte the same."""

    images: int
    compared: int  # images of the test set that were looked for
    total: int  # images of the test set
    example: str  # where the first of them lies in the test set; "" if there is none

    def in_words(self) -> str:
        """Return how many images are shared, such as "371 of 500 compared images (of 714)"."""
        if self.compared == self.total:
            return f"{self.images:,} of {self.total:,} images"
        return f"{self.images:,} of {self.compared:,} compared images (of {self.total:,})"


def check_train_and_test(train: Sequence[Path], test: Path, what: str, classes: bool = True) -> None:
    """Check training sets and a test set, and log a warning about images that are in both. All ranks call it.

    To find shared images, only the content of images with equal file sizes is read.

    Args:
        train: the sets to learn from.
        what: name of the evaluation, for messages.
        classes: whether to check classes and labels; False if the labels come from a label file.

    Raises:
        UserError: a set has no classes, an image has no label, or a class of the test set has no training sample.
    """
    collectives.run_on_rank0_and_broadcast(lambda: _check(train, test, what, classes))


def _check(train: Sequence[Path], test: Path, what: str, classes: bool) -> None:
    if classes:
        require_classes([*train, test], what)
        there = {name for source in train for name in _classes_of(source, what)}
        require_training_samples(there, _classes_of(test, what))
    for source in train:
        if source.resolve() == test.resolve():
            log.warning("%s: train and test are the same set, so the result measures memory, not recognition", test)
        else:
            _warn_of_shared(source, test)


def _classes_of(source: Path, what: str) -> list[str]:
    """Return the names of the classes that have samples in a set, in the set's order.

    Raises:
        UserError: an image has no label.
    """
    names, items = source_info(source).classes, items_of(source, notes=False)
    labels = items.labels()
    if (first := labels.get(-1)) is not None:
        remedy = (
            "write the shards again, which leaves such images out"
            if is_shard_set(source)
            else "move it to the folder of its class, or out of the set"
        )
        raise UserError(f"{source}/{items.name(first)}: has no label, and {what} needs one for every image; {remedy}")
    return [names[i] for i in sorted(labels) if 0 <= i < len(names)]


def _warn_of_shared(train: Path, test: Path) -> None:
    """Log a warning if any of up to COMPARED test images has the same bytes as a training image."""
    if (shared := find_shared(train, test)).images:
        log.warning(
            "%s: %s have the same bytes as one of %s, for example %s, so the result partly measures memory",
            *(test, shared.in_words(), train, shared.example),
        )


def find_shared(train: Path, test: Path, most: int | None = None) -> Shared:
    """Look for up to COMPARED images of a test set, evenly spaced, in a training set.

    Args:
        train, test: image folders or shard sets.
        most: look through about this many training images, in evenly spaced blocks; None: through all.

    Raises:
        UserError: a set cannot be read.
    """
    test_items, train_items = items_of(test, notes=False), items_of(train, notes=False)
    compared = _evenly_spaced(len(test_items), COMPARED)
    by_size = defaultdict(list)
    sizes = {size for number in compared if (size := test_items.size(number)) is not None}
    for number in _in_blocks(len(train_items), most):
        if (size := train_items.size(number)) in sizes:
            by_size[size].append(number)
    digests = {_digest(train_items, number) for numbers in by_size.values() for number in numbers} - {None}
    shared = [n for n in compared if test_items.size(n) in by_size and _digest(test_items, n) in digests]
    example = test_items.name(shared[0]) if shared else ""
    return Shared(len(shared), len(compared), len(test_items), example)


def _evenly_spaced(n: int, most: int) -> list[int]:
    """Return up to `most` of the numbers 0 … n - 1, evenly spaced."""
    return sorted(set(np.linspace(0, n - 1, min(n, most)).round().astype(int).tolist())) if n else []


def _in_blocks(n: int, most: int | None) -> list[int]:
    """Return all numbers 0 … n - 1, or about `most` of them in evenly spaced blocks of consecutive ones."""
    if most is None or n <= most:
        return list(range(n))
    starts = _evenly_spaced(n - BLOCK + 1, max(1, most // BLOCK))
    return sorted({number for start in starts for number in range(start, start + BLOCK)})


def _digest(items: Items, number: int) -> bytes | None:
    """Return the SHA-256 of an image's bytes; None if it cannot be read."""
    try:
        return hashlib.sha256(items.read(number)[2]).digest()
    except (BadImage, OSError):
        return None
