"""Peak memory of real training steps against what `esvit-scale plan` says: run alone, prints a table.

    python benchmarks/plan.py                    # all cases, one after the other; each up to 10 GB of main memory
    python benchmarks/plan.py swin_305m:zero2:bf16:1:4

A case is shape:ds_config:precision:ranks:global batch[:activation checkpointing]. Every rank builds student, teacher and
optimizer, notes its resident memory, takes some steps on random crops, and reports its high-water mark since (Linux:
/proc/self/clear_refs). On a CPU memory counts when it is first written, so the reduction buckets, which DeepSpeed
reserves whole, count for what passes through them: the plan's formulas with `on_cpu=True`.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esvit_scale.config import Config

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
]
STEPS = 3  # stage 3 learns its order of gathering in the first


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


def plan(case: str) -> float:
    """Bytes of the peak above what is there after building; stage 3 has its gradients' buffer by then."""
    from esvit_scale.objective import costs
    from esvit_scale.scaling import memory

    config, stage = config_of(case), int(case.split(":")[1][-1])
    ranks, kept = int(case.split(":")[3]), costs.checkpointing_of(config)
    m = memory.memory(config, memory.network_of(config), stage, ranks, kept, on_cpu=True)
    return m.peak - m.at_start - (m.gradients if stage == 3 else 0)


def status(name: str) -> float:
    """A line of /proc/self/status in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def measure(case: str, out: str) -> None:
    """One rank: baseline and peak in bytes, written to out.rank."""
    import torch

    from esvit_scale.data.stream import MicroBatch
    from esvit_scale.objective.schedules import Schedules
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
        trainer.train_step([batch])
    peak = status("VmHWM")
    Path(f"{out}.{world.rank}").write_text(json.dumps({"baseline": baseline, "peak": peak}))
    worlds.stop()


def run(case: str) -> list[dict[str, float]]:
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
    print(
        f"{'case':34s} {'rank':>4s} {'measured':>9s} {'plan':>9s} {'off':>7s}   MiB above what is there after building"
    )
    for case in options.cases:
        planned = plan(case) / 2**20
        for rank, found in enumerate(run(case)):
            measured = (found["peak"] - found["baseline"]) / 2**20
            print(f"{case:34s} {rank:4d} {measured:9.0f} {planned:9.0f} {planned / measured - 1:+7.1%}", flush=True)


if __name__ == "__main__":
    main()
