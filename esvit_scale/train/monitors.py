"""Warnings about instability and collapse during training, which a loss that looks fine can hide (MoCo v3).

The monitors read only the rows of metrics.jsonl, so that everything they report can be checked there.
"""

import math
from collections import deque
from collections.abc import Iterator
from statistics import median
from typing import Any

Row = dict[str, Any]

WINDOW = 50  # rows before a spike with which it is compared
ROWS_TO_WARN = 5  # rows that a state must last, because one batch is no collapse
UNIFORM, PEAKED = 0.98, 0.02  # bounds of the teacher's entropy, as fractions of ln K
COLLAPSED_STD = 0.05  # bound of feature_std, which is 1 for isotropic features
SPIKE = 10.0  # a spike is this many times the median gradient norm
FEW_PROTOTYPES = 2.0  # bound of the effective number of prototypes among a micro-batch's targets
MANY_IMAGES = 8  # in smaller micro-batches all images may well share a target
LOW_RANK = 2.0  # bound of the features' effective rank
DIP = 0.05  # a dip is a k-NN accuracy this far below the best so far; over three standard errors with 1,024 images


class Monitors:
    """The monitors of a run: `observe` takes every row and returns a warning when a bad state begins or ends."""

    def __init__(self, prototypes: int, images: int, frozen: bool = False) -> None:
        """
        Args:
            prototypes: K, the number of prototypes.
            images: number of images in a micro-batch of one rank, over which the use of prototypes is measured.
            frozen: whether the patch projection is frozen already, so that the warnings do not advise to freeze it.
        """
        self._or_freeze = "" if frozen else ", or model.freeze_patch_embed=true"
        self._images = images
        self._ln_k = math.log(prototypes)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._since: dict[str, int] = {}  # bad state → the step at which it began
        self._rows: dict[str, int] = {}  # bad state → rows that it has lasted
        self._warned: set[str] = set()
        self._best_knn, self._in_dip = 0.0, False

    def observe(self, row: Row) -> list[str]:
        """Add a row, and return the warnings about what began or ended with it, most often none."""
        states = dict(self._states(row))
        warnings = [self._begun(name, text, row["step"]) for name, text in states.items()]
        warnings += [self._ended(name, row["step"]) for name in list(self._since) if name not in states]
        warnings += [self._spike(row), self._dip(row)]
        return [sentence for sentence in warnings if sentence]

    def _states(self, row: Row) -> Iterator[tuple[str, str]]:
        for part in ("view", "region"):
            entropy = row.get(f"teacher_entropy_{part}")
            if entropy is None:
                continue
            if entropy > UNIFORM * self._ln_k:
                yield (
                    f"the teacher's {part} targets are uniform",
                    f"entropy {entropy:.2f} of ln K = {self._ln_k:.2f}, so the {part} loss cannot fall; try a lower "
                    "objective.teacher_temp, or more steps before judging",
                )
            if entropy < PEAKED * self._ln_k:
                yield (
                    f"the teacher's {part} targets are single prototypes",
                    f"entropy {entropy:.3f}: images may share one; try a higher objective.teacher_temp or a lower "
                    "objective.center_momentum",
                )
            used = row.get(f"prototypes_used_{part}", math.inf)
            if self._images >= MANY_IMAGES and used < FEW_PROTOTYPES:
                yield (
                    f"the teacher's {part} targets share a few prototypes",
                    f"{used:.1f} in effect, so all images get nearly the same target; try a higher "
                    "objective.teacher_temp or a lower objective.center_momentum",
                )
        if row.get("rank_me", math.inf) < LOW_RANK:
            yield (
                "the student's features lie on a line",
                f"their effective rank is {row['rank_me']:.1f}; try a lower optim.lr or a longer optim.warmup_epochs",
            )
        if row.get("feature_std", 1.0) < COLLAPSED_STD:
            yield (
                "the student's features have collapsed",
                f"their spread over the batch is {row['feature_std']:.3f}, where 1 is isotropic: all images look alike; "
                "try a lower optim.lr, a longer optim.warmup_epochs or a larger batch",
            )

    def _begun(self, name: str, text: str, step: int) -> str | None:
        self._since.setdefault(name, step)
        self._rows[name] = self._rows.get(name, 0) + 1
        if self._rows[name] < ROWS_TO_WARN or name in self._warned:
            return None
        self._warned.add(name)
        return f"{name} since step {self._since[name]}: {text}"

    def _ended(self, name: str, step: int) -> str | None:
        del self._since[name], self._rows[name]
        if name not in self._warned:
            return None
        self._warned.discard(name)
        return f"no longer: {name} (step {step})"

    def _spike(self, row: Row) -> str | None:
        norm, before = row["grad_norm"], median(self._norms) if len(self._norms) >= ROWS_TO_WARN else math.inf
        self._norms.append(norm)
        if math.isfinite(norm) and norm > SPIKE * before:
            parts = {k.removeprefix("grad_norm_"): v for k, v in row.items() if k.startswith("grad_norm_")}
            where = f", most of it in {max(parts, key=parts.__getitem__)}" if parts else ""
            return (
                f"gradient spike at step {row['step']}: norm {norm:.3g}, {norm / before:.0f} times the median of the last "
                f"{len(self._norms) - 1} rows{where}; if they recur, lower optim.lr{self._or_freeze}"
            )
        return None

    def _dip(self, row: Row) -> str | None:
        """Return a warning when the k-NN accuracy falls more than DIP below its best; in MoCo v3, such dips showed an
        instability that the loss did not show."""
        accuracy = row.get("knn_top1")
        if accuracy is None:
            return None
        best, self._best_knn = self._best_knn, max(self._best_knn, accuracy)
        was, self._in_dip = self._in_dip, accuracy < best - DIP
        if was or not self._in_dip:
            return None
        return (
            f"k-NN accuracy fell to {100 * accuracy:.1f} % at step {row['step']}, from {100 * best:.1f} %: training is "
            f"unstable; lower optim.lr, lengthen optim.warmup_epochs{self._or_freeze}"
        )
