"""Time and peak memory of the fused prototype cross-entropy against one that stores the logits.

    python benchmarks/loss.py [--batches 2 4 8] [--prototypes 65536] [--dtype float32] [--device cpu] [--json]

The view and the region term of one step, forward and backward to the bottleneck and the prototypes, with the token
counts of 2 global crops of 224 and 8 local ones of 96 pixels (49 and 9 regions). Every cell runs in a fresh process,
because a process does not give back its peak. Memory is the peak above what the process held with the inputs ready:
resident memory on the CPU, the allocator's on a GPU.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GLOBALS, LOCALS = 2, 8
GLOBAL_REGIONS, LOCAL_REGIONS = 49, 9
D = 256
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
METHODS = ("naive", "fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8], help="images")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the matrix products")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(options.cell[0], int(options.cell[1]), options)))
        return
    cells = [run_cell(method, batch) for batch in options.batches for method in METHODS]
    if options.json:
        print(json.dumps({"machine": cells[0]["machine"], "cells": cells}))
    else:
        print_table(cells, options)


def run_cell(method: str, batch: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--cell", method, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{method}, {batch} images failed:\n{done.stderr}")
    cell: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return cell


def print_table(cells: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{cells[0]['machine']}; K = {options.prototypes}, products in {options.dtype}")
    print(f"{'images':>6} {'tokens':>7} {'method':>7} {'s':>8} {'peak MB':>8} {'inputs MB':>10} {'loss':>10}")
    for c in cells:
        print(
            f"{c['images']:>6} {c['tokens']:>7} {c['method']:>7} {c['seconds']:>8.3f} {c['peak_mb']:>8.0f} "
            f"{c['inputs_mb']:>10.1f} {c['loss']:>10.5f}"
        )
    fused = [c for c in cells if c["method"] == "fused"]
    first, last = fused[0], fused[-1]
    print(
        f"fused: from {first['images']} to {last['images']} images the peak grows by "
        f"{last['peak_mb'] - first['peak_mb']:.1f} MB, its inputs by {last['inputs_mb'] - first['inputs_mb']:.1f} MB "
        "(and as much again for their gradients)"
    )


# --- one cell, in its own process --------------------------------------------------------------------------------


def measure(method: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    loss_of = {"naive": naive, "fused": fused}[method]
    loss_of(terms(1, 64, device, dtype)).backward()  # libraries load and allocate on first use
    inputs = terms(batch, options.prototypes, device, dtype)
    baseline = memory(device)
    seconds = []
    for _ in range(options.repeats):
        start = clock(device)
        loss = loss_of(inputs)
        loss.backward()
        seconds.append(clock(device) - start)
        value = loss.item()
        del loss
        for term in inputs:
            term["z_s"].grad = term["rows_s"].grad = None
    return {
        "machine": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "method": method,
        "images": batch,
        "tokens": sum(len(term["z_s"]) for term in inputs),
        "seconds": min(seconds),
        "peak_mb": (peak(device) - baseline) / 2**20,
        "inputs_mb": sum(x.numel() * x.element_size() for t in inputs for k, x in t.items() if "rows" not in k) / 2**20,
        "loss": value,
    }


def terms(batch: int, prototypes: int, device: Any, dtype: Any) -> list[dict[str, Any]]:
    """Inputs of the view term and of the region term."""
    return [
        term(batch, [1] * GLOBALS + [1] * LOCALS, 1, prototypes, device, dtype),
        term(batch, [GLOBAL_REGIONS] * GLOBALS + [LOCAL_REGIONS] * LOCALS, GLOBAL_REGIONS, prototypes, device, dtype),
    ]


def term(batch: int, regions: list[int], teacher_regions: int, prototypes: int, device: Any, dtype: Any) -> Any:
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(device)  # noqa: E731
    matches, weights = [], []
    pairs = GLOBALS * (len(regions) - 1)
    for crop, count in enumerate(regions):
        image = torch.arange(batch).repeat_interleave(count)
        near = torch.randint(teacher_regions, (batch * count, GLOBALS), generator=generator)
        matches.append((torch.arange(GLOBALS) * batch + image[:, None]) * teacher_regions + near)
        other = torch.arange(GLOBALS) != crop
        weights.append(other.float().expand(batch * count, -1) / (2 * pairs * batch * count))
    tokens, teachers = batch * sum(regions), GLOBALS * batch * teacher_regions
    return {
        "z_s": random(tokens, D).to(dtype).requires_grad_(),
        "rows_s": random(prototypes, D).requires_grad_(),
        "z_t": random(teachers, D).to(dtype),
        "rows_t": random(prototypes, D),
        "center": torch.zeros(prototypes, device=device),
        "match": torch.cat(matches).to(device),
        "weight": torch.cat(weights).to(device),
    }


def fused(inputs: list[dict[str, Any]]) -> Any:
    from esvit_scale.objective.prototypes import prototype_cross_entropy

    return sum(
        prototype_cross_entropy(**term, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP)[0] for term in inputs
    )


def naive(inputs: list[dict[str, Any]]) -> Any:
    """Logits of all tokens, then one pass over the student's log-probabilities for each teacher view."""
    import torch
    from torch.nn import functional as F

    loss = 0
    for t in inputs:
        student = (t["z_s"] @ t["rows_s"].to(t["z_s"].dtype).T).float() / STUDENT_TEMP
        with torch.no_grad():
            teacher = (t["z_t"] @ t["rows_t"].to(t["z_t"].dtype).T).float()
            teacher = F.softmax((teacher - t["center"]) / TEACHER_TEMP, dim=-1)
        for m in range(t["match"].shape[1]):
            some = t["weight"][:, m].nonzero()[:, 0]
            q = F.log_softmax(student[some], dim=-1)
            p = teacher[t["match"][some, m]]
            loss = loss - (t["weight"][some, m] * (p * q).sum(-1)).sum()
    return loss


def memory(device: Any) -> int:
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return peak(device)


def peak(device: Any) -> int:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clock(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
