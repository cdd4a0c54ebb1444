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

from esvit_scale import presets, store_urls
from esvit_scale.config import Config
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.resources import ds_config_path
from esvit_scale.train.run_records import latest_checkpoint, read_summary

log = logging.getLogger("esvit_scale")

LARGEST_MANIFEST = 32 << 20  # bytes; a larger one takes too long to read before the first line
IMPORTING = "importing PyTorch and DeepSpeed, which takes some seconds …"
_printed: list[str] = []  # by `show`, for log.txt


def show(config: Config, given: str) -> None:
    """Print the header on the console of rank 0. `given` is the preset or file that the user named.

    Raises:
        UserError: on every rank, if a set is not there, or is none; so it is said in the first second.
    """
    _check_sets(config)
    if _is_rank0():
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

    They show what the user chose: a value that is the default may not concern this trunk or objective. Where the data
    cannot be read, only their path is given; the run itself then says what is wrong.
    """
    whole, config = config, config.of_stages[0]
    data, model, train = config.data, config.model, config.train
    shape = [
        f"{name} {value if isinstance(value, int) else '-'.join(map(str, value))}"
        for name in ("window", "embed_dim", "depths", "heads")
        if (value := getattr(model, name)) != type(model).model_fields[name].default
    ]
    images = _images(config)
    length = [stage_line(one, number, _images(one)) for number, one in enumerate(whole.of_stages) if whole.stages]
    things = "samples" if config.signal_views else "images"
    source = data.train or ", ".join(mixed.urls for mixed in data.mix)
    rows = [
        ("config", given),
        ("run dir", f"{config.run_path}: {_run_state(config.run_path)}"),
        ("data", source + (f": {images:,} {things}" if images else "")),
        ("crops", f"{_crops(config)} pixels"),
        *(
            [("recipe", presets.recipe_for(images, data.global_crops.size))]
            if images and _begins_anew(config) and not config.signal_views  # recipes are for images alone
            else []
        ),
        ("trunk", ", ".join([model.trunk, *shape])),
        ("objective", f"{config.objective.name}, {_losses(config)}"),
        *([] if length else [("length", _length(config, images))]),
        ("numbers", f"{train.precision}, {train.ds_config}{_zero_stage(config)}"),
        _measured(config),
    ]
    return [*(f"{name:<10} {text}" for name, text in rows[:-2]), *length] + [
        f"{name:<10} {text}" for name, text in rows[-2:]
    ]


def stage_line(config: Config, number: int, images: int | None) -> str:
    """Return a line with a training stage's length, crops, window and learning rate.

    Args:
        images: number of images in an epoch; None: not known.
    """
    parts = [_length(config, images), f"crops {_crops(config)}", f"window {config.model.window}"]
    return f"{f'stages.{number}':<10} {' · '.join([*parts, f'peak lr {config.peak_lr:.3g}'])}"


def _crops(config: Config) -> str:
    data = config.data
    return " + ".join(
        [f"{data.global_crops.count}×{data.global_crops.size}", *(f"{g.count}×{g.size}" for g in data.local_crops)]
    )


def _begins_anew(config: Config) -> bool:
    """Return whether a run learns from images alone, and from nothing: what the presets' comparison is about."""
    objective = config.objective
    return not (objective.classes or objective.teacher or config.signal_views or config.model.init_from)


def _measured(config: Config) -> tuple[str, str]:
    """Return the row about what is measured on held-out images, and when."""
    train, held_out = config.train, config.data.held_out
    if config.objective.classes:
        every = f"{train.eval_every} steps" if train.eval_every else "epoch"
        return "accuracy", f"every {every} on {held_out}" if held_out else "not measured; see data.held_out"
    return (
        "k-NN",
        f"every {train.knn_every} steps on {held_out}" if train.knn_every else "not measured; see train.knn_every",
    )


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
    """Return the number of images in an epoch; None if it cannot be told at once."""
    from esvit_scale.data import mix

    folders = [Path(config.data.train), *(Path(mixed.urls) for mixed in config.data.mix)]
    with suppress(OSError, UserError, RestartCanHelp):
        sizes = [path.stat().st_size for folder in folders if (path := folder / "manifest.json").is_file()]
        return mix.epoch_samples(config.data) if sum(sizes) <= LARGEST_MANIFEST else None
    return None


def _check_sets(config: Config) -> None:
    """Raise UserError if a folder is not there, or is no set. This reads no manifest, because every rank does it."""
    from esvit_scale.data import manifest as manifests
    from esvit_scale.data import mix

    data = config.data
    folders = [mixed.urls for mixed in data.mix] if mix.MixedSets.wanted(data) else []
    if not folders and data.epoch_samples is None:
        with suppress(OSError):  # a long pattern is no path
            if not Path(data.train).is_dir():  # a folder of tars is rather an unfinished set
                mix.require_epoch_samples(data)
        folders = [data.train]
    with suppress(OSError):
        for folder in folders:
            if not store_urls.is_set_url(folder) and not manifests.is_shard_set(Path(folder)):
                manifests.load(Path(folder))  # says what is missing


def _run_state(run: Path) -> str:
    """Return what a start in this run dir will do, in a few words.

    The files may be damaged: what reads them for the start itself finds that out and says it.
    """
    summary = read_summary(run, warn=False)
    if summary.get("finished"):
        return f"finished at step {summary.get('step')}; a larger length continues it"
    checkpoints = run / "checkpoints"
    if latest := latest_checkpoint(run):
        return f"continues from {latest.name}"
    if any(checkpoints.glob("step-*")):
        return "continues from its newest good checkpoint"
    return (
        "starts a run" if not (run / "config.yaml").exists() else "starts at step 0, because there is no checkpoint yet"
    )


def _losses(config: Config) -> str:
    losses = "view and region loss, " if config.objective.regions else ""
    losses += f"{config.objective.classes:,} classes, " if config.objective.classes else ""
    return f"{losses}{config.optim.name} with peak lr {config.peak_lr:.3g}"


def _zero_stage(config: Config) -> str:
    with suppress(OSError, ValueError, UserError, AttributeError):
        values = json.loads(ds_config_path(config.train.ds_config).read_text())
        return f" (ZeRO stage {values.get('zero_optimization', {}).get('stage', 0)})"
    return ""


def _is_rank0() -> bool:
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"


def say(*found: str) -> None:
    """Print lines to stderr on rank 0."""
    if not _is_rank0():
        return
    with suppress(OSError):  # the console may be a file on a full disk
        print("\n".join(found), file=sys.stderr, flush=True)
