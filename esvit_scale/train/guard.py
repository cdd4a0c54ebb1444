"""The guard of a run that starts from weights: it notices when training makes the features on held-out images worse.

Every `train.knn_every` steps it compares what was measured on data.held_out with the value at the start. Where the images
have labels this is the k-NN accuracy. Otherwise there are two measures, of which either is enough: the effective rank of
the features (RankMe), and the fraction of each image's nearest neighbours that it had at the start. They tell destroyed
features from useful ones, but cannot tell good features from better ones.

Everything here is text and numbers, without torch; structure.py computes the measures without labels.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from esvit_scale import config as configs

# Measure, as its field in metrics.jsonl → the fall that is tolerated by default, and its name in words.
MEASURES = {
    "knn_top1": (0.05, "the k-NN accuracy"),
    "held_out_rank": (0.5, "the effective rank of the features"),
    "neighbours_kept": (0.7, "the fraction of neighbours kept from the start"),
}
BELOW = "guard_below"  # field of metrics.jsonl: how many measurements in a row, up to this one, were below

Measured = tuple[int, Mapping[str, float]]


class Guard:
    """The measurements of a run on its held-out images, compared with the first of them."""

    def __init__(self, config: configs.Train, measured: Iterable[Measured] = ()) -> None:
        """
        Args:
            measured: the measurements of earlier starts on the same images: (step, measure → value) in order.
        """
        self._config, self.measured = config, list(measured)

    def add(self, step: int, values: Mapping[str, float]) -> dict[str, Any]:
        """Add what was measured at a step, and return the field for its row of metrics.jsonl."""
        self.measured.append((step, values))
        return {BELOW: self.below}

    def cut(self, step: int) -> None:
        """Forget the measurements after `step`."""
        self.measured = [found for found in self.measured if found[0] <= step]

    @property
    def below(self) -> int:
        """The number of measurements in a row, up to the last, that fell further below the first than is tolerated."""
        count = 0
        for _, values in reversed(self.measured[1:]):
            if not self._fallen(values):
                break
            count += 1
        return count

    @property
    def has_fallen(self) -> bool:
        """Whether `train.guard_checks` measurements in a row, up to the last, were below."""
        return self.below >= self._config.guard_checks

    def holds_at(self, step: int) -> bool:
        """Return whether the last measurement was at `step`, after the first, and is not below."""
        return len(self.measured) > 1 and self.measured[-1][0] == step and not self.below

    def begins(self) -> str | None:
        """Return what is to be said when the last measurement is the one with which the features count as fallen."""
        return self.sentence() if self.below == self._config.guard_checks else None

    def sentence(self) -> str:
        """Return a sentence that says by how much the last measurement is below the first."""
        (begin, start), (step, values) = self.measured[0], self.measured[-1]
        parts = [
            f"{MEASURES[name][1]} is {_in_words(name, values[name])} at step {step}, {_in_words(name, start[name])} at step "
            f"{begin}"
            for name in self._fallen(values) or start
        ]
        return (
            f"the features are worse than at the start: {'; '.join(parts)}, {self.below} measurements in a row below what "
            "train.guard tolerates; try a lower optim.lr, optim.layer_decay=0.75, or more optim.freeze_trunk_steps"
        )

    def _fallen(self, values: Mapping[str, float]) -> list[str]:
        """Return the measures whose value is too far below the first one, or is no number."""
        _, start = self.measured[0]
        fall = self._config.guard_fall
        return [
            name
            for name in start
            if not values[name] >= (1 - (MEASURES[name][0] if fall is None else fall)) * start[name]
        ]


def measured_in(rows: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """Return the measurements without labels in rows of metrics.jsonl: those on the images that were measured last."""
    names = ("held_out_rank", "neighbours_kept")
    found: list[Measured] = []
    for row in rows:
        if all(isinstance(row.get(name), float) for name in names):
            if "knn_held_out" in row:
                found = []
            found.append((row["step"], {name: row[name] for name in names}))
    return found


def _in_words(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "held_out_rank" else f"{100 * value:.1f} %"
