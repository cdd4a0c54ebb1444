"""Features of a frozen trunk: images → [N, C], once, for every evaluation that follows (evaluate/feature_cache.py keeps them)."""

import io
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esvit_scale import files
from esvit_scale.checkpoint import convert, exported_folder, state, step_folders
from esvit_scale.data import image_folder, stream
from esvit_scale.data import manifest as manifests
from esvit_scale.data.pixel_format import RGB8, PixelFormat, pixel_format
from esvit_scale.data.stream import EvaluationBatch
from esvit_scale.errors import UserError
from esvit_scale.evaluate import feature_cache
from esvit_scale.evaluate.feature_cache import FeatureBatch, FeatureSet
from esvit_scale.evaluate.progress import progress
from esvit_scale.models.trunk import Trunk
from esvit_scale.parallel import collectives

Kind = Literal["view", "blocks"]
LAST_BLOCKS = 4
TRANSFORM = "short side to size*256/224 (bicubic), centre crop"


class SourceInfo(NamedTuple):
    images: int
    classes: tuple[str, ...]  # empty: no labels


class FrozenTrunk(NamedTuple):
    trunk: nn.Module
    size: int  # pixels of the crop it is evaluated at: the size of its global crops
    step: int | None  # None: a single file does not say
    pixels: PixelFormat = RGB8  # of the images that it was trained on


class ExtractionOptions(NamedTuple):
    """How features are computed and kept; what the evaluations pass on from the command line."""

    batch: int = 64
    workers: int = 4
    device: str | torch.device | None = None  # None: the GPU where there is one
    precision: str = "fp32"  # of the trunk; "bf16": under autocast
    stored: str = "fp32"  # of the features; "fp16" halves the cache
    cache: Path | None = None  # None: nothing is kept


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
    kind: Kind = "view",
    pixels: PixelFormat = RGB8,
) -> FeatureSet:
    """Features of every image in `source` (shards or an image folder), in the source's order.

    The transform is the published k-NN protocol's (short side to size·256/224, centre crop). On several ranks each
    extracts its part; every rank returns the whole set. Arguments from `batch` to `cache`: see `ExtractionOptions`; `pixels`: the
    format of the images that the trunk was trained on.

    kind "view": view features [N, C]. kind "blocks": [N, 2, D], the mean (or the class token) and the maximum over the
    tokens of each of the last four blocks, concatenated in order (D = 2304 for Swin-T; the last C columns are the last block's); what linear
    probes read.

    Raises:
        UserError: `source` is missing, empty, or holds no readable image; a feature exceeds fp16's range.
    """
    place = torch.device(device) if device else default_device()
    encoder = {"view": _view, "blocks": last_blocks}[kind]

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            return encoder(trunk, images.to(place, non_blocking=True)).float()

    def compute() -> Iterator[FeatureBatch]:
        was_training = trunk.training
        trunk.to(place).eval()  # batch norm trunks: running statistics, whatever the batch
        try:
            yield from _feature_batches(encode, source, size, batch, workers, stored, pixels)
        finally:
            trunk.train(was_training)

    images = source_info(source).images  # first of all: it says what is wrong with the source
    key = {"trunk": feature_cache.trunk_digest(trunk), "data": feature_cache.source_digest(source), "size": size}
    key |= {"transform": TRANSFORM, "kind": kind, "precision": precision, "stored": stored}
    if pixels != RGB8:
        key["pixels"] = list(pixels)
    return _cached_or_temporary(cache, key, source, images, compute)


def raw_pixels(source: Path, size: int, batch: int = 64, workers: int = 4) -> FeatureSet:
    """The baseline that has learnt nothing: the normalised pixels themselves, C = 3·size². For small sets only."""
    images = source_info(source).images
    key = {"kind": "pixels"}
    return _cached_or_temporary(
        None, key, source, images, lambda: _feature_batches(lambda x: x.flatten(1), source, size, batch, workers)
    )


