"""Real training steps on CPU processes against what `esvit-scale plan` says: peak memory, traffic and time.

    python benchmarks/plan.py                    # all cases, one after the other; each up to 10 GB of main memory
    python benchmarks/plan.py swin_305m:zero2:bf16:1:4

A case is shape:ds_config:precision:ranks:global batch[:activation checkpointing]. Every rank builds student, teacher and
optimizer, notes its resident memory, takes some steps on random crops, and reports

- its high-water mark since (Linux: /proc/self/clear_refs). On a CPU memory counts when it is first written, so the
  reduction buckets, which DeepSpeed reserves whole, count for what passes through them: the plan's formulas with
  `on_cpu=True`. "plan" has activations by their formulas, "traced" those of the traced step;
- the bytes of a step's collectives by kind, from wrapped functions of torch.distributed;
- the median of the processor times of three steps, with an allocator that keeps freed memory, as runs have it. The estimate is the
  traced step's, on a machine with this one's rates, which all ranks measure at once between the steps, in processor time
  as well: of the products of a layer of the third stage, which has most of a Swin's work; of the operations between
  them, on tensors of the same layer; of memory, on tensors that no cache holds; and of collectives. In processor time
  nothing hides behind another, so collectives count in full.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import noted_collectives

if TYPE_CHECKING:
    from esvit_scale.config import Config
    from esvit_scale.scaling.memory import ElementCounts
    from esvit_scale.scaling.step_trace import StepTrace

SHAPES = {  # trunk and heads together 309 and 310 million parameters: between Swin-L and SwinV2-H; and a smaller one
    "swin_138m": {"trunk": "swin_l", "embed_dim": 160, "heads": [5, 10, 20, 40]},
    "swin_305m": {"trunk": "swin_l", "embed_dim": 240, "heads": [5, 10, 20, 40]},
    "swinv2_310m": {"trunk": "swinv2_l", "embed_dim": 240, "heads": [5, 10, 20, 40]},
}
CASES = [  # what decides the peak: the optimizer's step, or the activations of a larger batch
    "swin_305m:zero0:fp32:1:4",
    "swin_305m:zero1:bf16:1:4",
    "swin_305m:zero2:bf16:1:4",
    "swinv2_310m:zero2:bf16:1:4",
    "swin_305m:zero3:bf16:1:4",
    "swin_305m:zero0:fp32:1:12:none",
    "swin_305m:zero3:bf16:2:8",
    "swin_305m:zero3:bf16:4:8",
    "swin_138m:zero1:fp32:2:8",
    "swin_138m:zero3:fp32:2:8",
]
STEPS = 3  # stage 3 learns its order of gathering in the first two
TIMED_STEPS = 3
RATE_BYTES = 2**26  # of the tensors by which the rates of memory and of collectives are measured
LAYERS = 4  # of which the products are timed in turns, so that their weights come from memory as in a step
LAUNCH = 1e-5  # seconds that an operation of torch takes on a CPU at the least


def config_of(case: str) -> "Config":
    from esvit_scale import config as configs

    shape, ds_config, precision, _, batch, *recompute = case.split(":")
    values = {
        "name": shape,
        "data": {"global_crops": {"size": 112}, "local_crops": [{"size": 48, "count": 2}]},
        "model": SHAPES[shape],
        "objective": {"prototypes": 4096, "head_hidden": 512},
        "optim": {"freeze_last_layer_epochs": 0},
        "train": {
            "global_batch": int(batch),
            "precision": precision,
            "ds_config": ds_config,
            "activation_checkpointing": recompute[0] if recompute else "torch",
            "steps": 10,
        },
    }
    return configs.validate(values, where=case)


class Planned(NamedTuple):
    """What the plan says about one rank of a case: bytes above what is there after building, and of collectives."""

    by_formulas: float
    by_trace: float
    traffic: dict[str, int]  # kind → bytes
    step: "StepTrace"
    network: "ElementCounts"


def plan(case: str) -> Planned:
    """The plan of a case; stage 3 has its gradients' buffer after building."""
    from esvit_scale.objective import costs
    from esvit_scale.scaling import memory, step_trace, traffic

    config, stage = config_of(case), int(case.split(":")[1][-1])
    ranks, kept = int(case.split(":")[3]), costs.checkpointing_of(config)
    network = memory.network_of(config)
    step = step_trace.trace(config, ranks, kept, step_trace.ON_CPU)
    peaks = []
    for peak in (None, step.peaks):
        m = memory.memory(config, network, stage, ranks, kept, on_cpu=True, traced=peak)
        peaks.append(m.peak - m.at_start - (m.gradients if stage == 3 else 0))
    said: dict[str, int] = {}
    for one in traffic.of_step(config, network, stage, ranks, step):
        said[one.kind] = said.get(one.kind, 0) + one.bytes
    return Planned(peaks[0], peaks[1], {kind: count for kind, count in said.items() if count}, step, network)


