"""The opened data, files and guards of a run or of one of its training stages, with which `Trainer.train` works; pretraining.py opens them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from esvit_scale.config import Config
from esvit_scale.data.identity import Identity
from esvit_scale.data.stream import TrainingData
from esvit_scale.train.lock import Lock
from esvit_scale.train.online_accuracy import OnlineAccuracy
from esvit_scale.train.online_knn import OnlineKnn
from esvit_scale.train.watchdog import Watchdog


@dataclass(frozen=True)
class RunResources:
    """The resources of one run or training stage."""

    path: Path  # the run dir
    config: Config  # of the whole run
    is_start: bool  # whether this is the first training stage of this start
    lock: Lock
    watchdog: Watchdog
    data: TrainingData
    identity: Identity  # of `data`, for checkpoints
    checkpoint: Path | None  # step folder to resume from
    knn: OnlineKnn | None
    accuracy: OnlineAccuracy | None  # where the run learns labels and has a held-out set
    on_saved: Callable[[Path], None]  # is called in the saving thread with the folder of each complete checkpoint
    mirrored_step: Callable[[], int] | None = None  # the step of the newest checkpoint in train.mirror, on rank 0
