"""Safe, unique keys for samples, from their paths.

A key is the path without the image's extension. Where that needs other characters than `A-Za-z0-9_-/`, is too long or
is taken by an earlier sample, those are replaced and a hash of the sample's name is added. Who is taken is known from
64-bit hashes, so ten million samples need 80 MB and not their paths; two that share a hash by chance both get
different keys all the same, one of them with a needless suffix.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from esvit_scale.data.decode import EXTENSIONS
from esvit_scale.data.raster import ARRAY

SAFE_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
MAX_KEY = 90  # tar's plain header holds names of 100 bytes, with the extension


class Keys:
    """`keys[i]` of sample i.

    Args:
        n: samples.
        path: of sample i, what the key is made from.
        name: of sample i, what the hash is of; a name that comes again is hashed with its number.
    """

    def __init__(self, n: int, path: Callable[[int], str], name: Callable[[int], str]) -> None:
        self._path, self._name = path, name
        later = repeated(hashes((_stem(path(i)) for i in range(n)), n))
        names = hashes((name(i) for i in later.tolist()), len(later))
        self._taken = np.zeros(n, bool)
        self._taken[later] = True
        self._same_name = set(later[_shared(names)].tolist())

    def __getitem__(self, i: int) -> str:
        stem = _stem(self._path(i))
        key = "/".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in stem.split("/"))
        if key == stem and SAFE_KEY.fullmatch(key) and len(key) <= MAX_KEY and not self._taken[i]:
            return key
        name = self._name(i) + (f"\0{i}" if i in self._same_name else "")
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        short = re.sub("/+", "/", key[: MAX_KEY - 17]).strip("/")
        return f"{short}-{digest}"


def keys_of(paths: Sequence[str]) -> list[str]:
    keys = Keys(len(paths), paths.__getitem__, paths.__getitem__)
    return [keys[i] for i in range(len(paths))]


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def hashes(texts: Iterable[str], n: int) -> NDArray[np.uint64]:
    return np.fromiter((hash64(text) for text in texts), np.uint64, n)


def repeated(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a value stands that stood before, in order."""
    order = np.argsort(values, kind="stable")
    again = values[order[1:]] == values[order[:-1]]
    return np.sort(order[1:][again])


def _shared(values: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values stand more than once."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] > 1)


def _stem(path: str) -> str:
    folder, slash, base = path.rpartition("/")
    stem, dot, ext = base.rpartition(".")
    return folder + slash + (stem if dot and ext.lower() in (*EXTENSIONS, ARRAY) else base)
