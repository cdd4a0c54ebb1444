"""`esvit-scale doctor`: what works on this machine, found by trying it.

One row per check: ok, warning (a version that was not tested), absent (optional and not installed) or problem, with
what to do. The exit code is 0, or 1 when something that every command needs does not work; a GPU is not among these.
The rows about Python packages are in doctor_packages.py.
"""

import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import esvit_scale
from esvit_scale import doctor_packages, machine
from esvit_scale.data import limits
from esvit_scale.doctor_packages import Row

GIB = 2**30

# The oldest Linux driver that runs any build of a CUDA major version (NVIDIA's minor-version compatibility).
OLDEST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}


class NvidiaMachine(NamedTuple):
    """NVIDIA GPUs and their driver, found without torch."""

    gpus: list[str]  # names, or PCI addresses where only the bus shows them
    driver: str | None


def run() -> int:
    """Print the table; return 1 when a required row is a problem, else 0."""
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


def _rows() -> Iterator[Row]:
    yield _python()
    torch_row = doctor_packages.required("torch", f"CUDA build {cuda}" if (cuda := _cuda_build()) else "CPU build")
    yield torch_row
    if torch_row.state != "problem":
        yield from gpu_rows()
        yield _bf16()
        yield collective_row("gloo", required=True)
        if torch_sees_gpu():
            yield collective_row("nccl", required=False)
    for name in ("torchvision", "timm"):
        yield doctor_packages.required(name, advice="pip install torch and torchvision from one index")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch_row.state != "problem" and torch_sees_gpu() else "cpu")
    yield doctor_packages.required("deepspeed")
    yield _deepspeed_ops()
    yield doctor_packages.required("fairscale")
    yield doctor_packages.required("webdataset")
    yield from doctor_packages.others()
    yield from doctor_packages.extras()
    yield doctor_packages.apex(importlib.util.find_spec("apex"))
    yield _slurm()
    yield _compilers()
    yield _cores()
    yield _memory()
    yield from limit_rows()
    yield _disk()


# --- Python and DeepSpeed -------------------------------------------------------------------------------------------


def _python() -> Row:
    version = platform.python_version()
    old = sys.version_info < (3, 10)
    return Row(
        "Python",
        "problem" if old else "ok",
        f"{version} ({sys.executable})",
        "3.10 or newer is needed" if old else "",
        True,
    )


def _deepspeed_ops() -> Row:
    from esvit_scale.parallel.probe import deepspeed_ops

    try:
        ops = deepspeed_ops()
    except Exception as error:
        return Row("DeepSpeed ops", "problem", doctor_packages.one_line(error))
    can, cannot = ([name for name, works in sorted(ops.items()) if works is wanted] for wanted in (True, False))
    detail = f"could be built: {', '.join(can) or 'none'}" + (f"; not: {', '.join(cannot)}" if cannot else "")
    return Row("DeepSpeed ops", "ok", detail + " (none is needed)")


# --- GPU -----------------------------------------------------------------------------------------------------------


def driver_problem(driver: str, cuda_build: str | None) -> str | None:
    """Return why a torch build cannot use this driver and what to do; None when it can, as far as the versions tell.

    Args:
        driver: for example "535.183.01".
        cuda_build: torch.version.cuda, for example "12.6"; None for a CPU build.
    """
    if cuda_build is None:
        return "this torch is a CPU build: install one for CUDA (make venv TORCH_INDEX=URL)"
    have = _numbers(driver)
    need = OLDEST_DRIVER.get(_numbers(cuda_build)[0], OLDEST_DRIVER[max(OLDEST_DRIVER)])
    if not have or have >= need:
        return None
    fitting = [major for major, oldest in OLDEST_DRIVER.items() if have >= oldest]
    old = f"driver {driver} is too old for this torch, built for CUDA {cuda_build} (needs {_dotted(need)} or newer)"
    if not fitting:
        return f"{old}: update the driver"
    return (
        f"{old}: update the driver, or install torch for CUDA {max(fitting)}: make demo TORCH_INDEX=URL,"
        " with the URL that pytorch.org's install page names"
    )


