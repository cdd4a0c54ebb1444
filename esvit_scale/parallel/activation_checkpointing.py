"""Activation checkpointing: recompute a block's activations in the backward instead of keeping them.

`train.activation_checkpointing` chooses one of three implementations. torch's (non-reentrant) is the usual choice; it gives
the same numbers as none at ZeRO 1–3. DeepSpeed's and fairscale's are reentrant, and right only if a block is called once
per forward: with all crops packed into one call. Batch norms inside the blocks update their running statistics in one of
the two passes only.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from esvit_scale.models import batch_norm

Implementation = Literal["none", "torch", "deepspeed", "fairscale"]


def apply(trunk: Any, implementation: Implementation, autocast: str | None = None) -> None:
    """Make every block of the trunk run through the chosen implementation (`trunk.run_block`).

    Args:
        autocast: the device type if the run trains in bf16 autocast, else None. DeepSpeed and fairscale recompute
            outside the autocast of the forward, so that each block enters it itself; torch's enters it again.
    """
    if implementation in ("deepspeed", "fairscale"):
        for block in trunk.blocks:
            batch_norm.moves_without_gradient(block)
            if autocast:
                block.__class__ = _in_autocast(type(block), autocast)  # type: ignore[arg-type]
    if implementation == "torch":
        trunk.run_block = _run_with_torch
    elif implementation == "deepspeed":
        trunk.run_block = _run_with_deepspeed
    elif implementation == "fairscale":
        _wrap_with_fairscale(trunk)


@cache
def _in_autocast(kind: type[nn.Module], device_type: str) -> type[nn.Module]:
    """Return a subclass whose forward runs in bf16 autocast."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            return kind.forward(self, *inputs, **named)

    return type(kind.__name__, (kind,), {"forward": forward})


def _run_with_torch(block: Callable[..., Any], *inputs: Any) -> Any:
    contexts = lambda: (nullcontext(), batch_norm.recomputing())  # noqa: E731
    return torch_checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _run_with_deepspeed(block: Callable[..., Any], tokens: Tensor, plan: Any, *keep: Tensor | None) -> Any:
    from deepspeed import checkpointing

    # The plan is passed in a closure: DeepSpeed would flatten it, as it flattens all tuples among the arguments.
    return checkpointing.checkpoint(lambda tokens, *keep: block(tokens, plan, *keep), tokens, *keep)


def _wrap_with_fairscale(trunk: Any) -> None:
    """Wrap every block in place; with a GPU, the block inputs that fairscale keeps are moved to the CPU."""
    from fairscale.nn import checkpoint_wrapper

    for block in trunk.blocks:
        checkpoint_wrapper(block, offload_to_cpu=torch.cuda.is_available())
