"""Computing the features [N, C] of images with a frozen trunk, for all evaluations (feature_cache.py caches them)."""

import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esvit_scale import files
from esvit_scale.checkpoint import convert, exported_folder, outside, state, state_file, step_folders
from esvit_scale.data import image_folder, stream
from esvit_scale.data import manifest as manifests
from esvit_scale.data.pixel_format import RGB8, PixelFormat, pixel_format
from esvit_scale.data.stream import EvaluationBatch
from esvit_scale.errors import UserError
from esvit_scale.evaluate import baselines, feature_cache
from esvit_scale.evaluate.feature_cache import FeatureBatch, FeatureSet
from esvit_scale.evaluate.progress import progress
from esvit_scale.models.trunk import Trunk
from esvit_scale.parallel import collectives

Kind = Literal["view", "blocks"]
LAST_BLOCKS = 4
TRANSFORM = "short side to size*256/224 (bicubic), centre crop; large JPEGs decoded at a reduced size"
WHOLE_TRANSFORM = "whole image to size*size (bicubic); large JPEGs decoded at a reduced size"
CPU_BATCH = 4  # images of a forward pass on a CPU: their activations stay in its caches


class SourceInfo(NamedTuple):
    """The number of images in a shard set or image folder, and the names of their classes."""

    images: int
    classes: tuple[str, ...]  # empty if the images have no labels


class FrozenTrunk(NamedTuple):
    """A trunk to evaluate, with the size and pixel format of the images that it expects."""

    trunk: nn.Module
    size: int  # side in pixels of the evaluation crop: the global crop size of its pretraining
    step: int | None  # training step of the checkpoint; None for a file that does not record it
    pixels: PixelFormat = RGB8  # channels and bits of the images in its pretraining
    name: str | None = None  # of a baseline (baselines.py), for tables and reports

    def origin(self, checkpoint: Path) -> dict[str, Any]:
        """Return the fields of a result file that say which weights were evaluated."""
        return {"checkpoint": str(checkpoint), "step": self.step, **({"name": self.name} if self.name else {})}


class ExtractionOptions(NamedTuple):
    """The options for computing and storing features, which the command line of every evaluation has."""

    batch: int = 64  # images per forward pass
    workers: int = 4  # processes that load images
    device: str | torch.device | None = None  # None: the GPU if there is one
    precision: str = "fp32"  # "fp32", or "bf16" to run the trunk under autocast
    stored: str = "fp32"  # number format of stored features; "fp16" halves the cache
    cache: Path | None = None  # folder that caches features; None caches nothing
    whole: bool = False  # resize the whole image to the crop's square, instead of its short side, and crop nothing
    stage: int | None = None  # take all cells of this stage's map, from 1, instead of the view feature


def extract(
    trunk: nn.Module,
    source: Path,
    size: int,
    batch: int = 64,
    workers: int = 4,
    device: str | torch.device | None = None,
    precision: str = "fp32",
    stored: str = "fp32",
    cache: Path | None = None,
    whole: bool = False,
    stage: int | None = None,
    kind: Kind = "view",
    pixels: PixelFormat = RGB8,
) -> FeatureSet:
    """Return the trunk's features of every image in `source` (shards or an image folder), in the order of the source.

    The transform is that of the published k-NN protocol: resize the short side to size·256/224, then centre crop. Every
    rank extracts its part of the images and returns the whole set. `ExtractionOptions` explains `batch` to `stage`.

    Args:
        size: side in pixels of the crop that the trunk sees.
        kind: "view" gives view features [N, C]. "blocks" gives [N, 2, D] for linear probes: row 0 has the mean over the
            tokens (or the class token) and row 1 the maximum, concatenated over the last four blocks in their order
            (D = 2304 for Swin-T; the last C columns belong to the last block). Only "view" takes a `stage`, which gives
            [N, T·C] of its map.
        pixels: format of the images that the trunk was trained on.

    Raises:
        UserError: `source` is missing, empty, or holds no readable image; a feature to store as fp16 exceeds its range;
            or the trunk has no such stage.
    """
    chosen = torch.device(device) if device else default_device()
    encoder: Callable[[nn.Module, Tensor], Tensor] = {"view": _view, "blocks": last_blocks}[kind]
    if stage is not None:
        encoder, kind_of_key = partial(stage_cells, stage=stage), f"stage {stage}"
    else:
        kind_of_key = kind

    def encode(images: Tensor) -> Tensor:
        return encode_batch(lambda x: encoder(trunk, x), images, chosen, precision)

    def compute() -> Iterator[FeatureBatch]:
        was_training = trunk.training
        trunk.to(chosen).eval()  # batch norm must use its running statistics
        try:
            yield from _feature_batches(encode, source, size, batch, workers, stored, pixels, whole)
        finally:
            trunk.train(was_training)

    images = source_info(source).images  # first, because it raises errors about the source
    key = {"trunk": feature_cache.trunk_digest(trunk), "data": feature_cache.source_digest(source), "size": size}
    key |= {
        "transform": WHOLE_TRANSFORM if whole else TRANSFORM,
        "kind": kind_of_key,
        "precision": precision,
        "stored": stored,
    }
    if pixels != RGB8:
        key["pixels"] = list(pixels)
    return cached_or_temporary(cache, key, source, images, compute)


