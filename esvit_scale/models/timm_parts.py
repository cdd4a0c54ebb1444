"""Replacements for parts of timm's networks, put in place after a network is built.

- Stochastic depth is decided by each crop's key (models/drop_path.py); dropout is switched off.
- Batch norms are synchronised over all ranks; their fp32 running statistics move once per call (models/batch_norm.py).
- Layer norms sum their parameters' gradients in fp32 (models/layer_norm.py).
- Blocks are called through `Trunk.run_block` together with their forward's drop factors, so that a recomputation under
  activation checkpointing drops the same branches as the forward.
"""

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.layer_norm import LayerNorm, layer_norm
from esvit_scale.models.trunk import Trunk


class State:
    """The state that all replaced parts of one network share during a forward."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.scales: Tensor | None = None  # drop factors [branches, B] of the current crops; None: drop nothing
        self.outputs: list[Any] | None = None  # each block's output is appended, unless this is None


class BlockCall(NamedTuple):
    """The arguments of a block's call after its input tensor, with the drop factors for that call."""

    scales: Tensor | None
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Unit(nn.Module):
    """A mix-in for timm blocks that routes their calls through `Trunk.run_block`; the first argument is the input."""

    _state: State

    def __call__(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        """Run the block through the trunk's `run_block`, and append its output to `State.outputs` if that is a list."""
        state = self._state
        out = state.trunk.run_block(super().__call__, x, BlockCall(state.scales, arguments, named))
        if state.outputs is not None:
            state.outputs.append(out)
        return out

    def forward(self, x: Tensor, plan: BlockCall) -> Any:
        """Run the block with the drop factors in `plan`, which a recomputation gets unchanged from the forward."""
        self._state.scales = plan.scales  # in a recomputation these are still those of the resolution that ran last
        return super().forward(x, *plan.arguments, **plan.named)  # type: ignore[misc]


def make_unit(block: nn.Module, state: State) -> None:
    """Turn a block into a Unit in place: its new class derives from Unit and from the block's original class."""
    block.__dict__["_state"] = state
    block.__class__ = _kind(type(block))  # type: ignore[arg-type]


@cache
def _kind(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Unit, kind), {})


class KeyedDropPath(nn.Module):
    """A drop-in replacement for timm's DropPath whose drops are decided by each crop's key (models/drop_path.py)."""

    _state: State

    def __init__(self, index: int, state: State) -> None:
        super().__init__()
        self.index = index
        self.__dict__["_state"] = state

    def forward(self, x: Tensor) -> Tensor:
        """Scale x [B, …] by the drop factor of each of its B crops: 0 drops the branch."""
        scales = self._state.scales
        if scales is None:
            return x
        if x.shape[0] != scales.shape[1]:
            raise ValueError("its stochastic depth does not drop whole crops")
        return x * scales[self.index].to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class ActivatedBatchNorm(BatchNorm):
    """A drop-in replacement for torch's and timm's batch norms; timm's may include an activation after the norm."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__(theirs.num_features, theirs.eps, theirs.momentum or 0.1, theirs.affine)  # type: ignore[arg-type]
        self.act = getattr(theirs, "act", None) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate x [B, C, H, W]."""
        return self.act(super().forward(x))


class LayerNorm2d(LayerNorm):
    """A drop-in replacement for timm's LayerNorm2d, which normalises the channels of maps [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of x [B, C, H, W]."""
        return layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


LAYER_NORMS = {"LayerNorm": LayerNorm, "LayerNorm2d": LayerNorm2d}  # our versions of torch's and timm's, by class name


def replace(module: nn.Module, state: State, rates: list[float]) -> None:
    """Replace stochastic depth, batch norms and layer norms within a module, in place, and switch dropout off.

    The drop rate of each stochastic depth is appended to `rates`. Call this before parameters are initialised or
    loaded, because batch norms are made anew.
    """
    for name, child in module.named_children():
        if type(child).__name__ == "DropPath":
            setattr(module, name, KeyedDropPath(len(rates), state))
            rates.append(float(child.drop_prob))  # type: ignore[arg-type]
        elif isinstance(child, nn.modules.dropout._DropoutNd):
            child.p = 0.0
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, ActivatedBatchNorm(child))
        elif isinstance(child, nn.LayerNorm) and type(child).__name__ in LAYER_NORMS and child.elementwise_affine:
            child.__class__ = LAYER_NORMS[type(child).__name__]
        else:
            replace(child, state, rates)
