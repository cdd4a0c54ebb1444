"""The lines with which `pretrain` begins: what is trained, on what, for how long, and where it is written.

They need only the config and the manifest. Nothing here imports torch, which takes seconds, so that the lines come
first.
"""

import json
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.resources import ds_config_path

log = logging.getLogger("esvit_scale")

LARGEST_MANIFEST = 32 << 20  # bytes; a larger one takes too long to read before the first line
IMPORTING = "importing PyTorch and DeepSpeed, which takes some seconds …"
_printed: list[str] = []  # by `show`, for log.txt


def show(config: Config, given: str) -> None:
    """Print the header on the console. `given` is the preset or file that the user named."""
    _printed[:] = lines(config, given)
    say(*_printed, IMPORTING)


def record(config: Config) -> None:
    """Write the header to log.txt; show it on the console, too, if `show` has not."""
    found = _printed or lines(config, config.name)
    for line in found:
        log.info("%s", line, extra={"only_in_file": bool(_printed)})
    _printed.clear()


def lines(config: Config, given: str) -> list[str]:
    """Return the header as lines of text.

    Where the storage fails, only the data's path is given; the run itself then says what is wrong.
    """
    data, model, train = config.data, config.model, config.train
    crops = " + ".join([f"2×{data.global_crops.size}", *(f"{g.count}×{g.size}" for g in data.local_crops)])
    shape = [f"window {model.window}"]
    shape += [
        f"{name} {value if isinstance(value, int) else '-'.join(map(str, value))}"
        for name in ("embed_dim", "depths", "heads")
        if (value := getattr(model, name)) is not None
    ]
    images = _images(config)
    source = data.train or ", ".join(mixed.urls for mixed in data.mix)
    rows = [
        ("config", given),
        ("run dir", f"{config.run_path}: {_run_state(config.run_path)}"),
        ("data", source + (f": {images:,} images" if images else "")),
        ("crops", f"{crops} pixels"),
        ("trunk", f"{model.trunk}, {', '.join(shape)}"),
        ("objective", f"{config.objective.name}, {_losses(config)}, {config.objective.prototypes:,} prototypes"),
        ("length", _length(config, images)),
        ("numbers", f"{train.precision}, {train.ds_config}{_zero_stage(config)}"),
        (
            "k-NN",
            f"every {train.knn_every} steps on {data.held_out}"
            if train.knn_every
            else "not measured; see train.knn_every",
        ),
    ]
    return [f"{name:<10} {text}" for name, text in rows]


def _length(config: Config, images: int | None) -> str:
    train = config.train
    batch, per_epoch = train.global_batch, (images or 0) // train.global_batch
    if train.steps:
        epochs = f", {train.steps / per_epoch:,.1f} epochs of {per_epoch:,} steps" if per_epoch else ""
        return f"{train.steps:,} steps of {batch:,} images{epochs}"
    if not per_epoch:
        return f"{train.epochs:,} epochs in steps of {batch:,} images"
    return f"{train.epochs:,} epochs × {per_epoch:,} = {train.epochs * per_epoch:,} steps of {batch:,} images"


def _images(config: Config) -> int | None:
    """Return the number of images in an epoch; None if it cannot be told at once.

    Raises:
        UserError: a set is not there, or is none; so it is said in the first second.
    """
    from esvit_scale.data import mix

    folders = [Path(config.data.train), *(Path(mixed.urls) for mixed in config.data.mix)]
    with suppress(OSError):
        sizes = [path.stat().st_size for folder in folders if (path := folder / "manifest.json").is_file()]
        return mix.epoch_samples(config.data) if sum(sizes) <= LARGEST_MANIFEST else None
    return None


def _run_state(run: Path) -> str:
    """Return what a start in this run dir will do, in a few words.

    The files may be damaged: what reads them for the start itself finds that out and says it.
    """
    with suppress(OSError, ValueError, AttributeError):
        summary = json.loads((run / "summary.json").read_bytes())
        if summary.get("finished"):
            return f"finished at step {summary.get('step')}"
    checkpoints = run / "checkpoints"
    with suppress(OSError, ValueError):
        latest = (checkpoints / "latest").read_text().strip()
        if latest.startswith("step-") and (checkpoints / latest).is_dir():
            return f"continues from {latest}"
    if any(checkpoints.glob("step-*")):
        return "continues from its newest good checkpoint"
    return (
        "starts a run" if not (run / "config.yaml").exists() else "starts at step 0, because there is no checkpoint yet"
    )


def _losses(config: Config) -> str:
    losses = "view and region loss, " if config.objective.regions else ""
    return f"{losses}{config.optim.name} with peak lr {config.peak_lr:.3g}"


def _zero_stage(config: Config) -> str:
    with suppress(OSError, ValueError, UserError, AttributeError):
        values = json.loads(ds_config_path(config.train.ds_config).read_text())
        return f" (ZeRO stage {values.get('zero_optimization', {}).get('stage', 0)})"
    return ""


def say(*found: str) -> None:
    """Print lines to stderr on rank 0."""
    if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") != "0":
        return
    with suppress(OSError):  # the console may be a file on a full disk
        print("\n".join(found), file=sys.stderr, flush=True)
