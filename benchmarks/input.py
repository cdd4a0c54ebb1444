"""Images per second of the input pipeline on one core, stage by stage beside the official Pillow pipeline, and what
more loader processes add.

    python benchmarks/input.py [--data SHARDS] [--images 24] [--rounds 5] [--workers 1 2] [--json]

Both sides take turns on the same JPEGs in one process, in processor time, and the best round counts: so that neither a
machine whose speed drifts nor one that others share favours a side. Without --data the JPEGs are photographs that scikit-image and scikit-learn bring, at two sizes. The
official pipeline is rebuilt from torchvision's transforms with the official parameters; 2×224 + 8×96 crops.
"""

import argparse
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image
from torchvision import transforms as T

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import photometric, stream
from esvit_scale.data.picture import open_picture
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.data.worker_batch import DecodedSample, decode_for_crops, make_worker_batch

SIZES = {"0.19 MP (ImageNet's typical)": 433, "1.9 MP": 1386}  # square root of the pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an indexed shard set of JPEGs instead of the bundled photographs")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="loader processes to compare")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = {str(options.data): read(options.data, options.images)} if options.data else bundled(options.images)
    result: dict[str, Any] = {name: stages(files, options.rounds) for name, files in sets.items()}
    result["workers"] = scaling(next(iter(sets.values())), options.workers, options.rounds) if options.workers else {}
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for name in sets:
        print(f"\n{name}: {np.mean([len(f) for f in sets[name]]) / 1000:.0f} KB a JPEG, images/s on one core\n")
        print("| stage | official (Pillow) | ours | ratio | of our decode-only rate |\n|---|---|---|---|---|")
        for stage, (theirs, ours) in result[name].items():
            limit = ours / result[name]["decode only"][1]
            print(f"| {stage} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.1f} | {limit:.0%} |")
    if options.workers:
        print(
            "\n| loader processes | images/s | of so many times one | images per core-second | of one's |\n|---|---|---|---|---|"
        )
        one = result["workers"][str(options.workers[0])]
        for workers, (rate, per_core_second) in result["workers"].items():
            wall = rate / one[0] / int(workers) * options.workers[0]
            print(f"| {workers} | {rate:.0f} | {wall:.0%} | {per_core_second:.0f} | {per_core_second / one[1]:.0%} |")


# --- the JPEGs -----------------------------------------------------------------------------------------------------


