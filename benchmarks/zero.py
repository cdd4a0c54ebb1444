"""Memory per rank and time per step of ZeRO 0–3 at 1, 2 and 4 processes of this machine, and of several optimizers.

    python benchmarks/zero.py [--preset demo] [--override KEY=VALUE …] [--processes 1 2 4] [--stages zero0 zero1 …]
        [--optimizers adamw muon …]

The global batch is the same in every row, so the losses of an optimizer are too; the table shows the last one. The
optimizer's seconds are those of its update of the fp32 values, without clipping, and with Muon's exchange of matrices. State is what stays
between steps (parameters, masters, moments, teacher), counted tensor by tensor; the peak is of the whole process on a
CPU and of the allocator on a GPU, the largest of the ranks. Processes share this machine's cores: their times compare
within one number of processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
STEPS = 4  # timed, after two that are not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo", help="a preset or a config file")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--stages", nargs="+", default=["zero0", "zero1", "zero2", "zero3"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], metavar="NAME", help="values of optim.name")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        run_cell(json.loads(options.cell))
        return
    rows = []
    for processes in options.processes:
        for stage in options.stages:
            for optimizer in options.optimizers:
                overrides = [*options.override, f"optim.name={optimizer}"]
                cell = {"preset": options.preset, "overrides": overrides, "processes": processes, "stage": stage}
                rows.append(cell | {"optimizer": optimizer} | measured(cell))
    print(json.dumps(rows, indent=2) if options.json else table(rows))


def measured(cell: dict[str, Any]) -> dict[str, Any]:
    from esvit_scale.machine import usable_cpus

    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(cell["processes"]),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, usable_cpus() // cell["processes"]))}
    command = [*torchrun, __file__, "--cell", json.dumps(cell)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def run_cell(cell: dict[str, Any]) -> None:
    import step as step_benchmark
    import torch

    from esvit_scale import config as configs
    from esvit_scale.data.stream import MicroBatch
    from esvit_scale.objective.schedules import Schedules
    from esvit_scale.parallel import collectives
    from esvit_scale.parallel import world as worlds
    from esvit_scale.train.trainer import Trainer

    precision = [] if any(o.startswith("train.precision") for o in cell["overrides"]) else ["train.precision=fp32"]
    config = configs.resolve(cell["preset"], [*precision, f"train.ds_config={cell['stage']}", *cell["overrides"]])
    world = worlds.start()
    trainer = Trainer(config, world, Schedules(config, steps_per_epoch=1))
    batch = config.train.global_batch
    share = batch // world.size
    generator = torch.Generator().manual_seed(0)
    mine = slice(world.rank * share, (world.rank + 1) * share)
    crops = []
    for size, views in dict.fromkeys((s, config.crop_sizes.count(s)) for s in config.crop_sizes):
        pixels = torch.randn(views, batch, 3, size, size, generator=generator)[:, mine].flatten(0, 1)
        crops.append(pixels.to(world.device, trainer.engines.dtype))
    micro = MicroBatch(crops, torch.arange(batch, device=world.device)[mine])
    seconds, loss = [], torch.zeros(())
    of_optimizer = time_optimizer(trainer.engines.optimizer)
    for _ in range(STEPS + 2):
        collectives.barrier()
        of_optimizer.append(0.0)
        began = time.perf_counter()
        loss = trainer.train_step([micro]).logs["loss"]
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    answer = {
        "state_mb": state_bytes(trainer.engines) / 1e6,
        "peak_mb": step_benchmark.peak_mb(world.device),
        "step_s": statistics.median(seconds[2:]),
        "optimizer_s": statistics.median(of_optimizer[2:]),
        "loss": collectives.all_reduce_mean_(loss.float()).item(),
    }
    ranks = collectives.gather_objects(answer)
    if world.rank == 0:
        print(json.dumps({key: max(rank[key] for rank in ranks) for key in answer}), flush=True)
    worlds.stop()


def time_optimizer(optimizer: Any) -> list[float]:
    """Add the seconds that an optimizer takes to the last element of the list that is returned.

    ZeRO calls an optimizer once for every parameter group.
    """
    import torch

    seconds: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(*_: Any) -> None:
        seconds[-1] -= now()

    def end(*_: Any) -> None:
        seconds[-1] += now()

    optimizer.register_step_pre_hook(begin)  # after the gradient clipper's, and its post-hook before `end`
    optimizer.register_step_post_hook(end)
    return seconds


def state_bytes(engines: Any) -> int:
    """What this rank keeps between steps, each storage once."""
    import torch

    from esvit_scale.parallel.zero import local_tensors

    networks = (engines.student.module, engines.teacher.module)
    tensors = [t for network in networks for t in local_tensors(network.parameters())]
    tensors += [p.flat for p in engines.partitions] + list(engines.teacher.values)
    tensors += [v for state in engines.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def table(rows: list[dict[str, Any]]) -> str:
    from step import machine

    lines = [
        machine(),
        "",
        "| processes | config | optimizer | state, MB a rank | peak, MB a rank | seconds a step | of the optimizer | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['processes']} | {r['stage']} | {r['optimizer']} | {r['state_mb']:.1f} | {r['peak_mb']:.0f} | "
        f"{r['step_s']:.2f} | {r['optimizer_s']:.3f} | {r['loss']:.6f} |"
        for r in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
