"""The rows of `esvit-scale doctor` about NVIDIA GPUs, their driver and bf16."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from esvit_scale import doctor_machine
from esvit_scale.doctor_packages import CheckRow

# The oldest Linux driver that runs any build of a CUDA major version (NVIDIA's minor-version compatibility).
OLDEST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}


class NvidiaMachine(NamedTuple):
    """NVIDIA GPUs and their driver, found without torch."""

    gpus: list[str]  # names, or PCI addresses where only the bus shows them
    driver: str | None


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
    """Extract the driver's version from the text of /proc/driver/nvidia/version."""
    found = re.search(r"NVRM version:.*?\s(\d{3,}\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def gpu_rows() -> Iterator[CheckRow]:
    """Yield one row per GPU that torch sees; if it sees none, yield one row that says why."""
    import torch

    if torch_sees_gpu():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            yield _visible_gpu(i, properties.name, properties.total_memory, torch.cuda.get_device_capability(i))
        return
    machine = nvidia_machine()
    if not machine.gpus and not machine.driver:
        yield CheckRow("GPU", "absent", "no NVIDIA device in this machine; everything runs on the CPU")
        return
    what = ", ".join(machine.gpus) or "NVIDIA driver"
    if machine.driver is None:
        yield CheckRow(
            "GPU", "problem", f"{what}: the driver does not answer", "install NVIDIA's driver, or load its module"
        )
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield CheckRow("GPU", "absent", f"{what} (driver {machine.driver}) is hidden by CUDA_VISIBLE_DEVICES")
        return
    advice = (
        driver_problem(machine.driver, torch.version.cuda)
        or "torch cannot use it: see `python -c 'import torch; torch.cuda.init()'`"
    )
    yield CheckRow("GPU", "problem", f"{what}, driver {machine.driver}; torch sees none", advice)


def _visible_gpu(index: int, name: str, memory: int, capability: tuple[int, int]) -> CheckRow:
    import torch

    built = [int(arch.split("_")[1].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    detail = f"{name}, {memory / 2**30:.0f} GiB, sm_{capability[0]}{capability[1]}, driver {nvidia_machine().driver or 'unknown'}"
    if built and capability[0] * 10 + capability[1] < min(built):
        return CheckRow(
            f"GPU {index}",
            "problem",
            detail,
            f"this torch was built for sm_{min(built)} and newer: install an older CUDA build (make demo TORCH_INDEX=URL)",
        )
    return CheckRow(f"GPU {index}", "ok", detail)


def nvidia_machine() -> NvidiaMachine:
    """Return the GPUs and the driver as nvidia-smi reports them, or else as the kernel does."""
    said = doctor_machine.command_output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
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


def cuda_build_of_torch() -> str | None:
    """Return the CUDA version that torch was built for; None for a CPU build, and when torch does not load."""
    try:
        import torch
    except Exception:
        return None
    return torch.version.cuda


def bf16_row() -> CheckRow:
    """Return the row that says whether bf16 is computed in hardware or emulated."""
    import torch

    if torch_sees_gpu():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return CheckRow("bf16", "ok", "computed by the GPU in hardware")
        return CheckRow("bf16", "problem", "emulated by the GPU, slowly", "set train.precision=fp32")
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\b(?:avx512_bf16|amx_bf16)\b", cpuinfo.read_text())) if cpuinfo.is_file() else set()
    if flags:
        return CheckRow("bf16", "ok", f"computed by the CPU in hardware ({', '.join(sorted(flags))})")
    return CheckRow("bf16", "absent", "emulated by this CPU, slowly", "set train.precision=fp32")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(f"{part:02d}" if i else str(part) for i, part in enumerate(version))
