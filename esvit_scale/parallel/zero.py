"""The differences between the ZeRO stages, and every attribute of DeepSpeed that its documentation does not promise.

One subclass of `Layout` per kind of stage says who owns which values:

    stage   a rank owns                          the student's forward uses        the teacher is
    0       every parameter, as all ranks do     the fp32 parameters               a module whose parameters are the EMA
    1, 2    an interval of one flat buffer per   views of flat buffers, gathered   a module on flat buffers that are
            parameter group                      after every step                  laid out alike
    3       an equal part of every parameter     parameters gathered one layer     a ZeRO-3 engine without an optimizer
                                                 at a time

At every stage, a rank owns an interval of a flattened parameter, and the fp32 values of this interval are an interval
of a tensor that the base optimizer steps (`Partition`). Initialisation, the optimizers, clipping, the EMA and
checkpoints work on partitions and are the same at every stage.

Review this file when DeepSpeed is upgraded. tests/parallel/test_zero.py checks that the installed DeepSpeed has the
attributes that are used here, that no other file uses one, and that no other file has a branch on the stage.
"""

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esvit_scale.parallel import collectives, ds_config

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Partition:
    """The interval [start, start + length) of one flattened trainable parameter that this rank owns."""

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    length: int
    flat: Tensor  # the fp32 tensor that the base optimizer steps
    offset: int  # where the interval begins in `flat`

    @property
    def master(self) -> Tensor:
        """The fp32 values [length]: a view, so that writing to it changes what the optimizer steps."""
        return self.within(self.flat.data)

    @property
    def grad(self) -> Tensor | None:
        """The fp32 gradient [length], a view; None except while the optimizer steps."""
        return None if self.flat.grad is None else self.within(self.flat.grad)

    def within(self, like_flat: Tensor) -> Tensor:
        """Return this interval of a tensor with the layout of `flat`: a gradient or an optimizer state."""
        return like_flat.view(-1).narrow(0, self.offset, self.length)


class Frozen(NamedTuple):
    """The interval of a parameter without gradient that this rank holds: at stages 0 to 2, all of it."""

    name: str
    shape: torch.Size  # of the whole parameter
    start: int
    values: Tensor  # [length], a view of the weights that the forward uses


class TeacherWeights(NamedTuple):
    """The result of `Layout.make_teacher`: a copy of the student, or of a part of it, without gradients; and the fp32
    values that are averaged or replaced."""

    network: Any  # the module or engine whose forward gives the targets
    module: nn.Module  # the module inside `network`
    partitions: list[Partition]  # the student's partitions of the module's parameters
    values: list[Tensor]  # the fp32 values [length] of each of these partitions
    sync: Callable[[], None]  # copies `values` into the weights that the forward uses; all ranks call it


