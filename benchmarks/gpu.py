"""Everything that a GPU has to answer, in one command and under eight minutes: checks, then times.

    python benchmarks/gpu.py [--official PATH_TO_A_CLONE] [--name NAME] [--minutes 7.5] [--device cuda|cpu] [--quick]

The parts, each in a process of its own that is ended when its share of the time is over:

    checks      the fused loss and the augmentation on the device against float64 and the CPU; window attention and passes
                over prototypes against fp32; a step in autocast; host waits in a step
    <preset>    whole optimizer steps in bf16 at doubling batches, up to the largest that fits: images/s, MFU, peak memory
    compile     Swin-T with and without train.compile
    attention   Swin-T with every implementation of window attention
    prototypes  Swin-T with every implementation of the loss over prototypes
    official    Swin-T and Swin-B beside the official modules, in turns (with --official)

Results are printed as a table and written to benchmarks/results/gpu-NAME.json as they come, so that a run that is ended
early keeps what it has. Crops are random pixels. `--device cpu --quick` tries everything with tiny networks.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

Row = dict[str, Any]

PRESETS = ("swin_t", "swin_b", "swinv2_b", "swinv2_1b")
FIRST_BATCH = {"swin_t": 16, "swin_b": 8, "swinv2_b": 8, "swinv2_1b": 2}
MIDDLE = 32  # images a step of Swin-T in the parts that compare two versions of it
OFFICIAL = {"swin_t": 32, "swin_b": 16}  # images a step beside the official modules, with both in memory
SHARES = {
    "checks": 2.0,
    "compile": 3.0,
    "attention": 3.0,
    "prototypes": 2.0,
    "official": 3.0,
}  # of the time; 2.0 for each preset
LARGEST = 4096  # images a step at which a sweep ends
TINY = (
    "data.global_crops.size=32",
    "data.local_crops=[{size: 16, count: 2}]",
    "model.embed_dim=16",
    "model.depths=[1, 1, 2]",
    "model.heads=[1, 2, 4]",
    "model.window=4",
    "objective.prototypes=64",
    "objective.head_hidden=32",
    "objective.bottleneck=16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps: tries the script itself")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for all parts together")
    parser.add_argument("--official", type=Path, help="a clone of the official EsViT repository")
    parser.add_argument("--name", help="of the result file (default: the device's)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result file")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for row in PARTS[options.part](options):
            print(json.dumps(row), flush=True)
        return
    found = machine(options.device)
    path = options.out / f"gpu-{options.name or found['device'].lower().replace(' ', '-')}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = options.parts or [part for part in PARTS if part != "official" or options.official]
    if options.quick and not options.parts:
        wanted = [part for part in wanted if part not in ("swin_b", "swinv2_1b", "compile")]
    began, rows = time.monotonic(), []
    for i, part in enumerate(wanted):
        left = 60 * options.minutes - (time.monotonic() - began)
        share = SHARES.get(part, 2.0) / sum(SHARES.get(other, 2.0) for other in wanted[i:])
        for row in in_a_process(part, left * share):
            rows.append({"part": part, **row})
            path.write_text(json.dumps({"machine": found, "rows": rows}, indent=2) + "\n")
    print(table(found, rows))
    print(f"\n{path} ({time.monotonic() - began:.0f} s)")


def in_a_process(part: str, seconds: float) -> Iterator[Row]:
    """Yield what a part prints in a process of its own, and how it ended if it did not end well; stop after `seconds`."""
    command = [sys.executable, str(HERE / "gpu.py"), *sys.argv[1:], "--part", part]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if "cpu" in sys.argv else {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + seconds
    while True:
        try:
            line = lines.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            process.kill()
            yield {"what": "stopped", "note": f"after its {seconds:.0f} s"}
            break
        if line is None:
            break
        if line.startswith("{"):
            yield json.loads(line)
    if process.wait() > 0:
        yield {"what": "failed", "note": f"exit code {process.returncode}"}


# --- parts: each yields rows, and runs in its own process ------------------------------------------------------------


def checks(options: Any) -> Iterator[Row]:
    """Yield the largest relative error of each thing that has a reference, and the waits of a step."""
    import torch

    from esvit_scale.parallel import world as worlds

    device = torch.device(options.device)
    for dtype in (torch.float32, torch.bfloat16):
        yield {"what": f"fused loss, {str(dtype)[6:]}, against float64", "error": loss_error(device, dtype)}
    yield {"what": "augmentation against the CPU's", "error": augmentation_error(device)}
    yield from attention_problems(device)
    yield from prototype_problems(device)
    world = worlds.start()
    a_step(config_of(options, "swin_t", 4, ("train.precision=autocast", "model.attention=math")), world)(4)
    yield {"what": "a step in autocast with model.attention=math", "note": "runs"}
    step = a_step(config_of(options, "swin_t", 4), world)
    for _ in range(3):
        step(4)
    if device.type == "cuda":
        import warnings

        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step(4)
        torch.cuda.set_sync_debug_mode("default")
        yield {"what": "host waits in a step", "count": sum("synchronizing" in str(w.message) for w in said)}
    worlds.stop()


def attention_problems(device: Any) -> Iterator[Row]:
    """Yield a row for every implementation of window attention and type, whose note says why it cannot be used, if so."""
    import torch

    from esvit_scale.errors import first_line
    from esvit_scale.models import attention_choice
    from esvit_scale.models.window_attention_implementations import NAMES, implementation, unavailable
    from esvit_scale.models.windows import WindowLayout, window_plan

    layouts = [
        WindowLayout(window_plan(((4, 2 * side, 2 * side),), side, shift, device), 3, 32, 1)
        for side in (7, 14)
        for shift in (0, side // 2)
    ]
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            try:
                problem = unavailable(name, device) or attention_choice.inaccuracy(
                    implementation(name), layouts, dtype, device
                )
            except Exception as error:
                problem = f"{type(error).__name__}: {first_line(error)}"
            yield {
                "what": f"window attention by {name}, {str(dtype)[6:]}",
                "note": problem or "as accurate as it must be",
            }


def prototype_problems(device: Any) -> Iterator[Row]:
    """Yield a row for every implementation of the loss over prototypes, whose note says why it cannot be used, if so."""
    import torch

    from esvit_scale.errors import first_line
    from esvit_scale.objective.prototype_choice import inaccuracy
    from esvit_scale.objective.prototype_passes import NAMES, implementation, unavailable

    for name in NAMES:
        try:
            problem = unavailable(name, device, torch.bfloat16, 256)
            problem = problem or inaccuracy(implementation(name), 256, torch.bfloat16, device)
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
        yield {"what": f"prototype loss by {name}, bfloat16", "note": problem or "as accurate as it must be"}


def loss_error(device: Any, dtype: Any) -> float:
    """Return the largest error of loss and gradients, relative to the largest value of the reference."""
    import torch

    from esvit_scale.objective.prototypes import prototype_cross_entropy

    generator = torch.Generator().manual_seed(0)
    unit = lambda n: torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=1)  # noqa: E731
    z_s, z_t, rows_s, rows_t = unit(200), unit(80), unit(1024), unit(1024)
    match = torch.randint(0, 80, (200, 2), generator=generator)
    weight, center = torch.full((200, 2), 1 / 400), 0.1 * torch.randn(1024, generator=generator)

    def values(where: Any, kind: Any, wide: Any) -> list[Any]:
        z, rows = (t.to(where, kind, copy=True).requires_grad_() for t in (z_s, rows_s))
        z_other, rows_other = (t.to(where, kind) for t in (z_t, rows_t))
        rest = center.to(where, wide), match.to(where), weight.to(where, wide)
        loss, _ = prototype_cross_entropy(z, rows, z_other, rows_other, *rest, 0.1, 0.04)
        grads = torch.autograd.grad(loss, (z, rows))
        return [t.detach().double().cpu() for t in (loss, *grads)]

    # The reference starts from the same rounded inputs.
    z_s, z_t, rows_s, rows_t = (t.to(dtype).double() for t in (z_s, z_t, rows_s, rows_t))
    reference = values(torch.device("cpu"), torch.float64, torch.float64)
    found = values(device, dtype, torch.float32)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, reference, strict=True))


def augmentation_error(device: Any) -> float:
    """The largest difference of augmented and normalised pixels."""
    import torch

    from esvit_scale.data import photometric
    from esvit_scale.data.crops import keyed_generator

    pixels = torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = [[photometric.draw_params(keyed_generator(0, 0, str(i), 1), photometric.ESVIT[1]) for i in range(32)]]
    params = photometric.stack(draws).crops(0, 1)
    there, here = photometric.apply(pixels.to(device), params).cpu(), photometric.apply(pixels, params)
    return float((there - here).abs().max())


def sweep(preset: str) -> Callable[[Any], Iterator[Row]]:
    """Return the part that times a preset's steps at doubling batches, until one does not fit."""

    def rows(options: Any) -> Iterator[Row]:
        import torch

        from esvit_scale.parallel import world as worlds

        world, batch = worlds.start(), 2 if options.quick else FIRST_BATCH[preset]
        config = config_of(options, preset, batch)
        step = a_step(config, world)
        while batch <= (4 if options.quick else LARGEST):
            try:
                yield {"what": preset, "batch": batch, **timed(step, batch, config, world.device, options.quick)}
            except torch.OutOfMemoryError:
                yield {"what": preset, "batch": batch, "note": "does not fit"}
                break
            batch *= 2
        worlds.stop()

    return rows


