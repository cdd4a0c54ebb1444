"""The limit of code variants per function of torch.compile; beyond it, a call silently runs without compilation."""

import torch

# Enough for stages of a trunk × crop sizes × with or without drop path × training or not; torch's default is 8.
VARIANTS = 64


def raise_recompile_limit() -> None:
    """Let torch.compile make `VARIANTS` variants of a function, unless the limit is higher already."""
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, name, max(VARIANTS, getattr(torch._dynamo.config, name)))