class Layout(ABC):
    """The layout in which one ZeRO stage stores a student, made from the student's DeepSpeed engine and its config.

    Attributes:
        partitions: the intervals of the trainable parameters that this rank owns, in the module's parameter order.
    """

    deepspeed_clips_globally = True  # False: clipping by the global norm is left to the caller
    steps_flat_tensors = True  # False: the base optimizer steps the parameters themselves, not tensors that hold many

    def __init__(self, student: Any, ds: dict[str, Any]) -> None:
        self._student, self._ds = student, ds
        self._zero = student.optimizer  # DeepSpeed's ZeRO optimizer; at stage 0 the base optimizer
        self.partitions = self._find_partitions()

    @staticmethod
    def build_module(build: Callable[[], M], ds: dict[str, Any]) -> M:
        """Call `build` and return its module, with parameters as `deepspeed.initialize` needs them at this stage."""
        return build()

    def frozen(self, module: nn.Module) -> list[Frozen]:
        """Return the parameters without gradient of `module`, the student's or the teacher's, each with the interval
        that this rank holds."""
        return [Frozen(n, p.shape, 0, p.data.view(-1)) for n, p in module.named_parameters() if not p.requires_grad]

    @abstractmethod
    def sync_working_weights(self) -> None:
        """Copy the partitions' fp32 values into the weights that the forward uses; needed after they were written from
        outside the optimizer. All ranks call it."""

    @abstractmethod
    def make_teacher(self, build: Callable[[], nn.Module]) -> TeacherWeights:
        """Return a teacher whose trainable parameters equal the student's. All ranks call it.

        Args:
            build: makes a module of the student's architecture, or one that has some of its parameters, by their names.
        """

    def make_frozen(self, build: Callable[[], nn.Module]) -> tuple[Any, nn.Module]:
        """Return a network without gradients of any architecture, and the module inside it, in the student's precision and
        on its device; its values are to be written into `frozen(module)`. All ranks call it.

        Args:
            build: makes the module.
        """
        module = build().requires_grad_(False)
        some = next(self._student.module.parameters())
        return module, module.to(device=some.device, dtype=some.dtype)

    def pending_gradients(self) -> Iterator[Tensor]:
        """Yield this rank's reduced gradients that DeepSpeed has not yet handed to the base optimizer, which it does
        one parameter group at a time. None are pending at stage 0, or where the optimizer is offloaded."""
        for group in self._zero.averaged_gradients.values():
            yield from () if group is None else group

    def sum_over_ranks_(self, measured: Tensor, per_rank: int = 0) -> Tensor:
        """Sum over ranks, in place, what every rank measured on its own partitions [n]; all ranks call it.

        Args:
            per_rank: number of elements at the end of `measured` that are summed at stage 0, too. The others are not
                summed there, because all ranks own every parameter and measure the same.
        """
        return collectives.all_reduce_sum_(measured)

    def hook_gathers(self, networks: Sequence[nn.Module], hook: Callable[..., None]) -> None:
        """Register `hook` to be called before and after each gather of parameters in a forward of these networks. Only
        ZeRO 3 gathers there, so that at other stages this does nothing.

        Args:
            networks: the student's module and the teacher's network.
        """
        return

    def leave_finite_check_to_hooks(self) -> None:
        """Switch off DeepSpeed's own search for NaN, which parallel/gradients.py repeats; not for fp16, nor when DeepSpeed
        clips. It reads all gradients once or twice, and makes the host wait for the GPU four or five times a step."""
        return

    def keep_minimum_loss_scale(self) -> None:
        """Let fp16's dynamic loss scaler stay at its minimum, instead of raising an exception that ends the run."""
        self._zero.loss_scaler.raise_error_at_min_scale = False

    def loss_scale_can_fall(self) -> bool:
        """Return whether fp16's loss scaler is dynamic and above its minimum, so that a step that it skipped lowers the
        scale. At the minimum, or with a static scale, it would skip steps for ever."""
        scaler = getattr(self._zero, "loss_scaler", None)
        return bool(getattr(scaler, "dynamic", False)) and scaler.cur_scale > scaler.min_scale  # type: ignore[union-attr]

    @abstractmethod
    def stepped_tensors(self) -> dict[str, Tensor]:
        """Return the tensor that the base optimizer steps for every trainable parameter, by name. It is there for
        parameters of which this rank owns nothing, too: all ranks step the tensors of the same parameters at once."""

    @abstractmethod
    def _find_partitions(self) -> list[Partition]: ...

    def _partitions_of(self, parameters: dict[str, Any]) -> list[Partition]:
        return [p for p in self.partitions if p.name in parameters]

    def _trainable(self) -> list[tuple[str, Any]]:
        return [(name, p) for name, p in self._student.module.named_parameters() if p.requires_grad]