def compare_compile(options: Any) -> Iterator[Row]:
    """Yield the times of Swin-T's step without and with torch.compile."""
    yield from variants(options, {"not compiled": (), "train.compile=true": ("train.compile=true",)})


def compare_attention(options: Any) -> Iterator[Row]:
    """Yield the times of Swin-T's step with every implementation of window attention."""
    from esvit_scale.models.window_attention_implementations import NAMES

    yield from variants(options, {f"model.attention={name}": (f"model.attention={name}",) for name in NAMES})


def compare_prototypes(options: Any) -> Iterator[Row]:
    """Yield the times of Swin-T's step with every implementation of the loss over prototypes."""
    from esvit_scale.objective.prototype_passes import NAMES

    key = "objective.prototype_loss"
    yield from variants(options, {f"{key}={name}": (f"{key}={name}",) for name in NAMES})


def variants(options: Any, overrides: dict[str, tuple[str, ...]]) -> Iterator[Row]:
    """Yield the times of Swin-T's step with each set of overrides, one after the other in one process."""
    from esvit_scale.errors import first_line
    from esvit_scale.parallel import world as worlds

    batch = 2 if options.quick else MIDDLE
    for name, changes in overrides.items():
        world = worlds.start()
        try:
            config = config_of(options, "swin_t", batch, changes)
            timed_step = timed(a_step(config, world), batch, config, world.device, options.quick)
            yield {"what": name, "batch": batch, **timed_step}
        except Exception as error:  # a candidate that does not run here must not hide the others
            yield {"what": name, "batch": batch, "note": f"{type(error).__name__}: {first_line(error)}"}
        worlds.stop()