def run_embed(checkpoint: Path, data: Path, out: Path, loading: ExtractionOptions) -> FeatureSet:
    """`esvit-scale embed`: features of `data` under `checkpoint`'s teacher, written to the file `out`."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, for example {out / 'features.npz'}")
    teacher = load_frozen_trunk(checkpoint)
    found = extract(teacher.trunk, data, teacher.size, **loading._asdict(), pixels=teacher.pixels)
    if collectives.rank() == 0:
        save(found, out, source_info(data).classes)
        print(f"{out}: {len(found.keys)} features of width {found.features.shape[1]} from {data}")
    return found


def save(found: FeatureSet, path: Path, classes: Sequence[str] = ()) -> None:
    """Write `path`.npz with arrays features float32 [N, C], keys str [N], labels int64 [N] (-1 without one) and classes
    str [K], the names that the labels count; no pickles; whole or not at all."""
    buffer = io.BytesIO()
    keys = np.asarray(found.keys, dtype=np.str_)
    names = np.asarray(classes, dtype=np.str_)
    np.savez(buffer, features=found.features.float().numpy(), keys=keys, labels=found.labels.numpy(), classes=names)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())


def load_frozen_trunk(checkpoint: Path) -> FrozenTrunk:
    """Return the trunk that any weights hold which `load_backbone` takes, on the CPU: of a run dir or step dir its teacher's.

    Raises:
        UserError: no such weights, damaged, or not weights at all.
    """
    if checkpoint.is_file() or exported_folder.is_exported(checkpoint):
        trunk, config = convert.load_trunk(checkpoint)
        return FrozenTrunk(trunk, config.data.global_crops.size, None, pixel_format(config.data))
    folder = step_folders.resolve(checkpoint)  # once: `latest` of a living run moves
    trunk, config = state.load_teacher(folder)
    step = int(step_folders.read_state(folder)["cursor"]["step"])
    return FrozenTrunk(trunk, config.data.global_crops.size, step, pixel_format(config.data))


def source_info(source: Path) -> SourceInfo:
    """What a shard set's manifest, or an image folder, says it holds.

    Raises:
        UserError: there is neither.
    """
    if manifests.is_shard_set(source):
        held = manifests.load(source)
        return SourceInfo(held.samples, held.classes)
    folder = image_folder.list_images(source, keep_loose=True)
    return SourceInfo(len(folder.files), folder.classes)


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def last_blocks(trunk: nn.Module, images: Tensor) -> Tensor:
    """[B, 2, D]: of each of the last four blocks, side by side, what stands for the image (the mean of its tokens, or its
    class token) and the maximum over its tokens (the former again where there are none)."""
    if not isinstance(trunk, Trunk):
        raise UserError(f"the trunk {type(trunk).__name__} does not give its blocks' tokens; a probe needs them")
    means, tops = [], []
    for tokens, _, view in trunk.last_blocks([images], LAST_BLOCKS):
        of_image = tokens.view(len(images), -1, tokens.shape[-1])  # [B, T, C]
        means.append(of_image.mean(1) if view is None else view)
        tops.append(of_image.amax(1) if of_image.shape[1] else means[-1])
    return torch.stack([torch.cat(means, 1), torch.cat(tops, 1)], 1)


def _view(trunk: nn.Module, images: Tensor) -> Tensor:
    view: Tensor = trunk([images]).view  # [B, C]
    return view


def _cached_or_temporary(
    cache: Path | None, key: dict[str, Any], source: Path, images: int, compute: Callable[[], Iterable[FeatureBatch]]
) -> FeatureSet:
    if cache is not None:
        return feature_cache.load_or_compute(cache, key, source, images, compute)
    folder = collectives.run_on_rank0_and_broadcast(lambda: Path(tempfile.mkdtemp(prefix="esvit-scale-features-")))
    try:
        found = feature_cache.load_or_compute(folder, key, source, images, compute)
        in_memory = {name: getattr(found, name).clone() for name in ("features", "labels", "numbers")}
        collectives.barrier()  # every rank has its copy
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
) -> Iterator[FeatureBatch]:
    """This rank's part of the source's features, batch by batch."""
    rank, world = collectives.rank(), collectives.world_size()
    batches: Iterable[EvaluationBatch] = stream.evaluation_batches(
        source, size, batch, workers, rank, world, pixels=pixels
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
