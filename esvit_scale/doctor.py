"""`esvit-scale doctor`: what works on this machine, found by trying it.

One row per check: ok, warning (a version that was not tested), absent (optional and not installed) or problem, with
what to do. The exit code is 0, or 1 when something that every command needs does not work; a GPU is not among these.
doctor_gpu.py, doctor_machine.py and doctor_packages.py make the rows about the GPU, the machine and the Python
packages.
"""

import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Literal

import esvit_scale
from esvit_scale import doctor_gpu, doctor_machine, doctor_packages
from esvit_scale.doctor_packages import CheckRow


def run() -> int:
    """Run all checks and print their table; return 1 when a required row is a problem, else 0."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    print(f"esvit-scale {esvit_scale.__version__} on {platform.platform()}\n")
    broken, untested = False, []
    for row in _rows():
        print(f"{row.name:<16}{row.state:<9}{row.detail}")
        if row.advice:
            print(f"{'':<25}→ {row.advice}")
        broken |= row.required and row.state == "problem"
        untested += [row.name] if row.state == "warning" else []
    print("\nSomething that every command needs does not work." if broken else "\nEverything required works.")
    if untested:
        print(f"Outside the tested versions: {', '.join(untested)}.")
    return int(broken)


def _rows() -> Iterator[CheckRow]:
    yield _python()
    torch_row = doctor_packages.required(
        "torch", f"CUDA build {cuda}" if (cuda := doctor_gpu.cuda_build_of_torch()) else "CPU build"
    )
    yield torch_row
    if torch_row.state != "problem":
        yield from doctor_gpu.gpu_rows()
        yield doctor_gpu.bf16_row()
        yield collective_row("gloo", required=True)
        if doctor_gpu.torch_sees_gpu():
            yield collective_row("nccl", required=False)
    for name in ("torchvision", "timm"):
        yield doctor_packages.required(name, advice="pip install torch and torchvision from one index")
    os.environ.setdefault(
        "DS_ACCELERATOR", "cuda" if torch_row.state != "problem" and doctor_gpu.torch_sees_gpu() else "cpu"
    )
    yield doctor_packages.required("deepspeed")
    yield _deepspeed_ops()
    yield doctor_packages.required("fairscale")
    yield doctor_packages.required("webdataset")
    yield from doctor_packages.others()
    yield from doctor_packages.extras()
    yield doctor_packages.apex(importlib.util.find_spec("apex"))
    yield doctor_machine.slurm_row()
    yield doctor_machine.compiler_row()
    yield doctor_machine.cores_row()
    yield doctor_machine.memory_row()
    yield from doctor_machine.limit_rows()
    yield doctor_machine.disk_row()


def _python() -> CheckRow:
    version = platform.python_version()
    old = sys.version_info < (3, 10)
    return CheckRow(
        "Python",
        "problem" if old else "ok",
        f"{version} ({sys.executable})",
        "3.10 or newer is needed" if old else "",
        True,
    )


def _deepspeed_ops() -> CheckRow:
    from esvit_scale.parallel.probe import deepspeed_ops

    try:
        ops = deepspeed_ops()
    except Exception as error:
        return CheckRow("DeepSpeed ops", "problem", doctor_packages.one_line(error))
    can, cannot = ([name for name, works in sorted(ops.items()) if works is wanted] for wanted in (True, False))
    detail = f"could be built: {', '.join(can) or 'none'}" + (f"; not: {', '.join(cannot)}" if cannot else "")
    return CheckRow("DeepSpeed ops", "ok", detail + " (no command needs them)")


def collective_row(backend: Literal["gloo", "nccl"], required: bool) -> CheckRow:
    """Check a communication backend with an all-reduce in a process group of this one process; return the row."""
    from esvit_scale.parallel.probe import all_reduce_works

    try:
        all_reduce_works(backend)
    except Exception as error:
        advice = (
            "check that this host's name resolves, or choose the interface: GLOO_SOCKET_IFNAME=lo"
            if backend == "gloo"
            else "set NCCL_DEBUG=INFO to see more"
        )
        return CheckRow(backend, "problem", doctor_packages.one_line(error), advice, required)
    return CheckRow(backend, "ok", "an all-reduce works", required=required)