def seconds(case: str, planned: Planned, rates: dict[str, float]) -> tuple[float, str]:
    """The estimated processor time of a step on a machine with these rates, and its largest part."""
    from esvit_scale.scaling import roofline

    memory = rates["memory"]
    machine = roofline.Machine(
        rates["products"] / 1e12,
        "as measured",
        memory / 1e9,
        reached=rates["operations"] / memory,
        streamed=1.0,
        launch=LAUNCH,
    )
    stage, ranks = int(case.split(":")[1][-1]), int(case.split(":")[3])
    found = roofline.estimate(config_of(case), planned.network, stage, ranks, planned.step, machine)
    parts = {term.name: term.seconds for term in found.terms if term.limit != "links"}
    if ranks > 1:
        parts |= {f"collectives: {kind}": count / rates[kind] for kind, count in planned.traffic.items()}
    largest = max(parts, key=lambda name: parts[name])
    total = sum(parts.values())
    return total, f"{parts[largest] / total:.0%} {largest}"


def status(name: str) -> float:
    """A line of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def measure(case: str, out: str) -> None:
    """One rank: bytes at the start and at the peak, bytes of collectives, seconds of a step, rates; written to
    out.rank."""
    noted_collectives.wrap()
    import torch

    from esvit_scale.data.stream import MicroBatch
    from esvit_scale.objective.schedules import Schedules
    from esvit_scale.parallel import allocator, collectives
    from esvit_scale.parallel import world as worlds
    from esvit_scale.train.trainer import Trainer

    config = config_of(case)
    world = worlds.start()
    trainer = Trainer(config, world, Schedules(config, 5))
    images = config.train.global_batch // world.size
    dtype = trainer.engines.dtype
    sizes = config.crop_sizes
    crops = [torch.randn(images * sizes.count(s), 3, s, s).to(dtype) for s in dict.fromkeys(sizes)]
    batch = MicroBatch(crops, torch.arange(images) + world.rank * images)
    gc.collect()
    baseline = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        noted_collectives.noted.clear()
        trainer.train_step([batch])
    peak, said = status("VmHWM"), list(noted_collectives.noted)
    allocator.set_thresholds(ctypes.CDLL(None).mallopt)
    trainer.train_step([batch])
    times, rates = [], []
    for _ in range(TIMED_STEPS):
        collectives.barrier()
        began = time.process_time()
        trainer.train_step([batch])
        times.append(time.process_time() - began)
        rates.append(_rates(config, images, dtype))
    totals: dict[str, int] = {}
    for kind, count in said:
        totals[kind] = totals.get(kind, 0) + count
    median = {name: statistics.median(rate[name] for rate in rates) for name in rates[0]}
    found = {"baseline": baseline, "peak": peak, "step": statistics.median(times), "traffic": totals, "rates": median}
    Path(f"{out}.{world.rank}").write_text(json.dumps(found))
    worlds.stop()


def _rates(config: "Config", images: int, dtype: Any) -> dict[str, float]:
    """Rates of this process while all ranks measure: FLOP/s of products, bytes/s of operations between them and of memory,
    and, with several ranks, bytes/s of collectives by kind."""
    import torch

    from esvit_scale.parallel import collectives

    collectives.barrier()
    tokens = images * sum((size // 16) ** 2 for size in config.crop_sizes)
    width = 4 * (config.model.embed_dim or 0)  # SHAPES give it
    x = torch.randn(tokens, width).to(dtype)
    wide = torch.randn(tokens, 4 * width).to(dtype)
    weights = [torch.randn(4 * width, width).to(dtype) for _ in range(LAYERS)]

    def products() -> None:
        for weight in weights:
            torch.mm(x, weight.t())
            torch.mm(wide, weight)
            torch.mm(wide.t(), x)

    flops = LAYERS * 3 * 2 * tokens * width * 4 * width
    found = {"products": flops / _processor_seconds(products), "operations": _rate_of_operations(x, wide)}
    collectives.barrier()
    a, b = torch.ones(RATE_BYTES // 4), torch.ones(RATE_BYTES // 4)
    found["memory"] = 3 * RATE_BYTES / _processor_seconds(lambda: a.add_(b))
    return found | (_rates_of_collectives(a.to(dtype)) if collectives.world_size() > 1 else {})


def _rate_of_operations(x: Any, wide: Any) -> float:
    """Bytes/s, as a trace counts them, of what a block does between its products: norm, activation, residual, order of
    windows, softmax, and the backward's sums."""
    import torch
    from torch.nn import functional

    width = x.shape[1]
    scores = torch.randn(len(x), 20, 49).to(x.dtype)
    order = torch.randperm(len(x))

    def operations() -> None:
        functional.layer_norm(x, (width,))
        functional.gelu(wide)
        functional.softmax(scores, -1)
        x.index_select(0, order)
        torch.add(x, x)
        wide.sum(0)

    moved = 2 * x.nbytes + 2 * wide.nbytes + 2 * scores.nbytes + 2 * x.nbytes + 2 * x.nbytes + wide.nbytes
    return moved / _processor_seconds(operations)


