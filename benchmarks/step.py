"""Images per second, peak memory and MFU of whole optimizer steps: teacher, student, loss, backward, clip, AdamW, EMA.

    python benchmarks/step.py [--preset swin_t] [--batch 4] [--precision fp32 bf16] [--activation-checkpointing none torch]
                              [--official PATH_TO_A_CLONE | timm] [--steps 3] [--warm-up 1] [--json] [--save NAME]

Every row runs in a fresh process, because a process does not give back its peak. With --official, the official modules
have a process of their own, in which nothing of this package's settings applies, and the two take turns, step by step, so
that a machine whose speed drifts does not favour either: the ratio is that of the median steps. Either side may need
several steps until its heap has grown (--warm-up). --official timm compares with a plain step of timm's modules instead,
which need no clone. Crops are random pixels: neither decoding nor augmentation is timed.

On a CPU, training lets glibc keep freed memory (parallel/allocator.py). ESVIT_MALLOC=system measures without that, and
LD_PRELOAD=…/libtcmalloc_minimal.so.4 with tcmalloc on both sides.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLOCK_HELP = "processor: one thread's time on its core, on which other work of a shared machine has less influence"
ANSWER = "step.py: "  # begins the lines that a side's process prints for its parent

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path[:0] = [str(HERE.parent), str(HERE)]


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
    parser.add_argument("--official", type=Path, help="a clone of the official EsViT repository, or timm (plain.py)")
    parser.add_argument("--official-precision", choices=("fp32", "bf16", "fp16"), help="default: the row's")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument(
        "--warm-up", type=int, default=1, help="steps before them that are not timed; the heap grows in them"
    )
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help=CLOCK_HELP)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--save", metavar="NAME", help="also write the JSON object to benchmarks/results/NAME.json")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        run_cell(json.loads(options.cell))
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
            "warm_up": options.warm_up,
            "clock": options.clock,
        }
        for batch in options.batch
        for precision in options.precision
        for implementation in options.activation_checkpointing
    ]
    found: dict[str, Any] = {"machine": machine(), "where": where(), "command": command(options), "rows": []}
    if options.clock == "processor":
        found["where"]["threads"] = 1
    for cell in cells:
        found["rows"].append(measure(cell))
        if options.save:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{options.save}.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2) if options.json else table(found["rows"]))


def command(options: argparse.Namespace) -> str:
    """Return the command line's arguments without --json and --save, with the path of the clone replaced by CLONE."""
    words = [word for word in sys.argv[1:] if word not in ("--json", "--save", options.save)]
    return " ".join("CLONE" if word == str(options.official) != "timm" else word for word in words)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the cell with the rate and the peak of each side, and ours in MFU."""
    sides = ["ours", "official"] if cell["official"] else ["ours"]
    processes = {side: Side(cell | {"side": side}) for side in sides}
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(cell["warm_up"] + cell["steps"]):
        for side, process in processes.items():
            times[side].append(process.step())
    row = dict(cell)
    if cell["official"] not in (None, "timm"):
        row["official"] = "clone"
    for side, process in processes.items():
        row |= process.finish()
        timed = times[side][cell["warm_up"] :]
        row[f"{side}_images_per_s"] = cell["batch"] / statistics.median(timed)
        row[f"{side}_seconds"] = timed
    row["mfu"] = row["ours_images_per_s"] / row.pop("ideal_images_per_s")
    return row


class Side:
    """A process that runs optimizer steps of one of the two sides, one at a time."""

    def __init__(self, cell: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--cell", json.dumps(cell)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> float:
        """Return the seconds of one step."""
        self._tell("step")
        return float(self._answer())

    def finish(self) -> dict[str, Any]:
        """End the process, and return what it measured beside the times."""
        self._tell("end")
        found = json.loads(self._answer())
        self._process.communicate()
        return found

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)

    def _answer(self) -> str:
        """Return the text of the process's next answer; libraries print lines of their own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
        raise SystemExit("step.py: the process of one side ended; its error stands above")


