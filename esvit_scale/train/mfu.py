"""Model FLOPs utilisation (MFU): what share of the devices' matrix-product rate becomes training.

Useful FLOPs a second (objective/costs.py: no recomputation; of Swin, real tokens only) over the rate that a large product
reaches on the same device, in the same process and precision: a data sheet's peak would compare machines, not code.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch

from esvit_scale.config import Config
from esvit_scale.objective.costs import image_flops

SECONDS = 0.3  # of measuring
SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices


def ideal_images_per_s(config: Config, device: torch.device, world_size: int) -> float:
    """The rate at an MFU of 1: MFU is images/s over this. Every rank counts as one such device."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return world_size * matmul_rate(device, dtype) / image_flops(config, "useful")


@lru_cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square products; well under a second, and measured once a process."""
    side = SIDE.get(device.type, SIDE["cpu"])
    # Random values: a GPU multiplies constants faster than it ever could a model's numbers.
    a = torch.randn(side, side, generator=torch.Generator(device), device=device, dtype=dtype)
    out = torch.empty_like(a)
    product = lambda: torch.mm(a, a, out=out)  # noqa: E731
    _seconds(product, device)  # the first call loads libraries
    times = [_seconds(product, device)]
    while sum(times) < SECONDS:
        times.append(_seconds(product, device))
    return 2 * side**3 / min(times)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
