"""Compare two checkouts of esvit-scale bit for bit: the metrics and the final state of 100-step training runs.

    python benchmarks/exact_steps.py record CHECKOUT RECORD.json [--case NAME …]
    python benchmarks/exact_steps.py compare BEFORE.json AFTER.json
    python benchmarks/exact_steps.py check CHECKOUT BEFORE.json [--case NAME …]

A refactoring must not change a number. `record` runs `esvit-scale pretrain` of a checkout (under torchrun for two ranks)
on a small generated shard set, once for every case in CASES. It stores every row of metrics.jsonl with the numbers as
they are printed, except fields that a clock measured, and the SHA-256 of every tensor of the last checkpoint: student,
teacher, optimizer state and centres. `compare` prints one table row per case, "equal" or the first difference, and exits
with 1 when something differs. `check` does both.

Records of different machines or torch versions differ; make both on one. The script uses only commands, config keys and
file formats, so that it runs with checkouts whose modules have other names:

    git worktree add --detach /tmp/before COMMIT
    python benchmarks/exact_steps.py record /tmp/before /tmp/before.json
    python benchmarks/exact_steps.py check . /tmp/before.json
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

STEPS, MIDDLE = 100, 50  # a resumed run is killed once its checkpoint of step MIDDLE is there
TIME_LIMIT = 3600  # seconds for one command
# Fields of metrics.jsonl that depend on the clock.
TIME_FIELDS = {"time", "step_s", "images_per_s", "mfu", "data_wait_s", "worker_images_per_s", "worker_images_per_s_min"}
TIME_FIELDS |= {"compute_s_max", "compute_s_median", "slowest_node", "save_s", "mirror_lag_steps", "peak_memory_gib"}

CONFIG: dict[str, Any] = {
    "name": "exact",
    "run_dir": "run",
    "data": {
        "train": "../shards",
        "workers": 0,
        "global_crops": {"size": 32},
        "local_crops": [{"size": 16, "count": 2}],
    },
    "model": {"embed_dim": 8, "depths": [1, 1], "heads": [1, 2], "window": 4},
    "objective": {"prototypes": 64, "head_hidden": 32, "bottleneck": 16},
    # Clipping acts in every step; in epoch 0 (4 steps) the last layer is frozen.
    "optim": {"lr": 1e-2, "warmup_epochs": 0.5, "clip": 0.3},
    "train": {"global_batch": 8, "steps": STEPS, "log_every": 1, "checkpoint_every": MIDDLE},
}


class Case(NamedTuple):
    """One training run, made of the shared CONFIG and what differs from it."""

    overrides: tuple[str, ...]
    ranks: int = 2
    resumed: bool = False


def _sharded_cases() -> dict[str, Case]:
    cases = {}
    for precision in ("fp32", "bf16"):
        for stage in ("zero1", "zero3"):
            overrides = (f"train.precision={precision}", f"train.ds_config={stage}")
            cases[f"{precision}-{stage}"] = Case(overrides)
            resumed = Case((*overrides, "train.grad_accum=2"), resumed=True)
            cases[f"{precision}-{stage}-accumulate-resume"] = resumed
    return cases


CASES: dict[str, Case] = {
    **_sharded_cases(),
    "fp32-zero0-one-rank": Case(("train.precision=fp32", "train.ds_config=zero0"), ranks=1),
    "bf16-zero2-workers-recomputed": Case(
        ("train.precision=bf16", "train.ds_config=zero2", "data.workers=1", "train.activation_checkpointing=torch")
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, file, text in (
        ("record", "to", "run the cases of a checkout and write their record"),
        ("check", "before", "run the cases of a checkout and compare them with an earlier record"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("checkout", type=Path, help="folder that holds esvit_scale/")
        command.add_argument(file, type=Path, help="JSON file")
        command.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    compare = commands.add_parser("compare", help="compare two records")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.checkout, options.case, options.to)
        return
    before = json.loads(options.before.read_text())
    if options.command == "check":
        before["cases"] = {name: before["cases"].get(name) for name in options.case}
        after = record(options.checkout, options.case)
    else:
        after = json.loads(options.after.read_text())
    table, is_equal = comparison(before, after)
    print(table)
    sys.exit(not is_equal)


# --- recording -------------------------------------------------------------------------------------------------------


def record(checkout: Path, names: list[str], to: Path | None = None) -> dict[str, Any]:
    """Run the named cases with the code of `checkout` and return their record; write it to `to` after every case."""
    import torch

    checkout = checkout.resolve()
    if not (checkout / "esvit_scale").is_dir():
        sys.exit(f"{checkout}: holds no esvit_scale/; give the folder of a checkout")
    cases: dict[str, Any] = {}
    made = {
        "checkout": str(checkout),
        "commit": commit_of(checkout),
        "machine": f"{platform.node()}, torch {torch.__version__}",
        "cases": cases,
    }
    with tempfile.TemporaryDirectory(prefix="exact-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        shards = make_shards(checkout, folder)
        for name in names:
            began = time.monotonic()
            cases[name] = {"shards": shards, **run_case(checkout, folder / name, CASES[name])}
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            if to:
                to.write_text(json.dumps(made, indent=1))
    return made


def commit_of(checkout: Path) -> str:
    """Return the short hash of the checked-out commit, with a + when files differ from it."""
    described = ["git", "-C", str(checkout), "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def make_shards(checkout: Path, folder: Path) -> dict[str, str]:
    """Write 36 images of noise and pack them with `esvit-scale shards create`; return the SHA-256 of each tar."""
    import numpy as np
    from PIL import Image

    for i in range(36):
        path = folder / "images" / "abc"[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((40, 40)).save(path)
    command = ["shards", "create", "images", "shards", "--samples-per-shard", "10", "--workers", "1"]
    run_command(checkout, folder, command)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "shards").rglob("*.tar"))
    }


def run_case(checkout: Path, folder: Path, case: Case) -> dict[str, Any]:
    """Run one case in `folder` and return what is compared."""
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    command = ["pretrain", "config.yaml", *case.overrides]
    if case.resumed:
        run_command(checkout, folder, command, case.ranks, kill_at=f"step-{MIDDLE:08d}")
    run_command(checkout, folder, command, case.ranks)
    last = folder / "run" / "checkpoints" / f"step-{STEPS:08d}"
    state = json.loads((last / "state.json").read_text(), parse_float=str)
    return {
        "rows": rows(folder / "run" / "metrics.jsonl"),
        "state": {key: value for key, value in state.items() if key not in ("files", "sha256")},
        "tensors": checksums(last),
    }


def run_command(checkout: Path, folder: Path, arguments: list[str], ranks: int = 1, kill_at: str | None = None) -> None:
    """Run `esvit-scale …` of `checkout`; with `kill_at`, kill it once checkpoints/latest names that step folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "esvit_scale", *arguments],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            if kill_at:
                wait_for_checkpoint(process, folder / "run" / "checkpoints" / "latest", kill_at)
                return
            process.wait(timeout=TIME_LIMIT)
        finally:
            kill(process)
    if process.returncode:
        text = (folder / "output.txt").read_text()
        sys.exit(f"esvit-scale {' '.join(arguments)} (in {checkout}): exit code {process.returncode}\n{text[-4000:]}")


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and its children; torchrun's ranks are in sessions of their own and would go on without it."""
    if process.poll() is not None:
        return
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, children)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for_checkpoint(process: "subprocess.Popen[bytes]", latest: Path, expected: str) -> None:
    """Return once the file `latest` holds `expected`."""
    deadline = time.monotonic() + TIME_LIMIT
    while not (latest.is_file() and latest.read_text().strip() == expected):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{latest}: never named {expected}, so the run could not be stopped there")
        time.sleep(0.005)


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without time fields, with floating-point numbers as the text in the file."""
    parsed = [json.loads(line, parse_float=str) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in parsed]


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a step folder, whichever ranks wrote its parts."""
    import torch
    import torch.distributed.checkpoint as dcp

    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads alone
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in sorted(tensors.items())
    }


