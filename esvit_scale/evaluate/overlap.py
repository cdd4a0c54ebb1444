"""Checking a training and a test set (classes, labels, shared images) before the long computation of features."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.evaluation import Items, items_of
from esvit_scale.data.manifest import is_shard_set
from esvit_scale.errors import UserError
from esvit_scale.evaluate.features import source_info
from esvit_scale.evaluate.labels import require_classes, require_training_samples
from esvit_scale.parallel import collectives

log = logging.getLogger(__name__)

COMPARED = 500  # number of test images, evenly spaced, that are looked for in the training set


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
    test_items, train_items = items_of(test, notes=False), items_of(train, notes=False)
    step = max(1, len(test_items) // COMPARED)
    compared = range(0, len(test_items), step)[:COMPARED]
    by_size = defaultdict(list)
    sizes = {size: number for number in compared if (size := test_items.size(number)) is not None}
    for number in range(len(train_items)):
        if (size := train_items.size(number)) in sizes:
            by_size[size].append(number)
    digests = {_digest(train_items, number) for numbers in by_size.values() for number in numbers} - {None}
    shared = [n for n in compared if test_items.size(n) in by_size and _digest(test_items, n) in digests]
    if shared:
        of = f"all {len(test_items)}" if step == 1 else f"{len(compared)} compared of {len(test_items)}"
        log.warning(
            "%s: %d images (%s test images) have the same bytes as one of %s, for example %s, so the result partly "
            "measures memory",
            *(test, len(shared), of, train, test_items.name(shared[0])),
        )


def _digest(items: Items, number: int) -> bytes | None:
    """Return the SHA-256 of an image's bytes; None if it cannot be read."""
    try:
        return hashlib.sha256(items.read(number)[2]).digest()
    except (BadImage, OSError):
        return None
