"""Recompute a block's activations in the backward instead of keeping them: three implementations, one setting.

torch's non-reentrant checkpoint is the default choice: verified exact at ZeRO 1–3. DeepSpeed's and fairscale's are
reentrant in spirit and correct because the trunk is called once per step (all crops packed). Batch norms inside the
blocks are told which of the two passes moves their running statistics.
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
        autocast: the device type when the run trains in bf16 autocast: DeepSpeed's and fairscale's recomputation runs
            outside the autocast that the forward ran in (torch's enters it again), so that blocks enter it themselves.
    """
    if implementation in ("deepspeed", "fairscale"):
        for block in trunk.blocks:
            batch_norm.moves_without_gradient(block)
            if autocast:
                block.__class__ = _in_autocast(type(block), autocast)  # type: ignore[arg-type]
    if implementation == "torch":
        trunk.run_block = _through_torch
    elif implementation == "deepspeed":
        trunk.run_block = _through_deepspeed
    elif implementation == "fairscale":
        _wrap_with_fairscale(trunk)


@cache
def _in_autocast(kind: type[nn.Module], device_type: str) -> type[nn.Module]:
    """Return a subclass whose forward runs in bf16 autocast."""

    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        with torch.autocast(device_type, torch.bfloat16):
            return kind.forward(self, *inputs, **named)

    return type(kind.__name__, (kind,), {"forward": forward})


def _through_torch(block: Callable[..., Any], *inputs: Any) -> Any:
    contexts = lambda: (nullcontext(), batch_norm.recomputing())  # noqa: E731
    return torch_checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def _through_deepspeed(block: Callable[..., Any], tokens: Tensor, plan: Any, *keep: Tensor | None) -> Any:
    from deepspeed import checkpointing

    # The plan goes in by closure: DeepSpeed takes argument tuples apart, named ones too.
    return checkpointing.checkpoint(lambda tokens, *keep: block(tokens, plan, *keep), tokens, *keep)


def _wrap_with_fairscale(trunk: Any) -> None:
    """fairscale wraps modules in place; the activations that it keeps go to the CPU where there is a GPU."""
    from fairscale.nn import checkpoint_wrapper

    for block in trunk.blocks:
        checkpoint_wrapper(block, offload_to_cpu=torch.cuda.is_available())
