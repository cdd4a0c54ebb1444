"""Monitoring of a rank's loader processes: images/s of each, and a warning about one that is much slower."""

import statistics
from collections import defaultdict
from collections.abc import Mapping

SLOW = 0.25  # a process below this fraction of the median rate holds every batch up


class WorkerRates:
    """An accumulator of `Batch.worker_rates` between two rows of the metrics."""

    def __init__(self) -> None:
        self._rates: dict[int, list[float]] = defaultdict(list)

    def add(self, rates: Mapping[int, float]) -> None:
        """Add the rates (worker → images/s) of those workers that made parts of one batch."""
        for worker, rate in rates.items():
            self._rates[worker].append(rate)

    def take(self) -> tuple[dict[str, float], str]:
        """Return fields for a row of the metrics and a warning about a much slower process ("" if none), and reset."""
        workers = {worker: statistics.harmonic_mean(own) for worker, own in self._rates.items()}
        self._rates.clear()
        if not workers:
            return {}, ""
        rates = workers.values()
        fields = {"worker_images_per_s": statistics.fmean(rates), "worker_images_per_s_min": min(rates)}
        median, slowest = statistics.median(rates), min(workers, key=workers.__getitem__)
        if len(workers) < 3 or workers[slowest] > SLOW * median:
            return fields, ""
        return fields, (
            f"loader process {slowest} makes {workers[slowest]:.0f} images/s, the others about {median:.0f}: every batch "
            "waits for it; is one of its shards on slow storage, or does it share its core?"
        )
