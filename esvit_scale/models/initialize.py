"""Initial values by parameter name, not by construction order.

A value depends only on the parameter's name, its shape and the seed, so that it is the same under every ZeRO stage,
world size and precision of the built module (constructors and `nn.init` calls are silently without effect under
partitioned construction). Distributions are those of the official code: linear weights and bias tables truncated
normal 0.02 with zero biases, norms 1 and 0, torch's defaults for the patch convolution and the prototypes' directions
(the official last layer is made after the truncated-normal initialisation), gains 1. Swin V2 as its published code:
the norms that end a branch 0 and 0 (a block starts as the identity), temperatures 1/10.
"""

import math
from collections.abc import Callable, Sequence
from zlib import crc32

import torch
from torch import Generator, Tensor, nn

from esvit_scale.models.heads import Prototypes
from esvit_scale.models.swin import WindowAttention
from esvit_scale.models.swin_v2 import BranchNorm, WindowAttentionV2

Initializer = Callable[[Sequence[int], Generator], Tensor]  # (shape, generator) → float32 on the CPU


def initial_values(module: nn.Module) -> dict[str, Initializer]:
    """The initialiser of every parameter, by the parameter's full name.

    Raises:
        LookupError: a parameter that no rule covers; names it.
    """
    found = {
        f"{prefix}.{name}" if prefix else name: init
        for prefix, child in module.named_modules()
        for name, init in _of(child).items()
    }
    names = [name for name, _ in module.named_parameters()]
    missing = [name for name in names if name not in found]
    if missing:
        raise LookupError(f"no initialiser for {', '.join(missing)}")
    return {name: found[name] for name in names}


def initial_value(name: str, init: Initializer, shape: Sequence[int], seed: int) -> Tensor:
    """float32 on the CPU; a function of the name, the shape and the seed alone."""
    return init(shape, Generator(device="cpu").manual_seed(crc32(name.encode()) ^ seed))


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a plain (not partitioned) module."""
    inits = initial_values(module)
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name, inits[name], parameter.shape, seed))


def _of(module: nn.Module) -> dict[str, Initializer]:
    if isinstance(module, nn.Linear):
        return {"weight": _normal, "bias": _constant(0.0)}
    if isinstance(module, BranchNorm):
        return {"weight": _constant(0.0), "bias": _constant(0.0)}
    if isinstance(module, nn.LayerNorm):
        return {"weight": _constant(1.0), "bias": _constant(0.0)}
    if isinstance(module, nn.Conv2d):
        fan_in = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        return {"weight": _uniform(fan_in**-0.5), "bias": _uniform(fan_in**-0.5)}
    if isinstance(module, WindowAttention):
        return {"relative_position_bias_table": _normal}
    if isinstance(module, WindowAttentionV2):
        return {"logit_scale": _constant(math.log(10.0)), "q_bias": _constant(0.0), "v_bias": _constant(0.0)}
    if isinstance(module, Prototypes):
        return {"weight_v": _uniform_rows, "weight_g": _constant(1.0)}
    return {}


def _normal(shape: Sequence[int], generator: Generator) -> Tensor:
    empty = torch.empty(*shape, dtype=torch.float32, device="cpu")
    return nn.init.trunc_normal_(empty, std=0.02, generator=generator)


def _uniform_rows(shape: Sequence[int], generator: Generator) -> Tensor:
    return _uniform(shape[-1] ** -0.5)(shape, generator)


def _uniform(bound: float) -> Initializer:
    return lambda shape, generator: torch.empty(*shape, dtype=torch.float32, device="cpu").uniform_(
        -bound, bound, generator=generator
    )


def _constant(value: float) -> Initializer:
    return lambda shape, generator: torch.full(tuple(shape), value, dtype=torch.float32, device="cpu")
