"""`esvit-scale doctor --data`: measures whether this machine's CPU cores can load a set as fast as its GPUs train."""

import statistics
import time
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import torch

from esvit_scale.config import Config
from esvit_scale.data import stream
from esvit_scale.data.decode import BadImage
from esvit_scale.data.manifest import Manifest
from esvit_scale.data.picture import open_picture
from esvit_scale.data.reader import ShardReader
from esvit_scale.data.remote import working_set
from esvit_scale.division import largest_divisor
from esvit_scale.errors import UserError
from esvit_scale.machine import usable_cpus
from esvit_scale.train.mfu import ideal_images_per_s

SECONDS = 6.0  # duration of each measurement
USUAL_MFU = 0.4  # fraction of the rate of large matrix products that a training step reaches when data is no limit
LARGE = 1_000_000  # pixels of an image above which decoding is the main cost


class Supply(NamedTuple):
    """Images/s that the loader processes of this machine produce."""

    one: float  # process
    all: float
    processes: int


def run(config: Config) -> int:
    """Measure and print the images/s of the storage, of one loader process and of all of them, the images/s that the
    GPUs need, and what to change; return 0. Of a run with training stages it measures the first.
    """
    if config.stages:
        print(_row("stage", f"0 of {len(config.stages)}; for another, give its keys as key=value and stages=[]"))
        config = config.of_stages[0]
    data = stream.open_data(config)
    cores = usable_cpus()
    for line in working_set.check(config, data, max(torch.cuda.device_count(), 1)):
        print(line)
    if isinstance(data, Manifest):
        print(_row("storage", _storage(data)))
    supply = Supply(_rate(config, data, 1), _rate(config, data, cores), cores)
    print(_row("one process", f"{supply.one:.0f} images/s"))
    share = supply.all / (cores * supply.one)
    print(_row(f"{cores} processes", f"{supply.all:.0f} images/s, {share:.0%} of {cores} × one process"))
    gpus = torch.cuda.device_count()
    if not gpus:
        print(_row("GPUs", "none on this machine; each GPU needs its part of these images/s"))
        print(f"\nSet data.workers={cores} for one rank.")
        return 0
    demand = USUAL_MFU * ideal_images_per_s(config, torch.device("cuda"), gpus)
    print(_row("GPUs", f"{gpus}, about {demand:.0f} images/s with {config.model.trunk} at an MFU of {USUAL_MFU:.0%}"))
    print("\n" + "\n".join(advice(config, supply, demand, gpus, _pixels(data) if isinstance(data, Manifest) else 0)))
    return 0


def advice(config: Config, supply: Supply, demand: float, gpus: int, pixels: float) -> list[str]:
    """Return sentences that say whether the loader is fast enough and what to change.

    Args:
        demand: images/s that the GPUs need together.
        pixels: median number of pixels of an image; 0: not known.
    """
    each = max(supply.processes // gpus, 1)
    if supply.all >= demand:
        enough = min(max(-(-round(1.2 * demand / gpus) // max(round(supply.all / supply.processes), 1)), 1), each)
        return [
            f"The CPU cores load {supply.all / demand:.1f} times what the GPUs need: data.workers={enough} is enough."
        ]
    lines = [f"The CPU cores load {supply.all / demand:.0%} of what the GPUs need:"]
    if config.data.workers != each:
        lines.append(f"- set data.workers={each}: {supply.processes} cores over {gpus} ranks")
    if config.data.photometric == "workers":
        lines.append("- set data.photometric=device: it costs the GPUs little")
    if pixels > LARGE:
        lines.append(
            f"- images have {pixels / 1e6:.1f} megapixels: write the set again with `shards create --short-side`, which decodes faster"
        )
    if supply.all < 0.7 * supply.processes * supply.one:
        lines.append("- processes slow each other down: by hyper-threads, other jobs, or the storage (see its row)")
    lines.append(f"- use {demand / supply.all:.1f} times as many CPU cores per GPU")
    return lines


def _rate(config: Config, data: stream.TrainingData, workers: int) -> float:
    """Measure the images/s of `workers` loader processes together, without their start-up."""
    batch = min(16 * workers, data.samples)
    if batch < workers:
        raise UserError(f"{config.data.train}: {data.samples} samples are too few to measure {workers} processes")
    batch = batch // workers * workers
    smaller = config.model_copy(
        update={
            "train": config.train.model_copy(update={"global_batch": batch, "grad_accum": 1}),
            "data": config.data.model_copy(update={"workers": workers, "slots": largest_divisor(batch, 512)}),
        }
    )
    batches = stream.batches(smaller, data, 0, 1, 0, 10**6)
    for _ in islice(batches, 4):  # skip the start-up and the prefetched batches
        pass
    began, images = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        images += len(next(batches).keys)
    return images / (time.monotonic() - began)


def _storage(data: Manifest) -> str:
    """Measure how fast samples are read, shard after shard and each at most once; return the row of the table."""
    reader, read, count, began = ShardReader(data), 0, 0, time.monotonic()
    for shard, i in ((s, i) for s, shape in enumerate(data.shards) for i in range(shape.samples)):
        with suppress(BadImage, OSError):
            read += len(reader.image(shard, reader.entry(shard, i)))
        count += 1
        if time.monotonic() - began > SECONDS / 3:
            break
    seconds = time.monotonic() - began
    reader.close()
    return f"{count / seconds:.0f} images/s read, {read / seconds / 1e6:.0f} MB/s (including files that the system has cached)"


def _pixels(data: Manifest) -> float:
    """Return the median number of pixels (height × width) of a few images of the set."""
    reader = ShardReader(data)
    shard = max(range(len(data.shards)), key=lambda s: data.shards[s].samples)
    found = []
    for i in range(min(20, data.shards[shard].samples)):
        with suppress(BadImage, OSError):
            picture = open_picture(reader.image(shard, reader.entry(shard, i)))
            found.append(picture.width * picture.height)
    reader.close()
    return statistics.median(found) if found else 0


def _row(name: str, text: str) -> str:
    return f"{name:<16}{text}"
