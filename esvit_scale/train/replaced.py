"""The share of images that were replaced because they could not be decoded. A run stops when it is too large."""

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

MAX_SHARE = 0.05  # above it the run would learn from other data than its config names
MIN_REPLACED = 4  # fewer never stop a run: one bad file of a tiny set is no reason
WINDOW = 10_000  # the share is that of the last so many images; it is judged once this many, or one epoch, are seen


class ReplacedShare:
    """The share of replaced images among the last WINDOW images; every rank counts the same.

    Args:
        batch: images per step over all ranks.
        epoch_steps: steps per epoch.
    """

    def __init__(self, batch: int, epoch_steps: int) -> None:
        self._batch, self._window = batch, max(WINDOW // batch, 1)
        self._judged_from = min(epoch_steps, self._window)  # steps
        self._seen = 0
        self._replaced: deque[tuple[int, int]] = deque()  # (step, images), of steps with any
        self._reasons: Counter[str] = Counter()
        self._example = ""

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add a step's bad samples, of all ranks. Each is one replaced image, unless it was a replacement itself."""
        self._seen += 1
        replaced = [row for row in rows if not row.get("used") and not row.get("stand_in") and row["key"]]
        if replaced:
            self._replaced.append((self._seen, len(replaced)))
            self._reasons.update(str(row["reason"]) for row in replaced)
            self._example = self._example or f"{replaced[0]['key']} in {replaced[0]['shard']}"
        while self._replaced and self._replaced[0][0] <= self._seen - self._window:
            self._replaced.popleft()

    def problem(self) -> str:
        """Return a message that says why too many images were replaced; empty while the share is acceptable."""
        number = sum(images for _, images in self._replaced)
        images = min(self._seen, self._window) * self._batch
        if self._seen < self._judged_from or number < MIN_REPLACED or number <= MAX_SHARE * images:
            return ""
        why, times = self._reasons.most_common(1)[0]
        return (
            f"data: {number} of the last {images} images ({100 * number / images:.0f} %, over {100 * MAX_SHARE:.0f} %) could "
            f"not be used and were replaced by others; most frequent reason ({times} times): {why}; the first was "
            f"{self._example}; all are in quarantine.jsonl. `esvit-scale shards create` writes a set without such images"
        )
