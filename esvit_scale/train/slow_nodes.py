"""Detection of a node that is slow all the time.

Because ranks wait for each other in collectives, every rank's step takes as long as the slowest rank's. Only the time
before the first collective tells which rank is slow.
"""

import os
import socket
import statistics

from esvit_scale.parallel import collectives

SLOWER = 1.2  # a rank is slow if it computes for this many times the median of all ranks
FOR_STEPS = 100
BLOCK = 10  # steps whose sum is compared, at least: a single step varies


class SlowNodes:
    """A comparison of the ranks' compute times, updated at every row of the metrics. All ranks make the same calls."""

    def __init__(self) -> None:
        self._nodes: list[str] = []
        self._step: int | None = None  # of the last row
        self._block, self._sums = 0, [0.0]  # steps, and seconds by rank
        self._suspect, self._slow_for, self._blocks = "", 0, 0
        self._named: set[str] = set()

    def observe(self, step: int, seconds: float) -> tuple[dict[str, float | str], str]:
        """Compare the seconds that each rank computed in step `step`.

        Returns:
            The fields of the row: `compute_s_max` with its `slowest_node`, and `compute_s_median` (for an even number
            of ranks the lower of the middle two, so that two ranks are compared with each other). And a warning when
            one node was at least 20 % above the median for 100 steps in a row, once for each node; otherwise an empty
            string.
        """
        if not self._nodes:
            self._nodes = collectives.gather_objects(os.environ.get("SLURMD_NODENAME") or socket.gethostname())
            self._sums = [0.0] * len(self._nodes)
        times = collectives.gather_objects(seconds)
        fields: dict[str, float | str] = {
            "compute_s_max": max(times),
            "compute_s_median": statistics.median_low(times),
            "slowest_node": self._nodes[times.index(max(times))],
        }
        steps = step - self._step if self._step is not None and step > self._step else 1
        self._step = step
        return fields, self._compare(steps, times)

    def _compare(self, steps: int, times: list[float]) -> str:
        self._block += steps
        self._sums = [total + steps * own for total, own in zip(self._sums, times, strict=True)]
        if self._block < BLOCK:
            return ""
        slowest, median = max(self._sums), statistics.median_low(self._sums)
        node = self._nodes[self._sums.index(slowest)]
        if slowest < SLOWER * median or node != self._suspect:
            self._suspect, self._slow_for, self._blocks = node, 0, 0
        if slowest >= SLOWER * median > 0:
            self._slow_for, self._blocks = self._slow_for + self._block, self._blocks + 1
        share = slowest / median - 1 if median else 0.0
        self._block, self._sums = 0, [0.0] * len(times)
        if self._slow_for < FOR_STEPS or self._blocks < 3 or node in self._named:
            return ""
        self._named.add(node)
        return (
            f"{node} has been the slowest for {self._slow_for} steps, {share:.0%} above the median rank before the first "
            f"exchange; every step waits for it. Check its clock rates, cores and disk, or exclude it (sbatch --exclude={node})"
        )
