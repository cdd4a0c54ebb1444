"""Initial values of parameters, drawn by parameter name and not in the order of construction.

A value depends only on the parameter's name, its shape and the seed, so that it is the same under every ZeRO stage,
world size and precision of the built module (under ZeRO-3's partitioned construction, what constructors and `nn.init`
calls write is silently lost). Distributions are those of the official code:
- linear layers and bias tables: weights truncated normal with σ = 0.02, biases 0;
- norms: weight 1, bias 0; in Swin V2, as published, 0 and 0 for the norms that end a branch (a block starts as the
  identity);
- patch convolution and directions of the prototypes: torch's defaults (the official code makes its last layer after
  its truncated-normal initialisation); gains of the prototypes 1;
- Swin V2's temperatures: 1/10.

A module that needs other distributions has a method `initial_values() -> {parameter's name within it: Initializer}`.
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
        LookupError: no rule covers a parameter; the message names it.
    """
    found: dict[str, Initializer] = {}
    for prefix, child in module.named_modules():  # parents come first and take precedence
        for name, init in _of(child).items():
            found.setdefault(f"{prefix}.{name}" if prefix else name, init)
    names = [name for name, _ in module.named_parameters()]
    missing = [name for name in names if name not in found]
    if missing:
        raise LookupError(f"no initialiser for {', '.join(missing)}")
    return {name: found[name] for name in names}


def initial_value(name: str, init: Initializer, shape: Sequence[int], seed: int) -> Tensor:
    """Return the initial value of a parameter, float32 on the CPU; it depends on name, shape and seed alone."""
    if isinstance(init, OfSeed):
        return init.draw(seed)
    return init(shape, Generator(device="cpu").manual_seed(crc32(name.encode()) ^ seed))


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a module, which ZeRO has not partitioned, with its initial value for this seed."""
    inits = initial_values(module)
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, inits[name], parameter.shape, seed))


def _of(module: nn.Module) -> dict[str, Initializer]:
    if (own := getattr(module, "initial_values", None)) is not None:  # replaces the rules below
        return own()
    if isinstance(module, nn.Linear):
        return {"weight": normal(0.02), "bias": constant(0.0)}
    if isinstance(module, (nn.LayerNorm, BatchNorm)):
        return {"weight": constant(1.0), "bias": constant(0.0)}
    if isinstance(module, nn.Conv2d):
        fan_in = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        return {"weight": uniform(fan_in**-0.5), "bias": uniform(fan_in**-0.5)}
    return {}
