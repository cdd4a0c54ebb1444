"""The order of data at the size of the internet: what a start costs, and whether every sample comes exactly once.

    python benchmarks/order.py [--shards 500000] [--samples 10000] [--ranks 4096] [--workers 8] [--batch 32768]
                               [--epochs 0 17] [--every 1] [--files] [--json]

A manifest of so many shards is written, of `--samples` samples each on average, but no tars. A fresh process then does
what a loader process does before it reads its first image: it loads the manifest and finds its samples of two batches;
time and memory count from the end of the imports. With `--files`, empty files of the right size are made as well, and
rank 0's comparison of their sizes is measured.

For the coverage, the images of every batch are counted over all ranks and processes, the positions over all steps and
slots, and the samples over all windows; `--every 10` looks at a tenth of the windows and slots. That the vectorised order
counted here is that of the loader is checked at random positions.
"""

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

COMPARED = 2000  # random positions at which the vectorised order is compared with the loader's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--samples", type=int, default=10_000, help="in a shard, on average")
    parser.add_argument("--ranks", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--epochs", type=int, nargs="*", default=[0, 17])
    parser.add_argument("--every", type=int, default=1, help="look at one of so many windows and slots")
    parser.add_argument("--files", action="store_true", help="also make files, and compare their sizes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options)))
        return
    result: dict[str, Any] = {"machine": f"{platform.machine()}, numpy {np.__version__}"}
    with tempfile.TemporaryDirectory(prefix="esvit-scale-") as folder:
        write(Path(folder), options)
        command = [sys.executable, __file__, *sys.argv[1:], "--start", folder]
        result |= json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    result["processes"] = images(options)
    for epoch in options.epochs:
        result[f"epoch {epoch}"] = coverage(options, epoch)
    print(json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


def counts_of(options: argparse.Namespace) -> Any:
    """The samples of every shard: unequal, and `shards` × `samples` in all."""
    counts = np.random.default_rng(0).integers(0, options.samples // 5 + 1, options.shards // 2)
    counts = options.samples + np.concatenate([counts, -counts, np.zeros(options.shards % 2, np.int64)])
    assert counts.sum() == options.shards * options.samples
    return counts


def config_of(options: argparse.Namespace, train: Path | str = "") -> Any:
    from esvit_scale.config import validate

    data = {"train": str(train), "workers": options.workers}
    return validate({"data": data, "train": {"global_batch": options.batch}}, "benchmark")


def write(folder: Path, options: argparse.Namespace) -> None:
    from esvit_scale.data import manifest as manifests
    from esvit_scale.data.shard_table import Shard

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    counts = counts_of(options).tolist()
    shards = [
        Shard(f"shard-{i:06d}.tar", n, 55_000 * n, digest(f"t{i}"), digest(f"i{i}")) for i, n in enumerate(counts)
    ]
    (folder / manifests.MANIFEST).write_bytes(manifests.dump(shards, (), "", "benchmark"))
    for shard in shards if options.files else ():
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.bytes)  # takes no room


def start(options: argparse.Namespace) -> dict[str, Any]:
    """What a loader process of the last rank does before its first read, in a process without other work."""
    from esvit_scale.data import identity as identities
    from esvit_scale.data import manifest as manifests
    from esvit_scale.data.loader import LoaderAssignment
    from esvit_scale.data.shard_stream import ShardSamples

    config, before, began = config_of(options, options.start), peak_mb(), time.process_time()
    loaded = manifests.load(options.start)
    result: dict[str, Any] = {"manifest": f"{time.process_time() - began:.2f} s, peak +{peak_mb() - before:.0f} MB"}
    steps = loaded.samples // options.batch
    assignment = LoaderAssignment(config, options.ranks - 1, options.ranks, steps + 7, steps + 9, steps)
    samples_of = ShardSamples(assignment, loaded)
    with patch.object(LoaderAssignment, "worker", lambda self: (options.workers - 1, options.workers)):
        found = [samples_of._samples_of(samples_of._addresses())(steps + step) for step in (7, 8)]
    seconds, peak = time.process_time() - began, peak_mb() - before
    result["start"] = f"{seconds:.2f} s, peak +{peak:.0f} MB, to {sum(map(len, found))} samples of two batches"
    result["start_s"], result["start_mb"] = seconds, peak
    began = time.process_time()
    identities.identity(loaded)
    result["identity (rank 0)"] = f"{time.process_time() - began:.2f} s, peak +{peak_mb() - before:.0f} MB"
    if options.files:
        began, wall = time.process_time(), time.monotonic()
        manifests.check_sizes(loaded)
        result["sizes (rank 0)"] = (
            f"{time.process_time() - began:.2f} s of processor time, {time.monotonic() - wall:.2f} s"
        )
        result["sizes (rank 0)"] += f", peak +{peak_mb() - before:.0f} MB"
    return result


def peak_mb() -> float:
    """Largest resident memory so far."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def images(options: argparse.Namespace) -> str:
    """Count the images of batches over all ranks and loader processes, until the turns of the processes repeat."""
    from esvit_scale.data.loader import LoaderAssignment

    config, of_rank = config_of(options), options.batch // options.ranks
    parts = min(options.workers, of_rank)
    period = options.workers // math.gcd(options.workers, parts)
    made, used = np.zeros((period, options.batch), np.int64), set[tuple[int, int]]()
    for rank in range(options.ranks):
        assignment = LoaderAssignment(config, rank, options.ranks, 0, period, 10**9)
        for worker in range(options.workers):
            with patch.object(LoaderAssignment, "worker", lambda self, worker=worker: (worker, options.workers)):
                for batch_index, part in assignment.parts_of_worker():
                    made[batch_index, part.start : part.stop] += 1
                    used.add((rank, worker))
    assert (made == 1).all()
    assert len(used) == options.ranks * options.workers
    return f"{len(used)} of {options.ranks} ranks x {options.workers} workers make every image of {period} batches once"


def coverage(options: argparse.Namespace, epoch: int) -> str:
    """Count positions over all steps and slots, and samples over all windows, of one epoch."""
    from esvit_scale.data.order import Order

    began, counts, config = time.process_time(), counts_of(options), config_of(options)
    slots, window_shards = config.slots, config.data.shuffle_window
    order = Order(config.seed, epoch, counts, options.batch, slots, window_shards)
    steps, images = np.arange(order.steps)[:, None], np.arange(options.batch // slots)[None, :]
    for slot in range(0, slots, options.every):
        positions = np.ravel(order.position(steps, slot, images))  # type: ignore[arg-type]
        assert (positions == np.arange(slot * len(positions), (slot + 1) * len(positions))).all()
    assert order.samples - options.batch < slots * len(positions) <= order.samples

    rng, seen, shards_seen = np.random.default_rng(epoch), 0, np.zeros(options.shards, np.int64)
    compared = np.sort(rng.integers(0, order.samples, COMPARED))
    for window, part in order.windows(range(order.samples)):
        shards = order.shards_of_window(window)
        shards_seen[shards] += 1
        assert len(part) == counts[shards].sum()
        if window % options.every:
            continue
        shuffled, firsts = order.shuffled(window), np.cumsum([0, *counts[shards]])
        marks = np.zeros(len(part), bool)
        marks[shuffled] = True
        assert marks.all()  # each sample of these shards once,
        assert len(shuffled) == len(part)  # because there are as many offsets as samples
        seen += len(part)
        for position in compared[slice(*np.searchsorted(compared, [part.start, part.stop]))].tolist():
            offset = int(shuffled[position - part.start])
            shard = int(np.searchsorted(firsts, offset, side="right")) - 1
            assert order.locate(position) == (shards[shard], offset - int(firsts[shard]))
    assert (shards_seen == 1).all()
    dropped = order.samples - slots * len(positions)
    return (
        f"{seen:,} of {order.samples:,} samples looked at, each comes once; the order drops {dropped:,} "
        f"({time.process_time() - began:.0f} s)"
    )


if __name__ == "__main__":
    main()
