"""Activation checkpointing: recompute a block's activations in the backward instead of keeping them.

`train.activation_checkpointing` chooses one of four implementations. torch's (non-reentrant) keeps the inputs of blocks
alone, `selective` (built on it) also the products that are expensive to compute (models/recomputation.py). At ZeRO 0–3,
training gives the same numbers with both as without checkpointing. DeepSpeed's and fairscale's are reentrant,
and correct only if each block is called once per forward, with all crops packed into this call. Batch norms inside the
blocks update their running statistics only once, in the first forward or in its recomputation.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from esvit_scale.models import batch_norm, recomputation

Implementation = Literal["none", "selective", "torch", "deepspeed", "fairscale"]


def apply(trunk: Any, implementation: Implementation, autocast: str | None = None) -> None:
    """Make every block of the trunk run through the chosen implementation (`trunk.run_block`).

    Args:
        autocast: the device type if the run trains in bf16 autocast, else None. DeepSpeed and fairscale recompute
            outside the forward's autocast context, so each block enters one itself; torch's restores the context.
    """
    if implementation in ("deepspeed", "fairscale"):
        for block in trunk.blocks:
            batch_norm.moves_without_gradient(block)
            if autocast:
                block.__class__ = _in_autocast(type(block), autocast)  # type: ignore[arg-type]
    if implementation == "torch":
        trunk.run_block = _run_with_torch
    elif implementation == "selective":
        trunk.run_block = _run_selectively
    elif implementation == "deepspeed":
        trunk.run_block = _run_with_deepspeed
    elif implementation == "fairscale":
        _wrap_with_fairscale(trunk)


@cache
def _in_autocast(kind: type[nn.Module], device_type: str) -> type[nn.Module]:
    """Return a subclass of the module class `kind` whose forward runs in bf16 autocast."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            return kind.forward(self, *inputs, **named)

    return type(kind.__name__, (kind,), {"forward": forward})


def _run_with_torch(block: Callable[..., Any], *inputs: Any) -> Any:
    contexts = lambda: (nullcontext(), recomputation.recomputing())  # noqa: E731
    return torch_checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _run_selectively(block: Callable[..., Any], *inputs: Any) -> Any:
    def contexts() -> tuple[Any, Any]:
        kept = recomputation.KeepResults()
        return kept, kept.reused()

    return torch_checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _run_with_deepspeed(block: Callable[..., Any], tokens: Tensor, plan: Any, *keep: Tensor | None) -> Any:
    from deepspeed import checkpointing

    # The plan is passed in a closure: DeepSpeed would flatten it, as it flattens all tuples among the arguments.
    return checkpointing.checkpoint(lambda tokens, *keep: block(tokens, plan, *keep), tokens, *keep)


def _wrap_with_fairscale(trunk: Any) -> None:
    """Wrap every block in place by fairscale's wrapper; with a GPU, it offloads the saved block inputs to the CPU."""
    from fairscale.nn import checkpoint_wrapper

    for block in trunk.blocks:
        checkpoint_wrapper(block, offload_to_cpu=torch.cuda.is_available())