class ReplicatedLayout(Layout):
    """The layout of ZeRO 0: every rank holds, and steps, all parameters in fp32."""

    deepspeed_clips_globally = False
    steps_flat_tensors = False

    def _find_partitions(self) -> list[Partition]:
        return [Partition(name, p.shape, 0, p.numel(), p, 0) for name, p in self._trainable()]

    def stepped_tensors(self) -> dict[str, Tensor]:
        """Return the parameters themselves, by name."""
        return dict(self._trainable())

    def sync_working_weights(self) -> None:
        """Do nothing: at ZeRO 0, the forward uses the fp32 values themselves."""

    def make_teacher(self, build: Callable[[], nn.Module]) -> TeacherWeights:
        """Return a teacher whose module's parameters are themselves the fp32 EMA."""
        module = _copy_of(self._student.module, build)
        own = dict(module.named_parameters())
        partitions = self._partitions_of(own)
        return TeacherWeights(module, module, partitions, [own[p.name].data.view(-1) for p in partitions], lambda: None)

    def pending_gradients(self) -> Iterator[Tensor]:
        """Yield nothing: at ZeRO 0, the base optimizer has all gradients when it steps."""
        return iter(())

    def sum_over_ranks_(self, measured: Tensor, per_rank: int = 0) -> Tensor:
        """Sum only the last `per_rank` elements over ranks; the others are the same on all ranks already."""
        if per_rank:
            collectives.all_reduce_sum_(measured[-per_rank:])
        return measured


class FlatLayout(Layout):
    """The layout of ZeRO 1 and 2: one flat buffer per parameter group holds all its parameters, and each rank owns an
    interval of every buffer."""

    def _find_partitions(self) -> list[Partition]:
        zero, named = self._zero, self._trainable()
        names = {id(p): name for name, p in named}
        order = {name: i for i, (name, _) in enumerate(named)}
        owned = []
        for group, p, begin in self._places():
            size, flat = zero.partition_size[group], zero.single_partition_of_fp32_groups[group]
            low = dist.get_rank(zero.real_dp_process_group[group]) * size
            first, last = max(begin, low), min(begin + p.numel(), low + size)
            if first < last:
                owned.append(Partition(names[id(p)], p.shape, first - begin, last - first, flat, first - low))
        return sorted(owned, key=lambda partition: order[partition.name])

    def stepped_tensors(self) -> dict[str, Tensor]:
        """Return this rank's fp32 part of the flat buffer in which each trainable parameter lies, by name."""
        names = {id(p): name for name, p in self._trainable()}
        return {names[id(p)]: self._zero.single_partition_of_fp32_groups[group] for group, p, _ in self._places()}

    def sync_working_weights(self) -> None:
        """Write the fp32 values into this rank's interval of every flat buffer, and all-gather the buffers."""
        self._zero.update_lp_params()

    def make_teacher(self, build: Callable[[], nn.Module]) -> TeacherWeights:
        """Return a teacher whose parameters are views of flat buffers with the same layout as the student's; its `sync`
        all-gathers these buffers. A teacher with a part of the student's parameters has parameters of its own, and its
        `sync` gathers one group after the other in a buffer that it frees again."""
        module = _copy_of(self._student.module, build)
        own: dict[str, Any] = dict(module.named_parameters())
        partitions = self._partitions_of(own)
        values = [p.master.clone() for p in partitions]
        names = {id(p): name for name, p in self._trainable()}
        if any(name not in own for name in names.values()):
            return TeacherWeights(module, module, partitions, values, lambda: self._gather_part(own, values))
        buffers = [flat.clone() for flat in self._zero.bit16_groups_flat]
        for group, p, begin in self._places():
            own[names[id(p)]].data = buffers[group].narrow(0, begin, p.numel()).view(p.shape)
        groups = dict(enumerate(buffers))
        return TeacherWeights(module, module, partitions, values, lambda: self._gather(groups, partitions, values))

    def leave_finite_check_to_hooks(self) -> None:
        """Switch off DeepSpeed's search for NaN and its global norm, unless the optimizer is offloaded."""
        if not ds_config.offloads_optimizer(self._ds):
            self._zero.check_grad_overflow = self._zero.compute_grad_norm = False

    def _places(self) -> Iterator[tuple[int, Any, int]]:
        """Yield (number of its group, parameter, offset in the group's flat buffer) for every trainable parameter."""
        for group, params in enumerate(self._zero.bit16_groups):
            flat = self._zero.bit16_groups_flat[group]
            for p in params:
                yield group, p, (p.data_ptr() - flat.data_ptr()) // flat.element_size()

    def _gather(self, buffers: dict[int, Tensor], partitions: list[Partition], values: list[Tensor]) -> None:
        """Copy `values`, one tensor per partition, into this rank's parts of the groups' buffers, and all-gather these.

        Partitions of other groups are skipped.
        """
        by_flat = {id(flat): group for group, flat in enumerate(self._zero.single_partition_of_fp32_groups)}
        world, rank = dist.get_world_size(), dist.get_rank()
        parts = {group: buffer.chunk(world)[rank] for group, buffer in buffers.items()}
        for value, p in zip(values, partitions, strict=True):
            if (group := by_flat[id(p.flat)]) in parts:
                parts[group].narrow(0, p.offset, p.length).copy_(value)
        if world > 1:
            for group, buffer in buffers.items():
                collectives.all_gather_flat(buffer, parts[group].clone())

    def _gather_part(self, own: dict[str, Any], values: list[Tensor]) -> None:
        """Copy `values`, one tensor for each partition of the parameters `own`, from all ranks into these parameters."""
        names = {id(p): name for name, p in self._trainable()}
        partitions = self._partitions_of(own)
        found = [(group, own[names[id(p)]], begin) for group, p, begin in self._places() if names[id(p)] in own]
        for group in sorted({group for group, *_ in found}):
            buffer = torch.empty_like(self._zero.bit16_groups_flat[group])
            self._gather({group: buffer}, partitions, values)
            for of_group, parameter, begin in found:
                if of_group == group:
                    parameter.data.view(-1).copy_(buffer.narrow(0, begin, parameter.numel()))


