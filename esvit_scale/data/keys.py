"""Safe, unique keys for samples, from their paths.

A key is the path without the image's extension. If that has characters other than `A-Za-z0-9_-/`, is too long, or is
the key of an earlier sample, the characters are replaced, the key is cut, and a hash of the sample's name is added.
Repeated paths are found by 64-bit hashes, so ten million samples take 80 MB instead of all their paths. Two samples
that share a hash by chance still get different keys, one of them with a needless suffix.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.data.hashing import hash64, hash_all, repeated_indices
from esvit_scale.data.raster import ARRAY

SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
MAX_KEY = 90  # tar's plain header holds names of 100 bytes, with the extension


class Keys:
    """The keys of `n` samples: `keys[i]` is the key of sample i.

    Args:
        path: function that returns the path from which the key of sample i is made.
        name: function that returns the name of sample i, which is hashed; a repeated name is hashed with its number.
    """

    def __init__(self, n: int, path: Callable[[int], str], name: Callable[[int], str]) -> None:
        self._path, self._name = path, name
        later = repeated_indices(hash_all((_stem(path(i)) for i in range(n)), n))
        names = hash_all((name(i) for i in later.tolist()), len(later))
        self._taken = np.zeros(n, bool)
        self._taken[later] = True
        self._same_name = set(later[_shared(names)].tolist())

    def __getitem__(self, i: int) -> str:
        stem = _stem(self._path(i))
        key = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in stem.split("/"))
        if key == stem and SAFE_KEY.fullmatch(key) and len(key) <= MAX_KEY and not self._taken[i]:
            return key
        name = self._name(i) + (f"\0{i}" if i in self._same_name else "")
        suffix = hash64(name).to_bytes(8, "little").hex()
        short = re.sub("/+", "/", key[: MAX_KEY - 17]).strip("/")
        return f"{short}-{suffix}"


def keys_of(paths: Sequence[str]) -> list[str]:
    """Return the keys of samples with these paths."""
    keys = Keys(len(paths), paths.__getitem__, paths.__getitem__)
    return [keys[i] for i in range(len(paths))]


def _shared(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return a mask of the values that occur more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] > 1)


def _stem(path: str) -> str:
    folder, slash, base = path.rpartition("/")
    stem, dot, ext = base.rpartition(".")
    return folder + slash + (stem if dot and ext.lower() in (*EXTENSIONS, ARRAY) else base)