# --- comparing -------------------------------------------------------------------------------------------------------


def comparison(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, bool]:
    """Return a Markdown table with one row per case of `before`, and whether all cases are equal."""
    lines = [f"before: {before['commit']}, after: {after['commit']}, {after['machine']}, {STEPS} steps", ""]
    if before["machine"] != after["machine"]:
        lines.insert(1, f"Warning: the record of before is from another machine or torch: {before['machine']}")
    lines += ["| case | metrics values | tensors | result |", "|---|---|---|---|"]
    is_equal = True
    for name, recorded in before["cases"].items():
        ours = after["cases"].get(name)
        if recorded is None or ours is None:
            difference = "not in both records"
        else:
            difference = first_difference(recorded, ours)
        is_equal &= not difference
        values = sum(map(len, recorded["rows"])) if recorded else 0
        tensors = len(recorded["tensors"]) if recorded else 0
        lines.append(f"| {name} | {values} | {tensors} | {difference or 'equal'} |")
    return "\n".join(lines), is_equal


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Describe the first value that differs (shards, then metrics by step, then state.json, then tensors), or ""."""
    ordered: list[tuple[str, Any, Any]] = [("shards", before["shards"], after["shards"])]
    for i in range(max(len(before["rows"]), len(after["rows"]))):
        ours, theirs = (record["rows"][i] if i < len(record["rows"]) else {} for record in (before, after))
        ordered.append((f"step {ours.get('step', theirs.get('step'))}", ours, theirs))
    ordered.append(("state.json", before["state"], after["state"]))
    ordered.append(("tensor", before["tensors"], after["tensors"]))
    for where, ours, theirs in ordered:
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if ours.get(key, "absent") != theirs.get(key, "absent"):
                return f"{where}: {key}: {_short(ours.get(key, 'absent'))} → {_short(theirs.get(key, 'absent'))}"
    return ""


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "…"


if __name__ == "__main__":
    main()
