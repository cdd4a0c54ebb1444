"""The EMA teacher: fp32, on what each rank owns, from the student's fp32 masters, without communication.

e ← m·e + (1 − m)·s for every trainable parameter, heads included (as in DINO and EsViT). In bf16 an
update of (1 − m) ~ 5e-4 of the distance would be rounded away, hence fp32 whatever the precision of training.
The working copy, which the teacher's forward uses, follows: stage 0 works on the fp32 values themselves, stages 1 and 2
gather a flat buffer per parameter group, and at stage 3 the teacher is its own ZeRO-3 engine with partitioned parameters.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esvit_scale.parallel import collectives
from esvit_scale.parallel.partitions import Partition, buffers_of_module, frozen_of_module, widen_buffers


class Teacher:
    """The teacher's network (call it like the student's) and its fp32 values on this rank.

    Attributes:
        network: the module or engine whose forward gives the targets, in training precision.
        values: for each of the student's partitions, the fp32 EMA of that interval [length].
    """

    def __init__(
        self, student: Any, partitions: list[Partition], build: Callable[[], nn.Module], ds: dict[str, Any]
    ) -> None:
        """`student` is the initialised engine: the teacher starts as its copy."""
        self._partitions = partitions
        self._stage = student.zero_optimization_stage()
        self._student = student
        if self._stage == 3:
            self.network, self._working = _partitioned_copy(build, ds), None
        else:
            self.network, self._working = _flat_copy(student, build)
        if self._stage == 0:
            own = dict(self.network.named_parameters())
            self.values = [own[p.name].data.view(-1) for p in partitions]
        else:
            self.values = [p.master.clone() for p in partitions]
        self.sync_frozen()
        widen_buffers(self.module)
        self.sync_buffers()
        self.sync_working_weights()

    @property
    def module(self) -> nn.Module:
        """The network without an engine around it."""
        return self.network.module if self._stage == 3 else self.network

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """One EMA step; call it once per applied optimizer step."""
        for value, partition in zip(self.values, self._partitions, strict=True):
            value.mul_(momentum).add_(partition.master, alpha=1 - momentum)
        self.sync_working_weights()

    @torch.no_grad()
    def sync_frozen(self) -> None:
        """What is not trained is the student's; needed again after the student's was written from outside."""
        own = {p.name: p for p in frozen_of_module(self.module)}
        for p in frozen_of_module(self._student.module):
            own[p.name].values.copy_(p.values)

    @torch.no_grad()
    def sync_buffers(self) -> None:
        """Running statistics are the student's: at the start, and for good where the teacher sees no images itself."""
        own = buffers_of_module(self.module)
        for name, buffer in buffers_of_module(self._student.module).items():
            own[name].copy_(buffer)

    @torch.no_grad()
    def sync_working_weights(self) -> None:
        """The working copy follows `values`; needed after `values` were written from outside."""
        if self._stage in (1, 2):
            self._sync_flat()
        elif self._stage == 3:
            own = dict(self.module.named_parameters())
            for value, partition in zip(self.values, self._partitions, strict=True):
                own[partition.name].ds_tensor.data[: partition.length].copy_(value)  # type: ignore[attr-defined]

    def _sync_flat(self) -> None:
        optimizer = self._student.optimizer
        assert self._working is not None
        by_flat = {id(flat): group for group, flat in enumerate(optimizer.single_partition_of_fp32_groups)}
        parts = [working.chunk(dist.get_world_size())[dist.get_rank()] for working in self._working]
        for value, partition in zip(self.values, self._partitions, strict=True):
            parts[by_flat[id(partition.flat)]].narrow(0, partition.offset, partition.length).copy_(value)
        if dist.get_world_size() > 1:
            for working, part in zip(self._working, parts, strict=True):
                collectives.all_gather_flat(working, part.clone())


def _partitioned_copy(build: Callable[[], nn.Module], ds: dict[str, Any]) -> Any:
    """A ZeRO-3 engine without an optimizer: parameters cost 1/world per rank and are gathered layer by layer."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=ds):
        module = build()
    module.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=module, config=ds)
    return engine


def _flat_copy(student: Any, build: Callable[[], nn.Module]) -> tuple[nn.Module, list[Tensor] | None]:
    """A plain module whose parameters are views of flat buffers laid out as the student's (stages 1 and 2)."""
    module = build()
    module.requires_grad_(False)
    like = dict(student.module.named_parameters())
    some = next(iter(like.values()))
    module.to(device=some.device, dtype=some.dtype)
    for name, p in module.named_parameters():
        p.data.copy_(like[name].data)
    if student.zero_optimization_stage() == 0:
        return module, None
    optimizer = student.optimizer
    own = dict(module.named_parameters())
    names = {id(p): name for name, p in like.items()}
    working = [flat.clone() for flat in optimizer.bit16_groups_flat]
    for group, params in enumerate(optimizer.bit16_groups):
        base = optimizer.bit16_groups_flat[group]
        for p in params:
            begin = (p.data_ptr() - base.data_ptr()) // base.element_size()
            own[names[id(p)]].data = working[group].narrow(0, begin, p.numel()).view(p.shape)
    return module, working
