"""The share of a run's images that stand in the place of ones that could not be decoded; too many of them stop it."""

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

MOST = 0.05  # of the images: above it the run learns from other data than its config names
FEWEST = 4  # replaced images, so that one bad file of a tiny set is no reason
WINDOW = 10_000  # images that the share is taken of; before so many, or an epoch, were seen there is no verdict


class ReplacedShare:
    """Counts replaced images over the last WINDOW images; every rank counts the same.

    Args:
        batch: images of a step over all ranks.
        epoch_steps: steps of an epoch.
    """

    def __init__(self, batch: int, epoch_steps: int) -> None:
        self._batch, self._window = batch, max(WINDOW // batch, 1)
        self._judged_from = min(epoch_steps, self._window)  # steps
        self._seen = 0
        self._replaced: deque[tuple[int, int]] = deque()  # (step, images), of steps with any
        self._reasons: Counter[str] = Counter()
        self._example = ""

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Note a step's bad samples, of all ranks: one replaced image for each that is no stand-in itself."""
        self._seen += 1
        replaced = [row for row in rows if not row.get("used") and not row.get("stand_in") and row["key"]]
        if replaced:
            self._replaced.append((self._seen, len(replaced)))
            self._reasons.update(str(row["reason"]) for row in replaced)
            self._example = self._example or f"{replaced[0]['key']} in {replaced[0]['shard']}"
        while self._replaced and self._replaced[0][0] <= self._seen - self._window:
            self._replaced.popleft()

    def problem(self) -> str:
        """What is wrong, in a sentence for the person whose data it is; empty when the share is bearable."""
        number = sum(images for _, images in self._replaced)
        images = min(self._seen, self._window) * self._batch
        if self._seen < self._judged_from or number < FEWEST or number <= MOST * images:
            return ""
        why, times = self._reasons.most_common(1)[0]
        return (
            f"data: {number} of the last {images} images ({100 * number / images:.0f} %, over {100 * MOST:.0f} %) could "
            f"not be used and others took their places; most often ({times}): {why}; the first: {self._example}; all are in "
            "quarantine.jsonl. `esvit-scale shards create` writes a set without such images"
        )
