"""Features of a frozen trunk: images → view features [N, C], once, for every evaluation that follows."""

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from esvit_scale import files
from esvit_scale.checkpoint import single_file, state
from esvit_scale.data import image_folder, manifest, stream
from esvit_scale.errors import UserError
from esvit_scale.parallel import collectives

Batch = tuple[Tensor, list[str], Tensor]  # images [B, 3, S, S], keys [B], labels [B]


class FeatureSet(NamedTuple):
    features: Tensor  # float32 [N, C], on the CPU
    keys: list[str]  # [N]
    labels: Tensor  # int64 [N]; -1: no label


class Contents(NamedTuple):
    images: int
    classes: tuple[str, ...]  # empty: no labels


class Teacher(NamedTuple):
    trunk: nn.Module
    size: int  # pixels of the crop it is evaluated at: the size of its global crops
    step: int | None  # None: a single file does not say


def extract(
    trunk: nn.Module,
    source: Path,
    size: int,
    batch: int = 64,
    workers: int = 4,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> FeatureSet:
    """View features of every image in `source` (shards or an image folder), in the source's order.

    The transform is the published k-NN protocol's (short side to size·256/224, centre crop). On several ranks each extracts its
    part; every rank returns the whole set. `precision` "bf16" runs the trunk under autocast; features are fp32.

    Raises:
        UserError: `source` is missing, empty, or holds no readable image.
    """
    place = torch.device(device) if device else default_device()

    def encode(images: Tensor) -> Tensor:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            return trunk([images.to(place, non_blocking=True)]).view.float()  # [B, C]

    was_training = trunk.training
    trunk.to(place).eval()  # batch norm trunks: running statistics, whatever the batch
    try:
        return _extract(encode, source, size, batch, workers)
    finally:
        trunk.train(was_training)


def raw_pixels(source: Path, size: int, batch: int = 64, workers: int = 4) -> FeatureSet:
    """The baseline that has learnt nothing: the normalised pixels themselves, C = 3·size². For small sets only."""
    return _extract(lambda images: images.flatten(1), source, size, batch, workers)


def run_embed(
    checkpoint: Path,
    data: Path,
    out: Path,
    batch: int = 64,
    workers: int = 4,
    device: str | torch.device | None = None,
    precision: str = "fp32",
) -> FeatureSet:
    """`esvit-scale embed`: features of `data` under `checkpoint`'s teacher, written to the file `out`."""
    if out.is_dir():
        raise UserError(f"{out}: is a folder; --out names the file to write, for example {out / 'features.npz'}")
    teacher = load_teacher(checkpoint)
    found = extract(teacher.trunk, data, teacher.size, batch, workers, device, precision)
    if collectives.rank() == 0:
        save(found, out)
        print(f"{out}: {len(found.keys)} features of width {found.features.shape[1]} from {data}")
    return found


def save(found: FeatureSet, path: Path) -> None:
    """`path`.npz with arrays features float32 [N, C], keys str [N], labels int64 [N]; no pickles; whole or not at all."""
    buffer = io.BytesIO()
    keys = np.asarray(found.keys, dtype=np.str_)
    np.savez(buffer, features=found.features.numpy(), keys=keys, labels=found.labels.numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())


def load_teacher(checkpoint: Path) -> Teacher:
    """The teacher's trunk of a run dir or step dir, or that of a safetensors file, on the CPU."""
    single = checkpoint.suffix == single_file.SUFFIX
    source = checkpoint if single else state.resolve(checkpoint)
    trunk, config = state.load_teacher(source)
    step = None if single else int(state.read_state(source)["cursor"]["step"])
    return Teacher(trunk, config.data.global_crops.size, step)


def contents(source: Path) -> Contents:
    """What a shard set's manifest, or an image folder, says it holds.

    Raises:
        UserError: there is neither.
    """
    if manifest.is_shard_set(source):
        held = manifest.load(source)
        return Contents(held.samples, held.classes)
    folder = image_folder.list_images(source)
    return Contents(len(folder.files), folder.classes)


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _extract(encode: Callable[[Tensor], Tensor], source: Path, size: int, batch: int, workers: int) -> FeatureSet:
    rank, world = collectives.rank(), collectives.world_size()
    features, keys, labels = [], [], []
    batches: Iterable[Batch] = stream.evaluation_batches(source, size, batch, workers, rank, world)
    if rank == 0:
        batches = _with_progress(batches, source.name, contents(source).images // world)
    with torch.no_grad():
        for images, batch_keys, batch_labels in batches:
            features.append(encode(images).float().cpu())
            keys += batch_keys
            labels.append(batch_labels)
    part = (torch.cat(features).numpy(), keys, torch.cat(labels).numpy()) if features else None
    parts = [p for p in collectives.gather_objects(part) if p is not None]
    if not parts:
        raise UserError(f"{source}: holds no readable image")
    return FeatureSet(
        torch.from_numpy(np.concatenate([p[0] for p in parts])),
        [key for p in parts for key in p[1]],
        torch.from_numpy(np.concatenate([p[2] for p in parts])),
    )


def _with_progress(batches: Iterable[Batch], name: str, total: int) -> Iterator[Batch]:
    """Passes the batches on; a bar with rate and ETA on a terminal, otherwise a line every ten seconds."""
    live = sys.stderr.isatty()
    start = told = time.monotonic()
    done = 0
    with tqdm(desc=f"features of {name}", total=total, unit=" images", disable=not live, leave=False) as bar:
        for item in batches:
            yield item
            done += len(item[1])
            bar.update(len(item[1]))
            now = time.monotonic()
            if not live and now - told > 10:
                told, rate = now, done / (now - start)
                left = max(0, total - done) / rate
                print(
                    f"features of {name}: {done}/{total} images · {rate:.0f} images/s · ETA {left:.0f} s",
                    file=sys.stderr,
                )
