"""Initial values by parameter name, not by construction order.

A value depends only on the parameter's name, its shape and the seed, so that it is the same under every ZeRO stage,
world size and precision of the built module (constructors and `nn.init` calls are silently without effect under
partitioned construction). Distributions are those of the official code: linear weights and bias tables truncated
normal 0.02 with zero biases, norms 1 and 0, torch's defaults for the patch convolution and the prototypes' directions
(the official last layer is made after the truncated-normal initialisation), gains 1. Swin V2 as its published code:
the norms that end a branch 0 and 0 (a block starts as the identity), temperatures 1/10.

A module with values of its own kind has a method `initial_values() -> {parameter's name within it: Initializer}`.
"""

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Generator, Tensor, nn

from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.distributions import Initializer, OfSeed, constant, normal, uniform


def initial_values(module: nn.Module) -> dict[str, Initializer]:
    """Return the initialiser of every parameter, by the parameter's full name.

    Raises:
        LookupError: a parameter that no rule covers; names it.
    """
    found: dict[str, Initializer] = {}
    for prefix, child in module.named_modules():  # parents first: what they say of their children counts
        for name, init in _of(child).items():
            found.setdefault(f"{prefix}.{name}" if prefix else name, init)
    names = [name for name, _ in module.named_parameters()]
    missing = [name for name in names if name not in found]
    if missing:
        raise LookupError(f"no initialiser for {', '.join(missing)}")
    return {name: found[name] for name in names}


def initial_value(name: str, init: Initializer, shape: Sequence[int], seed: int) -> Tensor:
    """Return the value, float32 on the CPU: a function of the name, the shape and the seed alone."""
    if isinstance(init, OfSeed):
        return init.draw(seed)
    return init(shape, Generator(device="cpu").manual_seed(crc32(name.encode()) ^ seed))


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a plain (not partitioned) module."""
    inits = initial_values(module)
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, inits[name], parameter.shape, seed))


def _of(module: nn.Module) -> dict[str, Initializer]:
    if (own := getattr(module, "initial_values", None)) is not None:  # of its own parameters, not its children's
        return own()
    if isinstance(module, nn.Linear):
        return {"weight": normal(0.02), "bias": constant(0.0)}
    if isinstance(module, (nn.LayerNorm, BatchNorm)):
        return {"weight": constant(1.0), "bias": constant(0.0)}
    if isinstance(module, nn.Conv2d):
        fan_in = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        return {"weight": uniform(fan_in**-0.5), "bias": uniform(fan_in**-0.5)}
    return {}
