"""What this rank owns of each parameter: the one view of ZeRO 0–3 on which initialisation, clipping, the EMA teacher
and checkpoints stand.

Stage 0 owns every parameter whole (on every rank alike), stages 1 and 2 own an interval of a flat buffer per parameter
group, stage 3 an equal part of each parameter. In all of them a rank's share of a parameter is an interval of the
flattened parameter, and its fp32 values are an interval of a tensor that the base optimizer steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Partition:
    """This rank's interval [start, start + length) of one flattened parameter."""

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    length: int
    flat: Tensor  # the fp32 tensor that the base optimizer steps
    offset: int  # of the interval in `flat`

    @property
    def master(self) -> Tensor:
        """The fp32 values [length]; a view, writing to it changes the optimizer's parameter."""
        return self.within(self.flat.data)

    @property
    def grad(self) -> Tensor | None:
        """The fp32 gradient [length], a view; there only while the optimizer steps."""
        return None if self.flat.grad is None else self.within(self.flat.grad)

    def within(self, like_flat: Tensor) -> Tensor:
        """The interval of a tensor that is laid out as `flat` (a gradient, an optimizer state)."""
        return like_flat.view(-1).narrow(0, self.offset, self.length)


def of_engine(engine: Any) -> list[Partition]:
    """The partitions of every trainable parameter that this rank owns a part of, in the module's parameter order."""
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [Partition(name, p.shape, 0, p.numel(), p, 0) for name, p in named]
    if stage == 3:
        return _stage_3(engine.optimizer, named)
    return _stage_1_or_2(engine.optimizer, named)


def waiting_gradients(engine: Any) -> Iterator[Tensor]:
    """Yield this rank's reduced gradients of the parameter groups that ZeRO 1–3 have still to hand to the base
    optimizer, one group at a time. With an offloaded optimizer, and at stage 0, none wait: they are in place."""
    if engine.zero_optimization_stage() > 0:
        for group in engine.optimizer.averaged_gradients.values():
            yield from () if group is None else group


class Frozen(NamedTuple):
    """This rank's interval of a parameter that is not trained; stages 0–2 hold it whole."""

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    values: Tensor  # [length], a view of the working copy


def frozen_of_module(module: nn.Module) -> list[Frozen]:
    """The parameters without gradient, in the module's order, as this rank holds them."""
    frozen = []
    for name, p in module.named_parameters():
        if p.requires_grad:
            continue
        if not hasattr(p, "ds_id"):
            frozen.append(Frozen(name, p.shape, 0, p.data.view(-1)))
            continue
        start = torch.distributed.get_rank() * p.ds_tensor.numel()  # type: ignore[attr-defined]
        length = max(0, min(p.ds_tensor.numel(), p.ds_numel - start))  # type: ignore[attr-defined]
        frozen.append(Frozen(name, p.ds_shape, start, p.ds_tensor.data[:length]))  # type: ignore[attr-defined]
    return frozen


def buffers_of_module(module: nn.Module) -> dict[str, Tensor]:
    """What a module keeps beside its parameters and would save: running statistics, whole on every rank, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, child in module.named_modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and buffer.is_floating_point() and name not in child._non_persistent_buffers_set
    }


def widen_buffers(module: nn.Module) -> None:
    """fp32 whatever an engine cast them to: a running mean in bf16 stops moving."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                child._buffers[name] = buffer.float()


def _stage_1_or_2(optimizer: Any, named: list[tuple[str, Tensor]]) -> list[Partition]:
    names = {id(p): name for name, p in named}
    order = {name: i for i, (name, _) in enumerate(named)}
    owned = []
    for group, params in enumerate(optimizer.bit16_groups):
        working_flat, flat = optimizer.bit16_groups_flat[group], optimizer.single_partition_of_fp32_groups[group]
        low = torch.distributed.get_rank(optimizer.real_dp_process_group[group]) * optimizer.partition_size[group]
        high = low + optimizer.partition_size[group]
        for p in params:
            begin = (p.data_ptr() - working_flat.data_ptr()) // working_flat.element_size()
            first, last = max(begin, low), min(begin + p.numel(), high)
            if first < last:
                owned.append(Partition(names[id(p)], p.shape, first - begin, last - first, flat, first - low))
    return sorted(owned, key=lambda partition: order[partition.name])


def _stage_3(optimizer: Any, named: list[tuple[str, Tensor]]) -> list[Partition]:
    rank = torch.distributed.get_rank(optimizer.dp_process_group)
    owned = []
    for name, p in named:
        start = rank * p.ds_tensor.numel()  # type: ignore[attr-defined]
        length = min(p.ds_tensor.numel(), p.ds_numel - start)  # type: ignore[attr-defined]
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(p)]
        if length > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            owned.append(Partition(name, p.ds_shape, start, length, flat, offset))  # type: ignore[attr-defined]
    return owned


def sync_working_weights(engine: Any) -> None:
    """After masters were written from outside: the working copies that the forward uses follow them."""
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    elif stage == 3:
        for p in engine.module.parameters():
            if p.requires_grad:
                group, offset, length = engine.optimizer.grad_position[engine.optimizer.get_param_id(p)]
                flat = engine.optimizer.fp32_partitioned_groups_flat[group]
                p.ds_tensor.data.copy_(flat.data.narrow(0, offset, length))
        engine.optimizer.invalidate_secondary_tensor()  # a hierarchical partition's copy inside the node
