"""The shards of a set in columns: arrays in the place of objects, so that 500,000 shards take about 50 MB.

Loader processes share these arrays with the process that they were forked from: looking at them writes nothing, whereas
looking at a Python object counts a reference to it, for which its page of memory is copied.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096  # rows that are Python objects at a time
DIGEST = 32  # bytes of a sha256, whose text has two digits for each


class Shard(NamedTuple):
    """One tar of a set, as the manifest describes it."""

    name: str  # file name in the set's folder
    samples: int
    bytes: int
    sha256: str
    index_sha256: str = ""  # of its index, which has checksums (INDEX_VERSION); "" where it has none


class Texts(Sequence[str]):
    """A column of texts in one piece of memory; if all are sha256 sums, they are stored as bytes instead of digits."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._data = bytearray()
        self._ends: array[int] | None = None  # where each text ends; None: all are sha256 sums
        self.extend(texts)

    def extend(self, texts: Sequence[str]) -> None:
        """Append texts."""
        digests = _digests(texts) if self._ends is None else None
        if digests is not None:
            self._data += digests
            return
        if self._ends is None:
            count = len(self)
            self._data = bytearray(self._data.hex().encode())
            self._ends = array("q", range(2 * DIGEST, 2 * DIGEST * (count + 1), 2 * DIGEST))
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._ends.extend(accumulate(map(len, encoded), initial=len(self._data)))
        del self._ends[-len(encoded) - 1]  # where the first one begins
        self._data += b"".join(encoded)

    def __len__(self) -> int:
        return len(self._data) // DIGEST if self._ends is None else len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Texts([self[k] for k in range(len(self))[i]])
        i = range(len(self))[i]
        if self._ends is None:
            return self._data[DIGEST * i : DIGEST * (i + 1)].hex()
        start = self._ends[i - 1] if i else 0
        return self._data[start : self._ends[i]].decode("utf-8", "surrogatepass")

    @property
    def has_empty(self) -> bool:
        """Return whether a text is empty."""
        return self._ends is not None and bool((np.diff(self._ends, prepend=0) == 0).any())


class ShardTable(Sequence[Shard]):
    """The shards of a set, in the manifest's order, as columns that are named like the fields of Shard."""

    def __init__(self, shards: Iterable[Shard] = ()) -> None:
        self.names, self.sha256, self.index_sha256 = Texts(), Texts(), Texts()
        self._samples, self._bytes = array("q"), array("q")
        rows = iter(shards)
        while block := list(islice(rows, BLOCK)):
            self.extend(*zip(*block, strict=True))

    def extend(
        self,
        names: Sequence[str],
        samples: Sequence[int],
        bytes: Sequence[int],
        sha256: Sequence[str],
        index_sha256: Sequence[str],
    ) -> None:
        """Append shards, given by columns.

        Raises:
            OverflowError: a number is larger than 2⁶³ − 1.
        """
        self.names.extend(names)
        self._samples.extend(samples)
        self._bytes.extend(bytes)
        self.sha256.extend(sha256)
        self.index_sha256.extend(index_sha256)

    @property
    def samples(self) -> NDArray[np.int64]:
        """Return the number of samples of every shard [N]."""
        return np.frombuffer(self._samples, np.int64)

    @property
    def bytes(self) -> NDArray[np.int64]:
        """Return the size of every shard [N], in bytes."""
        return np.frombuffer(self._bytes, np.int64)

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, i: int) -> Shard: ...

    @overload
    def __getitem__(self, i: slice) -> "ShardTable": ...

    def __getitem__(self, i: int | slice) -> "Shard | ShardTable":
        if isinstance(i, slice):
            return ShardTable(self[k] for k in range(len(self))[i])
        return Shard(self.names[i], self._samples[i], self._bytes[i], self.sha256[i], self.index_sha256[i])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash((len(self), self.names[0]) if self else 0)


def _digests(texts: Sequence[str]) -> bytes | None:
    """Return the bytes of texts that are all sha256 sums in lower-case digits; None if one is not."""
    if any(len(text) != 2 * DIGEST for text in texts):
        return None
    whole = "".join(texts)
    try:
        data = bytes.fromhex(whole)
    except ValueError:
        return None
    return data if data.hex() == whole else None
