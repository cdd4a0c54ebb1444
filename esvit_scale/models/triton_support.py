"""Where Triton kernels can run; this module does not import triton."""

import os
from importlib.util import find_spec

import torch

OLDEST_GPU = (8, 0)  # compute capability


def interpreted() -> bool:
    """Return whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1, set before triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, as a clause; None when they may."""
    if find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if device.type != "cuda" and interpreted():  # slowly: for tests
        return None
    return unsuitable_gpu(device)


def unsuitable_gpu(device: torch.device) -> str | None:
    """Return why a device is no GPU that fused kernels are made for, as a clause; None when it is one."""
    if device.type != "cuda":
        return f"needs a CUDA GPU, and this process runs on a {device.type.upper()}"
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return f"needs a GPU of compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]} or newer"
    return None