class PartitionedLayout(Layout):
    """The layout of ZeRO 3: a rank owns an equal part of every parameter, and a layer's parameters are gathered only
    while the layer runs."""

    @staticmethod
    def build_module(build: Callable[[], M], ds: dict[str, Any]) -> M:
        """Call `build` and return its module. DeepSpeed partitions each parameter when it is created, so that no rank
        ever holds the whole module."""
        import deepspeed

        with deepspeed.zero.Init(config_dict_or_path=ds):
            return build()

    def _find_partitions(self) -> list[Partition]:
        owned = []
        for name, p in self._trainable():
            start, length = self._interval(p)
            flat, offset, _ = self._place(p)
            if length:
                owned.append(Partition(name, p.ds_shape, start, length, flat, offset))
        return owned

    def frozen(self, module: nn.Module) -> list[Frozen]:
        """Return the parameters without gradient of `module`, the student's or the teacher's, each with the interval
        that this rank holds."""
        found: list[Frozen] = []
        p: Any
        for name, p in module.named_parameters():
            if not p.requires_grad:
                start, length = self._interval(p)
                found.append(Frozen(name, p.ds_shape, start, p.ds_tensor.data[:length]))
        return found

    def stepped_tensors(self) -> dict[str, Tensor]:
        """Return the flat fp32 tensor that holds this rank's part of each trainable parameter, by name."""
        return {name: self._place(p)[0] for name, p in self._trainable()}

    def sync_working_weights(self) -> None:
        """Copy the fp32 values into this rank's part of every trainable parameter."""
        for _, p in self._trainable():
            flat, offset, length = self._place(p)
            p.ds_tensor.data.copy_(flat.data.narrow(0, offset, length))
        self._zero.invalidate_secondary_tensor()  # with zero_hpz_partition_size, each node keeps a copy of its own

    def make_teacher(self, build: Callable[[], nn.Module]) -> TeacherWeights:
        """Return a teacher that is a ZeRO-3 engine without an optimizer: a rank keeps 1/world of its parameters, and
        the forward gathers them layer by layer."""
        engine, module = self.make_frozen(build)
        own: dict[str, Any] = dict(module.named_parameters())
        partitions = self._partitions_of(own)
        values = [p.master.clone() for p in partitions]

        def sync() -> None:
            for value, p in zip(values, partitions, strict=True):
                own[p.name].ds_tensor.data[: p.length].copy_(value)

        return TeacherWeights(engine, module, partitions, values, sync)

    def make_frozen(self, build: Callable[[], nn.Module]) -> tuple[Any, nn.Module]:
        """Return a ZeRO-3 engine without an optimizer, in which a rank keeps 1/world of the parameters, and its module."""
        import deepspeed

        ds = ds_config.without_optimizer(self._ds)
        module = self.build_module(build, ds).requires_grad_(False)
        engine, *_ = deepspeed.initialize(model=module, config=ds)
        return engine, engine.module

    def hook_gathers(self, networks: Sequence[nn.Module], hook: Callable[..., None]) -> None:
        """Register `hook` before and after DeepSpeed's own forward pre-hook of every layer, in which it gathers."""
        for network in networks:
            for layer in _layers_that_gather(network):
                layer.register_forward_pre_hook(hook, prepend=True)
                layer.register_forward_pre_hook(hook)

    def leave_finite_check_to_hooks(self) -> None:
        """Let DeepSpeed take the global norm of nothing, which is 0 on the host, unless the optimizer is offloaded. At
        stage 3 it has no switch for this."""
        if not ds_config.offloads_optimizer(self._ds):
            nothing = torch.zeros(())
            self._zero._get_norm_groups = lambda: [nothing]

    def _interval(self, p: Any) -> tuple[int, int]:
        """Return start and length of this rank's part of a flattened parameter; the last ranks' can be short or
        empty."""
        start = dist.get_rank(self._zero.dp_process_group) * p.ds_tensor.numel()
        return start, max(0, min(p.ds_tensor.numel(), p.ds_numel - start))

    def _place(self, p: Any) -> tuple[Tensor, int, int]:
        """Return the flat fp32 tensor with this rank's part of a parameter, the part's offset, and its padded
        length."""
        group, offset, length = self._zero.grad_position[self._zero.get_param_id(p)]
        return self._zero.fp32_partitioned_groups_flat[group], offset, length


