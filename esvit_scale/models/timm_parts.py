"""What replaces parts of timm's networks, in place.

- Stochastic depth draws from the crops' keys (models/drop_path.py); dropout is left out.
- Batch norms are synchronised, their statistics in fp32, moved once a batch (models/batch_norm.py).
- Layer norms sum their parameters' gradients in fp32 (models/layer_norm.py).
- Blocks are called through `run_block`, with the drop factors of their forward bound to them, so that a recomputation
  drops what the forward dropped.
"""

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.layer_norm import LayerNorm, layer_norm
from esvit_scale.models.trunk import Trunk


class State:
    """What the parts of one network share in a forward."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.scales: Tensor | None = None  # [paths, crops of the resolution that runs]: stochastic depth
        self.outputs: list[Any] | None = None  # of the blocks, in order, where they are wanted


class BlockCall(NamedTuple):
    """What a block is called with beside its tensor."""

    scales: Tensor | None
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Unit(nn.Module):
    """A block of timm's that is called through `run_block`, its first argument the tensor to keep."""

    _state: State

    def __call__(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        """Run the block through the trunk's `run_block`, and keep its output where outputs are wanted."""
        state = self._state
        out = state.trunk.run_block(super().__call__, x, BlockCall(state.scales, arguments, named))
        if state.outputs is not None:
            state.outputs.append(out)
        return out

    def forward(self, x: Tensor, plan: BlockCall) -> Any:
        """Run the block with the drop factors of its forward, which a recomputation finds in the plan."""
        self._state.scales = plan.scales  # at a recomputation, another resolution was the last to run
        return super().forward(x, *plan.arguments, **plan.named)  # type: ignore[misc]


def make_unit(block: nn.Module, state: State) -> None:
    """Make a block a Unit in place: its class becomes a subclass of Unit and of its own class."""
    block.__dict__["_state"] = state
    block.__class__ = _kind(type(block))  # type: ignore[arg-type]


@cache
def _kind(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (Unit, kind), {})


class KeyedDropPath(nn.Module):
    """Stochastic depth by the crops' keys, in the place of timm's."""

    _state: State

    def __init__(self, index: int, state: State) -> None:
        super().__init__()
        self.index = index
        self.__dict__["_state"] = state

    def forward(self, x: Tensor) -> Tensor:
        """Scale x [B, …] by the factors of the crops that run."""
        scales = self._state.scales
        if scales is None:
            return x
        if x.shape[0] != scales.shape[1]:
            raise ValueError("its stochastic depth does not drop whole crops")
        return x * scales[self.index].to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class ActivatedBatchNorm(BatchNorm):
    """A batch norm with the activation that timm's has in it."""

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__(theirs.num_features, theirs.eps, theirs.momentum or 0.1, theirs.affine)  # type: ignore[arg-type]
        self.act = getattr(theirs, "act", None) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate x [B, C, H, W]."""
        return self.act(super().forward(x))


class LayerNorm2d(LayerNorm):
    """A layer norm over the channels of a map, in the place of timm's."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of x [B, C, H, W]."""
        return layer_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


LAYER_NORMS = {"LayerNorm": LayerNorm, "LayerNorm2d": LayerNorm2d}  # torch's and timm's, by their class names


def replace(module: nn.Module, state: State, rates: list[float]) -> None:
    """Replace a network's parts in place, before any value is set; append the rate of every stochastic depth to
    `rates`."""
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
