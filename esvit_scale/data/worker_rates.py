"""Monitoring of a rank's loader processes: images/s of each, and a warning about one that is much slower."""

import statistics

SLOW = 0.25  # a process below this fraction of the median rate holds every batch up


class WorkerRates:
    """An accumulator of `Batch.worker_rates` between two rows of the metrics."""

    def __init__(self) -> None:
        self._batches: list[tuple[float, ...]] = []

    def add(self, rates: tuple[float, ...]) -> None:
        """Add the rates (images/s) of one batch's workers."""
        self._batches.append(rates)

    def take(self) -> tuple[dict[str, float], str]:
        """Return fields for a row of the metrics and a warning about a much slower process ("" if none), and reset."""
        workers = [1 / statistics.fmean(1 / rate for rate in own) for own in zip(*self._batches, strict=True)]
        self._batches = []
        if not workers:
            return {}, ""
        fields = {"worker_images_per_s": statistics.fmean(workers), "worker_images_per_s_min": min(workers)}
        median, slowest = statistics.median(workers), workers.index(min(workers))
        if len(workers) < 3 or workers[slowest] > SLOW * median:
            return fields, ""
        return fields, (
            f"loader process {slowest} makes {workers[slowest]:.0f} images/s, the others about {median:.0f}: every batch "
            "waits for it; is one of its shards on slow storage, or does it share its core?"
        )