def _rates_of_collectives(x: Any) -> dict[str, float]:
    """Bytes/s of processor time of this rank, of the bytes as traffic counts them: the whole tensor of all ranks."""
    import torch
    from torch import distributed as dist

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the names before torch 2.14
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    ranks, rank = dist.get_world_size(), dist.get_rank()
    x = x[: len(x) // ranks * ranks]
    part = torch.chunk(x.clone(), ranks)[rank]
    kinds: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: gather(x, part),
        "reduce_scatter": lambda: scatter(part, x),
    }
    return {kind: x.nbytes / _processor_seconds(work) for kind, work in kinds.items()}


def _processor_seconds(work: Callable[[], object]) -> float:
    """The median of the processor times of some work."""
    times = []
    for _ in range(8):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times)


def run(case: str) -> list[dict[str, Any]]:
    ranks = int(case.split(":")[3])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *(torchrun if ranks > 1 else []), __file__, case, "--out", str(out)]
        # Large blocks go back to the system when they are freed, so that resident memory is memory in use.
        quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env={**os.environ, **quiet}, stdout=subprocess.DEVNULL)
        return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        measure(options.cases[0], options.out)
        return
    for case in options.cases:
        report(case)


def report(case: str) -> None:
    """Measure a case and print it beside the plan."""
    planned = plan(case)
    ranks = run(case)
    mib = [(found["peak"] - found["baseline"]) / 2**20 for found in ranks]
    most = max(mib)
    print(case, flush=True)
    print(f"  peak MiB above what is there after building, of each rank: {', '.join(f'{m:.0f}' for m in mib)}")
    for name, bytes_ in (("plan", planned.by_formulas), ("traced", planned.by_trace)):
        print(f"    {name:8s} {bytes_ / 2**20:7.0f} ({bytes_ / 2**20 / most - 1:+.1%})")
    same = all(found["traffic"] == planned.traffic for found in ranks) if len(ranks) > 1 else None
    said = ", ".join(f"{kind} {count:,}" for kind, count in planned.traffic.items())
    if same is not None:
        print(f"  traffic: {said} bytes planned; measured {'equal' if same else [found['traffic'] for found in ranks]}")
    rates = {name: min(found["rates"][name] for found in ranks) for name in ranks[0]["rates"]}
    step = max(found["step"] for found in ranks)
    estimated, largest = seconds(case, planned, rates)
    print(f"  step: measured {step:.2f} s, estimated {estimated:.2f} s ({estimated / step - 1:+.0%}; {largest})")
    in_gb = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items() if name != "products")
    print(f"    at {rates['products'] / 1e9:.0f} GFLOP/s; {in_gb}", flush=True)


if __name__ == "__main__":
    main()
