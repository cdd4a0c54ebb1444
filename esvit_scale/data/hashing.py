"""The package's 64-bit hash of texts, for the order of samples, the train/val split and the search for equal names.

Its values are stored in manifests and decide the order of data, so they never change.
"""

import hashlib
import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def hash64(text: str) -> int:
    """Return a 64-bit BLAKE2b hash of a text, the same on every machine.

    Undecodable bytes of file names, which a text holds as surrogates, are hashed as they are.
    """
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def derive_seed(*values: int | str) -> int:
    """Return a 64-bit seed for a random draw that is identified by small plain values, such as (seed, epoch, "window", 3)."""
    return hash64(repr(values))


def hash_all(texts: Iterable[str], n: int) -> NDArray[np.uint64]:
    """Return the hashes [n] of `n` texts, which are hashed one at a time and not kept."""
    return np.fromiter((hash64(text) for text in texts), np.uint64, n)


def repeated_indices(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the sorted indices of repeated values: of all occurrences of a value but the first."""
    order = np.argsort(values, kind="stable")
    again = values[order[1:]] == values[order[:-1]]
    return np.sort(order[1:][again])
