"""Compilation of a trunk's blocks with torch.compile (`train.compile`).

Each block is compiled by itself. In this way, blocks of one shape share their code between student and teacher, and
nothing depends on how ZeRO wraps the network. Compilation fuses norms, GELU and residuals into one pass; custom
autograd functions stay as they are.

The block's forward is compiled, and not its call, so that hooks of the block stay outside. At ZeRO 3 these gather its
parameters: of the whole block at once (`ds_config.gather_whole`), as hooks inside would break the compiled code apart.
"""

import shutil

import torch
from torch import nn

from esvit_scale.errors import UserError
from esvit_scale.models.recompile_limit import raise_recompile_limit

BACKEND = "inductor"  # torch.compile's own; tests take a faster one that generates no code


def apply(trunk: nn.Module, device: torch.device) -> None:
    """Let every block of a trunk compile itself at its first call.

    Raises:
        UserError: the device is a CPU, and there is no C++ compiler.
    """
    if device.type == "cpu" and not shutil.which("g++"):
        raise UserError(
            "train.compile=true: needs a C++ compiler on a CPU, and g++ is not in PATH; install it or set train.compile=false"
        )
    raise_recompile_limit()
    for block in trunk.blocks:  # type: ignore[union-attr]
        block.forward = torch.compile(block.forward, dynamic=False, backend=BACKEND)
