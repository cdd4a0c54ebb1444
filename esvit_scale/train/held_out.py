"""The check, at a start, that the images on which a run measures its accuracy are not those that it trains on."""

import logging
from contextlib import suppress
from pathlib import Path

from esvit_scale import store_urls
from esvit_scale.config import Config
from esvit_scale.data.manifest import is_shard_set
from esvit_scale.errors import UserError
from esvit_scale.evaluate.overlap import find_shared
from esvit_scale.train.learning import history_of
from esvit_scale.train.row_file import read_rows

log = logging.getLogger("esvit_scale")

LOOKED_THROUGH = 10_000  # training images of a set that are compared with the held-out ones, in some seconds
REMEDY = "give images that are never trained on, such as the set val of `esvit-scale shards create --val-fraction`"


def check(config: Config, resumed: bool) -> None:
    """Compare data.held_out with the training sets, and log a warning if images are in both. Rank 0 calls it.

    If both sets are folders that can be read, the bytes of 500 held-out images are compared with those of up to
    LOOKED_THROUGH images of each training set.

    Args:
        resumed: whether the run has a checkpoint. The run then goes on with a warning even if the sets are the same.

    Raises:
        UserError: data.held_out is a training set itself, and the run begins.
    """
    held_out = config.data.held_out
    for train in [mixed.urls for mixed in config.data.mix] or [config.data.train]:
        if _place(train) == _place(held_out):
            problem = (
                f"data.held_out: {held_out}: is the training set, so {_measured(config)} would measure memory; {REMEDY}"
            )
            if not resumed:
                raise UserError(problem)
            log.warning("%s", problem)
        elif not (store_urls.is_set_url(held_out) or store_urls.is_set_url(train)) and is_shard_set(Path(train)):
            with suppress(UserError, OSError):  # whoever reads these sets next says what is wrong
                _warn_of_shared(Path(train), Path(held_out), _measured(config))


def other_images(config: Config, run: Path) -> str:
    """Return a message if a finished run measured k-NN on other images than those of data.held_out; else ""."""
    held_out, measured = config.data.held_out, history_of(read_rows(run / "metrics.jsonl")).held_out
    if not held_out or not measured or _place(measured) == _place(held_out):
        return ""
    return f"its k-NN accuracies are of {measured}, not of data.held_out={held_out}"


def _place(name: str) -> str:
    """Return one spelling of the place that a path or URL names."""
    return name.rstrip("/") if store_urls.is_set_url(name) else str(Path(name).resolve())


def _measured(config: Config) -> str:
    """Return the name of what a run measures on its held-out images."""
    return "the accuracy" if config.objective.classes else "k-NN"


def _warn_of_shared(train: Path, held_out: Path, measured: str) -> None:
    shared = find_shared(train, held_out, LOOKED_THROUGH)
    if shared.images:
        log.warning(
            "data.held_out: %s: %s have the same bytes as one of %s, for example %s, so %s partly measures memory; %s",
            *(held_out, shared.in_words(), train, shared.example, measured, REMEDY),
        )
