"""Model FLOPs utilisation (MFU): the fraction of the devices' matrix-product rate that training reaches.

It is useful FLOPs per second (objective/costs.py: no recomputation and, for Swin, no padding tokens) divided by the
rate of a large matrix product on the same device, in the same process and the precision of its products. The peak rate
of a data sheet would compare machines, not code.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch

from esvit_scale.config import Config
from esvit_scale.models import products
from esvit_scale.objective.costs import image_flops

SECONDS = 0.3  # products are timed for at least this long
SIDE = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrices


def ideal_images_per_s(config: Config, device: torch.device, world_size: int) -> float:
    """Return the images/s at which MFU is 1, for `world_size` devices like this one. A run's MFU is its images/s
    divided by this."""
    wide = device.type == "cpu" and products.fp32_is_faster()
    dtype = torch.bfloat16 if config.train.precision == "bf16" and not wide else torch.float32
    return world_size * matmul_rate(device, dtype) / image_flops(config, "useful")


@lru_cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large square matrix product, the fastest of several; measured once per process."""
    side = SIDE.get(device.type, SIDE["cpu"])
    # Random values, because a GPU multiplies constants faster than a model's numbers.
    a = torch.randn(side, side, generator=torch.Generator(device), device=device, dtype=dtype)
    out = torch.empty_like(a)
    product = lambda: torch.mm(a, a, out=out)  # noqa: E731
    elapsed_seconds(product, device)  # the first call loads libraries
    times = [elapsed_seconds(product, device)]
    while sum(times) < SECONDS:
        times.append(elapsed_seconds(product, device))
    return 2 * side**3 / min(times)


def elapsed_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Run `work` and return how many seconds it takes, including the operations that it queues on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