def beside_official(options: Any) -> Iterator[Row]:
    """Yield our images/s and those of the official modules, which take turns in one process."""
    import step

    for preset, batch in OFFICIAL.items():
        cell = {
            "preset": preset,
            "overrides": list(TINY) if options.quick else [],
            "batch": 2 if options.quick else batch,
            "precision": "bf16",
            "official_precision": "bf16",
            "checkpointing": "none",
            "official": str(options.official),
            "steps": 1 if options.quick else 6,
            "warm_up": 1,
        }
        row = step.measure(cell)
        ratio = row["ours_images_per_s"] / row["official_images_per_s"]
        yield {
            "what": f"{preset} beside the official modules",
            "batch": cell["batch"],
            "images_per_s": row["ours_images_per_s"],
            "official_images_per_s": row["official_images_per_s"],
            "mfu": row["mfu"],
            "peak_gb": row["ours_peak_mb"] / 1e3,
            "official_peak_gb": row["official_peak_mb"] / 1e3,
            "note": f"{ratio:.2f} times as fast, {row['ours_peak_mb'] / row['official_peak_mb']:.2f} of the memory",
        }


PARTS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "checks": checks,
    **{preset: sweep(preset) for preset in PRESETS},
    "compile": compare_compile,
    "attention": compare_attention,
    "prototypes": compare_prototypes,
    "official": beside_official,
}