def child(cell: dict[str, Any], script: str) -> dict[str, Any]:
    """What `script --cell …` prints, from a process of its own."""
    command = [sys.executable, script, "--cell", json.dumps(cell)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_cell(cell: dict[str, Any]) -> None:
    """Run one step of the cell's side for every line `step` of stdin; at `end`, print what else was measured."""
    import torch

    from esvit_scale import config as configs
    from esvit_scale.parallel import world as worlds

    overrides = [
        *cell["overrides"],
        f"train.global_batch={cell['batch']}",
        f"train.precision={cell['precision']}",
        f"train.activation_checkpointing={cell['checkpointing']}",
    ]
    config = configs.resolve(cell["preset"], overrides)
    if cell["side"] == "official":
        os.environ["ESVIT_MALLOC"] = "system"  # nothing of this package's settings there
    world = worlds.start()  # the official loss needs a process group, too
    clock = time.perf_counter
    if cell["clock"] == "processor":
        torch.set_num_threads(1)
        clock = time.process_time
    device = world.device
    crops = random_crops(config, cell["batch"], device)
    step: Callable[[], object]
    if cell["side"] == "ours":
        step = our_step(config, world, crops)
    else:
        from official import OfficialStep
        from plain import TimmStep

        kind = TimmStep if cell["official"] == "timm" else OfficialStep
        official = kind(Path(cell["official"]), config, device, cell["official_precision"])
        views = [view for group in crops for view in group.chunk(len(group) // cell["batch"])]
        step = lambda: official(views)  # noqa: E731
    for line in sys.stdin:
        if line.strip() == "end":
            break
        print(f"{ANSWER}{seconds(step, device, clock)}", flush=True)
    found = {f"{cell['side']}_peak_mb": peak_mb(device)}
    if cell["side"] == "ours":
        from esvit_scale.train import mfu

        found["ideal_images_per_s"] = mfu.ideal_images_per_s(config, device, 1)
    worlds.stop()
    print(f"{ANSWER}{json.dumps(found)}", flush=True)


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
    from esvit_scale.train import implementations
    from esvit_scale.train.trainer import Trainer

    chosen = implementations.choose(config, world)  # before the networks are built, as in a run
    trainer = Trainer(config, world, Schedules(config, steps_per_epoch=1), chosen=chosen)
    dtype = trainer.engines.dtype
    micro = MicroBatch(
        [group.to(dtype) for group in crops], torch.arange(config.train.global_batch, device=world.device)
    )
    return lambda: trainer.train_step([micro])


def seconds(step: Callable[[], object], device: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = clock()
    step()
    wait()
    return clock() - began


def peak_mb(device: Any) -> float:
    """Return the peak memory in MB: of the whole process on a CPU, of torch's allocator on a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def where() -> dict[str, Any]:
    """Return what figures depend on: processor, threads, torch, allocator, load before the first step, and commit."""
    import torch

    from esvit_scale.machine import processor
    from esvit_scale.models import products

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "processor": processor() or platform.machine(),
        "flags": [flag for flag in ("avx512_bf16", "amx_bf16") if any(flag in line.split() for line in lines)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "allocator": Path(os.environ.get("LD_PRELOAD", "")).name or "glibc",
        "products_of_bf16": "fp32" if products.fp32_is_faster() else "bf16",
        "load": round(os.getloadavg()[0], 1),
        "commit": os.environ.get("COMMIT") or commit.stdout.strip(),
    }


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    allocator = (
        Path(os.environ.get("LD_PRELOAD", "")).name or f"glibc, ESVIT_MALLOC={os.environ.get('ESVIT_MALLOC', '')}"
    )
    processor = platform.processor() or platform.machine()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    return f"{processor}, {threads} threads, torch {torch.__version__}, allocator {allocator}, load {load:.1f}"


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
