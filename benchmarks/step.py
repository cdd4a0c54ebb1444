"""Images per second, peak memory and MFU of whole optimizer steps: teacher, student, loss, backward, clip, AdamW, EMA.

    python benchmarks/step.py [--preset swin_t] [--batch 4] [--precision fp32 bf16] [--activation-checkpointing none torch]
                              [--official PATH_TO_A_CLONE] [--steps 3] [--json]

Every row runs in a fresh process, because a process does not give back its peak. With --official, the official modules
and ours take turns in one process on the same crops, so that a machine whose speed drifts does not favour either: the
ratio is that of the median steps. Peaks are those of a process that ran one of the two alone. Crops are random pixels:
neither decoding nor augmentation is timed.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="swin_t", help="a preset or a config file")
    parser.add_argument(
        "--override", action="append", default=[], metavar="KEY=VALUE", help="of the config; repeatable"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="images a step on this device")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    implementations = ("none", "selective", "torch", "deepspeed", "fairscale")
    parser.add_argument("--activation-checkpointing", nargs="+", choices=implementations, default=["none"])
    parser.add_argument("--official", type=Path, help="a clone of the official EsViT repository")
    parser.add_argument("--official-precision", choices=("fp32", "bf16", "fp16"), help="default: the row's")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run_cell(json.loads(options.cell))))
        return
    cells = [
        {
            "preset": options.preset,
            "overrides": options.override,
            "batch": batch,
            "precision": precision,
            "checkpointing": implementation,
            "official": str(options.official) if options.official else None,
            "official_precision": options.official_precision or precision,
            "steps": options.steps,
        }
        for batch in options.batch
        for precision in options.precision
        for implementation in options.activation_checkpointing
    ]
    rows = [measure(cell) for cell in cells]
    print(json.dumps({"machine": machine(), "rows": rows}, indent=2) if options.json else table(rows))


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Times with both sides in one process, peaks from a process for each."""
    row = cell | child(cell | {"sides": ["ours", "official"] if cell["official"] else ["ours"]})
    if cell["official"]:
        for side in ("ours", "official"):
            row[f"{side}_peak_mb"] = child(cell | {"sides": [side], "steps": 1})[f"{side}_peak_mb"]
    return row


def child(cell: dict[str, Any], script: str = __file__) -> dict[str, Any]:
    """What `script --cell …` prints, from a process of its own."""
    command = [sys.executable, script, "--cell", json.dumps(cell)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_cell(cell: dict[str, Any]) -> dict[str, Any]:
    from esvit_scale import config as configs
    from esvit_scale.parallel import world as worlds
    from esvit_scale.train import mfu

    overrides = [
        *cell["overrides"],
        f"train.global_batch={cell['batch']}",
        f"train.precision={cell['precision']}",
        f"train.activation_checkpointing={cell['checkpointing']}",
    ]
    config = configs.resolve(cell["preset"], overrides)
    world = worlds.start()
    device = world.device
    crops = random_crops(config, cell["batch"], device)
    sides: dict[str, Callable[[], object]] = {}
    if "ours" in cell["sides"]:
        sides["ours"] = our_step(config, world, crops)
    if "official" in cell["sides"]:
        from official import OfficialStep

        official = OfficialStep(Path(cell["official"]), config, device, cell["official_precision"])
        views = [view for group in crops for view in group.chunk(len(group) // cell["batch"])]
        sides["official"] = lambda: official(views)
    row: dict[str, Any] = {}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(cell["steps"] + 1):
        for side, step in sides.items():
            times[side].append(seconds(step, device))
    for side in sides:
        row[f"{side}_images_per_s"] = cell["batch"] / statistics.median(times[side][1:])
        row[f"{side}_peak_mb"] = peak_mb(device)
    if "ours" in sides:
        row["mfu"] = row["ours_images_per_s"] / mfu.ideal_images_per_s(config, device, 1)
    worlds.stop()
    return row


def random_crops(config: Any, images: int, device: Any) -> list[Any]:
    """One tensor a resolution, as augmentation would leave them."""
    import torch

    sizes = config.crop_sizes
    return [torch.randn(sizes.count(s) * images, 3, s, s, device=device) for s in dict.fromkeys(sizes)]


def our_step(config: Any, world: Any, crops: list[Any]) -> Callable[[], object]:
    """The training loop's own step on ready crops, counted on from step to step."""
    import torch

    from esvit_scale.data.stream import MicroBatch
    from esvit_scale.objective.schedules import Schedules
    from esvit_scale.train.trainer import Trainer

    trainer = Trainer(config, world, Schedules(config, steps_per_epoch=1))
    dtype = trainer.engines.dtype
    micro = MicroBatch(
        [group.to(dtype) for group in crops], torch.arange(config.train.global_batch, device=world.device)
    )
    return lambda: trainer.train_step([micro])


def seconds(step: Callable[[], object], device: Any) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def peak_mb(device: Any) -> float:
    """Of the whole process on a CPU, of the allocator on a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        machine(),
        "",
        "| preset | batch | precision | checkpointing | images/s | peak MB | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    official = any(row["official"] for row in rows)
    if official:
        lines[2] += " official images/s | official peak MB | speed ratio | memory ratio |"
        lines[3] += "---|---|---|---|"
    for row in rows:
        line = f"| {row['preset']} | {row['batch']} | {row['precision']} | {row['checkpointing']} | "
        line += f"{row['ours_images_per_s']:.2f} | {row['ours_peak_mb']:.0f} | {row['mfu']:.0%} |"
        if row["official"]:
            speed = row["ours_images_per_s"] / row["official_images_per_s"]
            memory = row["ours_peak_mb"] / row["official_peak_mb"]
            line += (
                f" {row['official_images_per_s']:.2f} | {row['official_peak_mb']:.0f} | {speed:.2f} | {memory:.2f} |"
            )
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