# --- what the parts share --------------------------------------------------------------------------------------------


def config_of(options: Any, preset: str, batch: int, overrides: tuple[str, ...] = ()) -> Any:
    """Return a preset's config in bf16 for one device."""
    from esvit_scale import config as configs

    tiny = TINY if options.quick else ()
    return configs.resolve(preset, [*tiny, f"train.global_batch={batch}", "train.precision=bf16", *overrides])


def a_step(config: Any, world: Any) -> Callable[[int], object]:
    """Return the training loop's own step on random crops of as many images as it is called with."""
    import torch
    from step import random_crops

    from esvit_scale.data.stream import MicroBatch
    from esvit_scale.objective.schedules import Schedules
    from esvit_scale.train import implementations
    from esvit_scale.train.trainer import Trainer

    chosen = implementations.choose(config, world)  # before the networks are built, as in a run
    trainer = Trainer(config, world, Schedules(config, steps_per_epoch=1), chosen=chosen)
    kept: dict[int, MicroBatch] = {}

    def step(images: int) -> object:
        if images not in kept:
            kept.clear()
            crops = [group.to(trainer.engines.dtype) for group in random_crops(config, images, world.device)]
            kept[images] = MicroBatch(crops, torch.arange(images, device=world.device))
        return trainer.train_step([kept[images]])

    return step


def timed(step: Callable[[int], object], batch: int, config: Any, device: Any, quick: bool) -> Row:
    """Return images/s (of the median of steps that take 4 s together, at least 3), MFU and peak memory."""
    import torch
    from step import peak_mb, seconds

    from esvit_scale.train import mfu

    for _ in range(1 if quick else 2):
        step(batch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 3 or (not quick and sum(times) < 4 and len(times) < 30):
        times.append(seconds(lambda: step(batch), device))
    rate = batch / statistics.median(times)
    return {
        "images_per_s": rate,
        "fastest": batch / min(times),
        "slowest": batch / max(times),
        "mfu": rate / mfu.ideal_images_per_s(config, device, 1),
        "peak_gb": peak_mb(device) / 1e3,
    }


def machine(device: str) -> Row:
    """Return what a figure needs beside it."""
    from importlib.metadata import version

    import torch

    there = device == "cuda"
    if there and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible to torch; --device cpu --quick tries the script without one")
    return {
        "device": torch.cuda.get_device_name() if there else "cpu",
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if there else None,
        **{name: version(name) for name in ("torch", "deepspeed", "triton")},
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(found: Row, rows: list[Row]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in found.items() if value),
        "",
        "| | batch | images/s | MFU | peak GB | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        note = row.get("note") or ", ".join(f"{k} {row[k]:.3g}" for k in ("error", "count") if k in row)
        cells = [
            row["what"],
            str(row.get("batch", "")),
            f"{row['images_per_s']:.1f}" if "images_per_s" in row else "",
            f"{row['mfu']:.0%}" if "mfu" in row else "",
            f"{row['peak_gb']:.1f}" if "peak_gb" in row else "",
            note,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
