"""The commands as Python functions: pretrain, finetune, embed, evaluate_knn and plan; shards.py has `shards.create`.

Every function does what the command of its name does, returns the result, and raises the command's errors (errors.py).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from esvit_scale import config as configs
from esvit_scale.checkpoint import frozen_teacher
from esvit_scale.checkpoint.backbone import Backbone, load_backbone
from esvit_scale.commands.plan import as_json, images_of, machine_of, memory_bytes, speed_of
from esvit_scale.config import Config
from esvit_scale.errors import RestartCanHelp
from esvit_scale.evaluate import features, knn
from esvit_scale.evaluate.features import ExtractionOptions
from esvit_scale.overrides import apply_override
from esvit_scale.scaling import plan as plans
from esvit_scale.train import finetuning, pretraining, signals
from esvit_scale.train.run_records import read_summary

Picture = Image.Image | NDArray[Any] | str | Path  # an image, or the path of its file


class Embeddings(NamedTuple):
    """Features of images."""

    features: NDArray[np.float32]  # [N, C]
    keys: list[str]  # the images' keys in their set, or paths; "0", "1", … for images in memory
    labels: NDArray[np.int64]  # [N] class numbers; -1 without a class


def config(name: str | Path | Config, changes: Mapping[str, Any] | None = None) -> Config:
    """Return the complete config of a preset or YAML file with some values changed.

    Args:
        name: a preset's name or the path of a YAML file; a Config is changed, too.
        changes: dotted key → value, for example {"train.epochs": 100, "data.flip": 0}.

    Raises:
        UserError: an unknown key, or values that do not fit.
    """
    overrides = _overrides(changes)
    if not isinstance(name, Config):
        return configs.resolve(str(name), overrides)
    values = name.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override, Config)
    return configs.validate(values, where=name.name, overrides=overrides)


def pretrain(name: str | Path | Config, changes: Mapping[str, Any] | None = None) -> Path:
    """Start or continue a run in this process and return its run dir when it is finished; `config` explains the arguments.

    While it runs, ctrl-C, SIGTERM and SIGUSR1 save a checkpoint before they end it.

    Raises:
        UserError: the config, the data or the run dir do not fit.
        KeyboardInterrupt: ctrl-C; the run is saved, and the same call continues it.
        RestartCanHelp: SIGTERM or SIGUSR1, after which the run is saved, too; or as the command's exit code 75.
        Diverged: as the command's exit code 3.
    """
    return _trained(config(name, changes))


def finetune(name: str | Path = "classify", changes: Mapping[str, Any] | None = None) -> Path:
    """Start or continue a fine-tuning in this process and return its run dir when it is finished.

    Args:
        name: a preset's name or the path of a YAML file.
        changes: dotted key → value; "model.init_from" and "data.train" are needed, as for the command.

    Raises:
        UserError: the config, the weights, the data or the run dir do not fit.
        KeyboardInterrupt, RestartCanHelp, Diverged: as `pretrain`.
    """
    return _trained(finetuning.resolve(str(name), _overrides(changes)))


def _trained(of_run: Config) -> Path:
    with signals.installed():
        if pretraining.pretrain(of_run):
            raise KeyboardInterrupt
    if not read_summary(of_run.run_path).get("finished"):
        raise RestartCanHelp(f"{of_run.run_path}: saved after a signal; the same call continues it")
    return of_run.run_path


def embed(
    weights: str | Path,
    images: str | Path | Sequence[Picture],
    batch: int = 64,
    workers: int = 4,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> Embeddings:
    """Return the features of images.

    Images of a folder or shard set are resized and cropped as by `esvit-scale evaluate`, those of a sequence by the
    backbone's `preprocess`, which is slower; pixel values differ by about 1 of 255 levels (docs/evaluation.md).

    Args:
        weights: whatever `load_backbone` takes: a run dir, an exported folder, a weight file.
        images: a shard set or folder of images; or a sequence of PIL images, arrays [H, W, C] or paths of image files.
        batch: images in a forward pass.
        workers: processes that load images of a shard set or folder.
        device: where to compute; None: the GPU if there is one.
        precision: "fp32", or "bf16" to run the trunk under autocast.

    Raises:
        UserError: weights or images do not exist or cannot be read.
    """
    if not isinstance(images, str | Path):
        return _embed_each(load_backbone(weights), images, batch, device, precision)
    trunk = features.load_frozen_trunk(Path(weights).expanduser())
    options = ExtractionOptions(batch, workers, device, precision)
    found = features.extract(
        trunk.trunk, Path(images).expanduser(), trunk.size, **options._asdict(), pixels=trunk.pixels
    )
    return Embeddings(found.features.float().numpy(), list(found.keys), found.labels.numpy())


def evaluate_knn(
    weights: str | Path,
    train: str | Path,
    test: str | Path,
    ks: Sequence[int] = knn.KS,
    out: str | Path | None = None,
    batch: int = 64,
    workers: int = 4,
) -> dict[str, Any]:
    """Return the k-NN accuracy of a trunk: the content of knn.json, with the best k under "best".

    Args:
        weights: as `evaluate knn --checkpoint` takes.
        train, test: labelled shards, or folders with one subfolder for each class.
        ks: numbers of neighbours that vote.
        out: folder to write knn.json to; None: nothing is written or printed.

    Raises:
        UserError: weights or sets do not exist, or have no labels.
    """
    options = ExtractionOptions(batch, workers)
    of, there, other = (Path(path).expanduser() for path in (weights, train, test))
    if out is not None:
        return knn.run_knn(of, there, other, Path(out).expanduser(), options, ks)
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        return knn.run_knn(of, there, other, Path(folder), options, ks)


def plan(
    name: str | Path | Config,
    changes: Mapping[str, Any] | None = None,
    *,
    gpus: int,
    gpu_memory: str = "80G",
    images: int | None = None,
    tflops: float | None = None,
    mfu: float | None = None,
    rates: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return what a config needs, as `plan --json` prints it; `config` explains the first two arguments.

    Args:
        gpu_memory: memory of one GPU.
        images: images in the training set; None: those of data.train, or ImageNet-1K's.
        tflops: TFLOP/s of one GPU on large matrix products; None: measured on this machine's GPU; without
            one the times are None.
        mfu: fraction of `tflops` that training reaches; None: the time follows from a traced step and the machine's rates.
        rates: rates of the machine that are not the defaults, by the names of the options: bandwidth, gpus_per_node,
            node_link, network.

    Raises:
        UserError: the config is wrong, or its batch does not divide over the GPUs.
    """
    of_run = frozen_teacher.described_in(config(name, changes))
    speed = machine_of(of_run, tflops, rates or {}) if mfu is None else speed_of(of_run, tflops, mfu)
    memory = memory_bytes(gpu_memory)
    found = [plans.plan(one, gpus, memory, images or images_of(one), speed, traced=True) for one in of_run.of_stages]
    return as_json(found, gpus)


def _overrides(changes: Mapping[str, Any] | None) -> list[str]:
    return [f"{key}={_written(value)}" for key, value in (changes or {}).items()]


def _written(value: Any) -> str:
    """Return a value as the text after `=` in an override KEY=VALUE: as JSON, which the YAML parser of overrides reads."""
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _embed_each(
    backbone: Backbone, images: Sequence[Picture], batch: int, device: str | torch.device | None, precision: str
) -> Embeddings:
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone.to(where)
    found, left = [np.empty((0, backbone.dim), np.float32)], iter(images)
    with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
        while some := list(islice(left, batch)):
            pixels = torch.stack([backbone.preprocess(image) for image in _opened(some)]).to(where)
            found.append(backbone(pixels).float().cpu().numpy())
    keys = [str(image) if isinstance(image, str | Path) else str(i) for i, image in enumerate(images)]
    return Embeddings(np.concatenate(found), keys, np.full(len(keys), -1))


def _opened(images: Sequence[Picture]) -> Iterator[Image.Image | NDArray[Any]]:
    for image in images:
        if not isinstance(image, str | Path):
            yield image
            continue
        with Image.open(Path(image).expanduser()) as opened:
            yield opened