_LAYOUTS: dict[int, type[Layout]] = {0: ReplicatedLayout, 1: FlatLayout, 2: FlatLayout, 3: PartitionedLayout}


def _layers_that_gather(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and those inside it for which ZeRO 3 gathers parameters: not what is inside a "leaf module", whose
    parameters are gathered at once."""
    from deepspeed.utils import z3_leaf_module

    yield module
    if not z3_leaf_module(module):
        for child in module.children():
            yield from _layers_that_gather(child)


def layout_type(ds: dict[str, Any]) -> type[Layout]:
    """Return the subclass of `Layout` for the ZeRO stage of a filled DeepSpeed config (`ds_config.fill`)."""
    return _LAYOUTS[ds_config.zero_stage(ds)]


def full_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a whole parameter, also of one that ZeRO 3 has partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_tensors(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensor of each parameter that this rank keeps between steps: at ZeRO 3 its part, else the whole."""
    return [getattr(p, "ds_tensor", p) for p in parameters]


def deepspeed_ops() -> dict[str, bool]:
    """Return DeepSpeed's own dict of its compiled operators: name → whether this machine can build it. Setting an entry
    to False keeps DeepSpeed from building that operator."""
    import deepspeed.ops

    # At first use DeepSpeed compiles test programs, and hides the linker's messages by redirecting the descriptor of
    # sys.stderr. In a notebook this is not the descriptor that the linker writes to; sys.__stderr__ has that one.
    with contextlib.redirect_stderr(sys.__stderr__ or sys.stderr):
        return getattr(deepspeed.ops, "__compatible_ops__", {})


def _copy_of(student: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without gradients, with the values, the dtype and the device of the student's parameters."""
    module = build().requires_grad_(False)
    like = dict(student.named_parameters())
    some = next(iter(like.values()))
    module.to(device=some.device, dtype=some.dtype)
    for name, p in module.named_parameters():
        p.data.copy_(like[name].data)
    return module
