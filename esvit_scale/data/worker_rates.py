"""How fast each loader process of a rank makes its parts."""

import statistics

SLOW = 0.25  # of the processes' median rate: such a one holds every batch up


class WorkerRates:
    """Collects `Batch.worker_rates` between two rows of the metrics."""

    def __init__(self) -> None:
        self._batches: list[tuple[float, ...]] = []

    def add(self, rates: tuple[float, ...]) -> None:
        self._batches.append(rates)

    def take(self) -> tuple[dict[str, float], str]:
        """Fields of a row, and a sentence about a process that is much slower than the others (or nothing); starts
        anew."""
        workers = [1 / statistics.fmean(1 / rate for rate in own) for own in zip(*self._batches, strict=True)]
        self._batches = []
        if not workers:
            return {}, ""
        fields = {"worker_images_per_s": statistics.fmean(workers), "worker_images_per_s_min": min(workers)}
        median, slowest = statistics.median(workers), workers.index(min(workers))
        if len(workers) < 3 or workers[slowest] > SLOW * median:
            return fields, ""
        return fields, (
            f"loader process {slowest} makes {workers[slowest]:.0f} images/s, the others {median:.0f}: every batch waits "
            "for it; is one of its shards on slow storage, or its core shared?"
        )