def bundled(count: int) -> dict[str, list[bytes]]:
    names = ("astronaut", "coffee", "chelsea", "rocket", "immunohistochemistry", "retina", "hubble_deep_field")
    photographs = [getattr(skimage.data, name)() for name in names]
    photographs += [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    files: dict[str, list[bytes]] = {}
    for name, root in SIZES.items():
        files[name] = []
        for pixels in photographs[:count]:
            image = Image.fromarray(pixels)
            zoom = root / (image.width * image.height) ** 0.5
            image = image.resize((round(image.width * zoom), round(image.height * zoom)), Image.Resampling.BICUBIC)
            out = io.BytesIO()
            image.save(out, "JPEG", quality=92)
            files[name].append(out.getvalue())
    return files


def read(root: Path, count: int) -> list[bytes]:
    manifest = manifests.load(root)
    reader = ShardReader(manifest)
    return [reader.image(0, reader.entry(0, i)) for i in range(min(count, manifest.shards[0].samples))]


# --- the two pipelines ---------------------------------------------------------------------------------------------


def stages(files: list[bytes], rounds: int) -> dict[str, tuple[float, float]]:
    """Stage → images/s (official, ours)."""
    config, on_workers = Config(), Config.model_validate({"data": {"photometric": "workers"}})
    crop_only, full = official()
    sides: dict[str, tuple[Callable[[bytes], Any], Callable[[bytes], Any]]] = {
        "decode only": (lambda data: np.asarray(pillow(data)), lambda data: open_picture(data).pixels()),
        "to uint8 crops": (
            lambda data: [np.asarray(t(image)) for image in [pillow(data)] for t in crop_only],
            lambda data: part(config, data),
        ),
        "everything on the CPU": (
            lambda data: [t(image) for image in [pillow(data)] for t in full],
            lambda data: normalised(part(on_workers, data)),
        ),
    }
    best = {stage: [float("inf")] * 2 for stage in sides}
    for _ in range(rounds):
        for stage, pair in sides.items():
            for side, run in enumerate(pair):
                began = time.process_time()
                for data in files:
                    run(data)
                best[stage][side] = min(best[stage][side], time.process_time() - began)
    return {stage: (len(files) / theirs, len(files) / ours) for stage, (theirs, ours) in best.items()}


def pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def official() -> tuple[list[Any], list[Any]]:
    """The ten transforms of the official DataAugmentationDINO: up to the flip, and whole."""

    def crop(size: int, scale: tuple[float, float]) -> list[Any]:
        resized = T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC)
        return [resized, T.RandomHorizontalFlip(0.5)]

    def blur(p: float) -> Any:
        def run(image: Image.Image) -> Image.Image:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))) if random.random() <= p else image

        return T.Lambda(run)

    colour = [T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), T.RandomGrayscale(p=0.2)]
    end = [T.ToTensor(), T.Normalize(photometric.MEAN, photometric.STD)]
    solarise = T.Lambda(lambda image: ImageOps.solarize(image) if random.random() < 0.2 else image)
    views = [(224, (0.4, 1.0), [blur(1.0)]), (224, (0.4, 1.0), [blur(0.1), solarise])]
    views += [(96, (0.05, 0.4), [blur(0.5)])] * 8
    crops = [crop(size, scale) for size, scale, _ in views]
    whole = [T.Compose([*c, *colour, *rest, *end]) for c, (_, _, rest) in zip(crops, views, strict=True)]
    return [T.Compose(c) for c in crops], whole


def part(config: Config, data: bytes) -> list[torch.Tensor]:
    key = str(random.random())
    sample = DecodedSample(0, key, -1, *decode_for_crops(config, 0, key, data), [])
    return make_worker_batch(config, 0, [sample], 1).crops


def normalised(crops: list[torch.Tensor]) -> list[torch.Tensor]:
    pixels = [c.flatten(0, 1).permute(0, 3, 1, 2) for c in crops]
    return [
        photometric.normalize_(p.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)) for p in pixels
    ]


# --- loader processes ----------------------------------------------------------------------------------------------


def scaling(files: list[bytes], workers: list[int], rounds: int) -> dict[str, tuple[float, float]]:
    """Loader processes → images/s of the whole stream, and images for each second of processor time that the processes
    took (which a machine shared with others leaves alone). From a shard set in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        samples = [Sample(f"{i:05d}", None, "jpg", files[i % len(files)]) for i in range(1024)]
        manifest = write_samples(samples, Path(folder) / "set", (), 128)
        best = dict.fromkeys(workers, (0.0, 0.0))
        for _ in range(rounds):
            for n in workers:
                config = Config.model_validate({"data": {"workers": n}, "train": {"global_batch": 32}})
                rates = stream_rates(stream.batches(config, manifest, 0, 1, 0, 10**6))
                best[n] = (max(best[n][0], rates[0]), max(best[n][1], rates[1]))
    return {str(n): rates for n, rates in best.items()}


def stream_rates(batches: Iterator[stream.Batch], warm_up: int = 6, timed: int = 24) -> tuple[float, float]:
    for _ in islice(batches, warm_up):  # start-up, and what was prepared ahead
        pass
    began, busy, images = time.perf_counter(), children_seconds(), 0
    for batch in islice(batches, timed):
        images += len(batch.keys)
    return images / (time.perf_counter() - began), images / max(children_seconds() - busy, 1e-9)


def children_seconds() -> float:
    """Processor time of this process's living children."""
    pid = os.getpid()
    ticks = 0
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