def parse_driver(text: str) -> str | None:
    """Return the version in the text of /proc/driver/nvidia/version."""
    found = re.search(r"NVRM version:.*?\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def gpu_rows() -> Iterator[Row]:
    """Yield one row per GPU that torch sees; without any, one row that says why."""
    import torch

    if torch_sees_gpu():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield _visible_gpu(i, properties.name, properties.total_memory, torch.cuda.get_device_capability(i))
        return
    machine = nvidia_machine()
    if not machine.gpus and not machine.driver:
        yield Row("GPU", "absent", "no NVIDIA device in this machine; everything runs on the CPU")
        return
    what = ", ".join(machine.gpus) or "NVIDIA driver"
    if machine.driver is None:
        yield Row("GPU", "problem", f"{what}: no driver answers", "install NVIDIA's driver, or load its module")
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Row("GPU", "absent", f"{what} (driver {machine.driver}) is hidden by CUDA_VISIBLE_DEVICES")
        return
    advice = (
        driver_problem(machine.driver, torch.version.cuda)
        or "torch cannot use it: see `python -c 'import torch; torch.cuda.init()'`"
    )
    yield Row("GPU", "problem", f"{what}, driver {machine.driver}; torch sees none", advice)


def _visible_gpu(index: int, name: str, memory: int, capability: tuple[int, int]) -> Row:
    import torch

    built = [int(arch.split("_")[1].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    detail = f"{name}, {memory / GIB:.0f} GiB, sm_{capability[0]}{capability[1]}, driver {nvidia_machine().driver or 'unknown'}"
    if built and capability[0] * 10 + capability[1] < min(built):
        return Row(
            f"GPU {index}",
            "problem",
            detail,
            f"this torch was built for sm_{min(built)} and newer: install an older CUDA build (make demo TORCH_INDEX=URL)",
        )
    return Row(f"GPU {index}", "ok", detail)


def nvidia_machine() -> NvidiaMachine:
    """Return the GPUs and the driver as nvidia-smi reports them, or else as the kernel does."""
    said = command_output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    rows = [line.rpartition(", ") for line in (said or "").splitlines() if ", " in line]
    if rows:
        return NvidiaMachine([name for name, _, _ in rows], rows[0][2])
    version = Path("/proc/driver/nvidia/version")
    driver = parse_driver(version.read_text()) if version.is_file() else None
    return NvidiaMachine(list(_nvidia_on_the_bus()), driver)


def _nvidia_on_the_bus() -> Iterator[str]:
    for device in sorted(Path("/sys/bus/pci/devices").glob("*")):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):  # NVIDIA; display or 3D controller
            yield f"NVIDIA device {device.name}"


def torch_sees_gpu() -> bool:
    """Return whether this torch can use a GPU."""
    import torch

    return torch.cuda.is_available()


def _cuda_build() -> str | None:
    try:
        import torch
    except Exception:
        return None
    return torch.version.cuda


def _bf16() -> Row:
    import torch

    if torch_sees_gpu():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Row("bf16", "ok", "the GPU computes in it")
        return Row("bf16", "problem", "the GPU emulates it, slowly", "train.precision=fp32")
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\b(?:avx512_bf16|amx_bf16)\b", cpuinfo.read_text())) if cpuinfo.is_file() else set()
    if flags:
        return Row("bf16", "ok", f"the CPU computes in it ({', '.join(sorted(flags))})")
    return Row("bf16", "absent", "this CPU emulates it, slowly", "train.precision=fp32")


def collective_row(backend: Literal["gloo", "nccl"], required: bool) -> Row:
    """Return the row of a communication backend: whether an all-reduce of this one process works."""
    from esvit_scale.parallel.probe import all_reduce_works

    try:
        all_reduce_works(backend)
    except Exception as error:
        advice = (
            "does this host's name resolve? GLOO_SOCKET_IFNAME=lo chooses the interface"
            if backend == "gloo"
            else "NCCL_DEBUG=INFO says more"
        )
        return Row(backend, "problem", doctor_packages.one_line(error), advice, required)
    return Row(backend, "ok", "an all-reduce came back", required=required)


# --- the machine ---------------------------------------------------------------------------------------------------


def _slurm() -> Row:
    said = [command_output(command, "--version") for command in ("sinfo", "srun")]
    if not any(said):
        return Row("Slurm", "absent", "no sinfo or srun here")
    return Row(
        "Slurm", "ok", ", ".join(f"{name}: {text}" for name, text in zip(("sinfo", "srun"), said, strict=True) if text)
    )


def _compilers() -> Row:
    found = [f"{name} ({path})" for name in ("c++", "nvcc") if (path := shutil.which(name))]
    if not found:
        return Row("compiler", "absent", "no c++: only DeepSpeed's optional ops would need one")
    return Row("compiler", "ok", ", ".join(found))


def _cores() -> Row:
    quota = machine.cpu_quota()
    limit = "" if quota is None else f", limited to {quota:.1f} by a control group"
    return Row("cores", "ok", f"{machine.affinity_cpus()}{limit}")


def _memory() -> Row:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = min(total, machine.memory_limit() or total)
    low = usable < 4 * GIB
    return Row(
        "memory", "problem" if low else "ok", f"{usable / GIB:.1f} GiB", "the demo needs about 4 GiB" if low else ""
    )


def limit_rows() -> Iterator[Row]:
    """Yield the rows of the limits that a node may set for a job; every node of a job is checked for them before it
    starts (preflight.py).
    """
    yield from shared_memory_rows()
    yield open_files_row()
    yield _locked_memory()


def shared_memory_rows() -> Iterator[Row]:
    """Yield the row of /dev/shm, in which loader processes hand over batches; none where it does not exist."""
    if not Path("/dev/shm").is_dir():
        return
    usage = shutil.disk_usage("/dev/shm")
    low = usage.free < limits.LEAST_SHARED_MEMORY or usage.total < limits.SHARED_MEMORY_OF_BATCHES
    advice = "loader processes hand batches over in it: docker run --shm-size=8g, or data.workers=0" if low else ""
    yield Row(
        "/dev/shm", "problem" if low else "ok", f"{usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} free", advice
    )


def open_files_row() -> Row:
    """Return the row of the open-file limit that a run gets; a run raises its own soft limit to the hard one."""
    files = limits.reachable_files()
    workers = limits.workers_served(files)
    detail = f"{files} for each process of a run: enough for data.workers up to {workers}"
    if workers >= limits.COMMON_WORKERS:
        return Row("open files", "ok", detail)
    advice = (
        "raise the hard limit (limits.conf, LimitNOFILE, docker run --ulimit nofile=65536), or set fewer data.workers"
    )
    return Row("open files", "problem", detail, advice)


def _locked_memory() -> Row:
    """Return the row of the locked-memory limit; InfiniBand adapters read and write memory that must not be swapped
    out.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / GIB:.2f} GiB"
    if limit != resource.RLIM_INFINITY and Path("/sys/class/infiniband").is_dir():
        return Row("locked memory", "problem", shown, "InfiniBand needs it unlimited: ulimit -l unlimited")
    return Row("locked memory", "ok", shown)


def _disk() -> Row:
    free = shutil.disk_usage(".").free
    low = free < 5 * GIB
    return Row(
        "disk here", "problem" if low else "ok", f"{free / GIB:.0f} GiB free", "checkpoints need room" if low else ""
    )


# --- helpers -------------------------------------------------------------------------------------------------------


def command_output(*command: str) -> str | None:
    """Return what a command prints; None when it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(f"{part:02d}" if i else str(part) for i, part in enumerate(version))