def encode_batch(encoder: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, precision: str) -> Tensor:
    """Return the float32 features that `encoder` computes of a batch [B, C, S, S], on `device` in fp32 or bf16.

    A CPU runs it on CPU_BATCH images at a time.
    """
    parts = images.split(CPU_BATCH) if device.type == "cpu" else (images,)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat([encoder(part.to(device, non_blocking=True)).float() for part in parts])


def raw_pixels(source: Path, size: int, batch: int = 64, workers: int = 4, whole: bool = False) -> FeatureSet:
    """Return every image's normalised pixels as features [N, 3·size²]: a baseline without a network, for small sets."""
    images = source_info(source).images

    def compute() -> Iterator[FeatureBatch]:
        return _feature_batches(lambda x: x.flatten(1), source, size, batch, workers, whole=whole)

    return cached_or_temporary(None, {"kind": "pixels"}, source, images, compute)


def run_embed(checkpoint: Path, data: Path, out: Path, options: ExtractionOptions) -> FeatureSet:
    """Run `esvit-scale embed`: compute features of `data` with the checkpoint's trunk, write them to the file `out`."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder, but --out must name a file, for example {out / 'features.npz'}")
    teacher = load_frozen_trunk(checkpoint)
    found = extract(teacher.trunk, data, teacher.size, **options._asdict(), pixels=teacher.pixels)
    if collectives.rank() == 0:
        save(found, out, source_info(data).classes)
        print(f"{out}: {len(found.keys)} features of width {found.features.shape[1]} from {data}")
    return found


def save(found: FeatureSet, path: Path, classes: Sequence[str] = ()) -> None:
    """Write features to the .npz file `path`, atomically and without pickles.

    The file has the arrays features (float32 [N, C]), keys (str [N]), labels (int64 [N], indices into classes; −1 for
    an image without a label) and classes (str [K]).
    """
    buffer = io.BytesIO()
    keys = np.asarray(found.keys, dtype=np.str_)
    names = np.asarray(classes, dtype=np.str_)
    np.savez(buffer, features=found.features.float().numpy(), keys=keys, labels=found.labels.numpy(), classes=names)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())


def load_frozen_trunk(checkpoint: Path) -> FrozenTrunk:
    """Load the trunk to evaluate, on the CPU, from any path that `load_backbone` accepts, or the baseline that it names.

    A run dir or step folder gives the teacher's trunk.

    Raises:
        UserError: the path does not exist, is damaged, or holds no weights.
    """
    if baselines.is_baseline(str(checkpoint)):
        found = baselines.load(str(checkpoint))
        return FrozenTrunk(found.trunk, found.size, found.step, found.pixels, found.name)
    if outside.is_outside(str(checkpoint)):
        trunk, config = convert.load_trunk(checkpoint)
        return FrozenTrunk(
            trunk, config.data.global_crops.size, None, pixel_format(config.data), f"{config.model.trunk}, not ours"
        )
    checkpoint = step_folders.follow_pointer(checkpoint)
    if not checkpoint.exists():
        raise UserError(
            f"{checkpoint}: no such checkpoint; give a run dir or one of its step folders, or a baseline: "
            f"{baselines.PIXELS} or {baselines.UNTRAINED}CONFIG"
        )
    if checkpoint.is_file() or exported_folder.is_exported(checkpoint):
        trunk, config = convert.load_trunk(checkpoint)
        return FrozenTrunk(trunk, config.data.global_crops.size, None, pixel_format(config.data))
    folder = step_folders.resolve(checkpoint)  # resolved once, because a run in progress changes `latest`
    trunk, config = state.load_teacher(folder)
    step = int(state_file.read_state(folder)["cursor"]["step"])
    return FrozenTrunk(trunk, config.data.global_crops.size, step, pixel_format(config.data))


def source_info(source: Path) -> SourceInfo:
    """Return the number of images and the classes of a shard set (read from its manifest) or of an image folder.

    Raises:
        UserError: `source` is neither a shard set nor an image folder.
    """
    if manifests.is_shard_set(source):
        held = manifests.load(source)
        return SourceInfo(held.samples, held.classes)
    folder = image_folder.list_images(source, keep_loose=True)
    return SourceInfo(len(folder.files), folder.classes)


def default_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def last_blocks(trunk: nn.Module, images: Tensor) -> Tensor:
    """Return features [B, 2, D] of images: pooled tokens of the trunk's last four blocks, concatenated (total width D).

    Row 0 is the mean over the image's tokens, or the class token. Row 1 is the maximum over the tokens; it repeats row
    0 for a trunk without region tokens.

    Raises:
        UserError: the trunk is no `Trunk` and cannot return its blocks' tokens.
    """
    if not isinstance(trunk, Trunk):
        raise UserError(f"the trunk {type(trunk).__name__} does not give its blocks' tokens; a probe needs them")
    means, tops = [], []
    for tokens, _, view in trunk.last_blocks([images], LAST_BLOCKS):
        of_image = tokens.view(len(images), -1, tokens.shape[-1])  # [B, T, C]
        means.append(of_image.mean(1) if view is None else view)
        tops.append(of_image.amax(1) if of_image.shape[1] else means[-1])
    return torch.stack([torch.cat(means, 1), torch.cat(tops, 1)], 1)


def stage_cells(trunk: nn.Module, images: Tensor, stage: int) -> Tensor:
    """Return features [B, T·C] of images: all cells of a stage's map, row by row; the last stage's after the final norm.

    They tell where in the picture something is, which the view feature, a mean over the cells, does not.

    Args:
        stage: number of the stage, from 1.

    Raises:
        UserError: the trunk has no such stage, or gives no tokens on a grid.
    """
    if not isinstance(trunk, Trunk) or not trunk.has_regions:
        name = trunk.name if isinstance(trunk, Trunk) else type(trunk).__name__
        raise UserError(f"--stage {stage}: {name} gives no tokens on a grid; leave the option out")
    if not 1 <= stage <= len(trunk.depths):
        raise UserError(f"--stage {stage}: the trunk {trunk.name} has the stages 1 to {len(trunk.depths)}")
    tokens = trunk.stage_maps([images])[stage - 1].tokens
    return (trunk.norm(tokens) if stage == len(trunk.depths) else tokens).reshape(len(images), -1)


def _view(trunk: nn.Module, images: Tensor) -> Tensor:
    view: Tensor = trunk([images]).view  # [B, C]
    return view


def cached_or_temporary(
    cache: Path | None, key: dict[str, Any], source: Path, images: int, compute: Callable[[], Iterable[FeatureBatch]]
) -> FeatureSet:
    """Return features as `feature_cache.load_or_compute` does; without a cache, from a folder that is removed again."""
    if cache is not None:
        return feature_cache.load_or_compute(cache, key, source, images, compute)
    folder = collectives.run_on_rank0_and_broadcast(lambda: Path(tempfile.mkdtemp(prefix="esvit-scale-features-")))
    try:
        found = feature_cache.load_or_compute(folder, key, source, images, compute)
        in_memory = {name: getattr(found, name).clone() for name in ("features", "labels", "numbers")}
        collectives.barrier()  # rank 0 must not remove the folder before every rank has its copy
        return found._replace(**in_memory)
    finally:
        if collectives.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _feature_batches(
    encode: Callable[[Tensor], Tensor],
    source: Path,
    size: int,
    batch: int,
    workers: int,
    stored: str = "fp32",
    pixels: PixelFormat = RGB8,
    whole: bool = False,
) -> Iterator[FeatureBatch]:
    """Yield the features, computed by `encode`, of this rank's part of the images in `source`, in batches."""
    rank, world = collectives.rank(), collectives.world_size()
    batches: Iterable[EvaluationBatch] = stream.evaluation_batches(
        source, size, batch, workers, rank, world, pixels=pixels, whole=whole
    )
    total = source_info(source).images // world
    for some in progress(batches, f"features of {source.name}", total, "images", lambda b: len(b.keys)):
        with torch.no_grad():
            yield FeatureBatch(
                _to_stored_dtype(stored, encode(some.images).cpu(), source), some.keys, some.labels, some.numbers
            )


def _to_stored_dtype(stored: str, features: Tensor, source: Path) -> Tensor:
    if stored == "fp32":
        return features
    half = features.half()
    if (half.isinf() & features.isfinite()).any():
        raise UserError(f"{source}: a feature of {features.abs().max():.3g} is beyond fp16's range; store fp32")
    return half
