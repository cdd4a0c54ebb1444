"""`train.compile`: torch.compile, block by block.

A block is compiled by itself: student and teacher share what blocks of one shape compile to, and nothing depends on how
ZeRO wraps the whole. Custom backwards stay as they are; what is gained is that norms, GELU and residuals become one pass.
"""

import shutil

import torch
from torch import nn

from esvit_scale.errors import UserError

# Stages × crop layouts × with and without dropped branches × training and not: torch's own limit of 8 would silently go
# back to eager.
VARIANTS = 64


def apply(trunk: nn.Module, device: torch.device) -> None:
    """Compiles every block of a trunk in place, at its first call.

    Raises:
        UserError: on a CPU without a C++ compiler.
    """
    if device.type == "cpu" and not shutil.which("g++"):
        raise UserError("train.compile=true: needs a C++ compiler (g++) on a CPU; set train.compile=false")
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(VARIANTS, getattr(torch._dynamo.config, limit)))
    for block in trunk.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)
