"""Construction of student, teacher and optimizer, in the only order that works:

1. Activation checkpointing is set up on the plain trunk, because its wrappers must be inside what ZeRO partitions.
2. DeepSpeed wraps the student (`deepspeed.initialize`): ZeRO, and the training precision with fp32 masters.
3. Initial values are written, parameter by parameter. What initialisers write while ZeRO 3 builds a module would be
   lost silently. The values depend on (name, shape, seed) alone, so they are the same at every stage, world size and
   precision.
4. The teacher is made as a copy of the student, because both must start equal; the Gram teacher (parallel/gram.py), if
   there is one, as a copy of the teacher. A frozen teacher (parallel/frozen_teacher.py) has weights of its own.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from esvit_scale import ranges
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models import window_attention_implementations
from esvit_scale.models.distributions import Initializer
from esvit_scale.models.initialize import initial_value, initial_values
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective import prototype_passes
from esvit_scale.objective.costs import weight_dtype
from esvit_scale.objective.network import (
    Network,
    build_frozen_teacher,
    build_gram_network,
    build_network,
    build_student,
    build_teacher,
)
from esvit_scale.objective.param_groups import (
    TRUNK,
    hidden_matrices,
    kind_of,
    largest_of_each_part,
    lr_scale,
    optimizer_groups,
)
from esvit_scale.objective.registry import check_local_batch
from esvit_scale.parallel import activation_checkpointing, compilation, ds_config, optimizers, zero
from esvit_scale.parallel.buffers import cast_buffers_to_fp32, persistent_buffers
from esvit_scale.parallel.ema import Teacher
from esvit_scale.parallel.frozen_teacher import FrozenTeacher
from esvit_scale.parallel.gradients import GradientClipper
from esvit_scale.parallel.gram import GramTeacher
from esvit_scale.parallel.muon import Muon
from esvit_scale.parallel.world import World
from esvit_scale.parallel.zero import Layout, Partition


class Engines(NamedTuple):
    """Student and teacher, ready to train, with the optimizer, the gradient clipper and the student's ZeRO layout."""

    student: Any  # deepspeed.DeepSpeedEngine
    optimizer: torch.optim.Optimizer  # the base optimizer, which ZeRO steps
    group_of: dict[str, str]  # trainable parameter → its group's name
    teacher: Teacher
    gram: GramTeacher | None  # None without Gram anchoring
    frozen: FrozenTeacher | None  # None unless the objective distils
    clipper: GradientClipper
    layout: Layout  # of the student, at the run's ZeRO stage
    dtype: torch.dtype  # of the weights that the forward uses
    moments: dict[str, tuple[str, ...]]  # group → names of the tensors kept per parameter, such as `exp_avg`
    lr_scales: dict[str, float]  # group → factor of its learning rate (`optim.trunk_rate`, `optim.layer_decay`)

    @property
    def partitions(self) -> list[Partition]:
        """The intervals of the student's trainable parameters that this rank owns, in the module's parameter order."""
        return self.layout.partitions

    @property
    def networks(self) -> list[nn.Module]:
        """The student's module, and the networks whose forwards give it targets."""
        others = [teacher.network for teacher in (self.gram, self.frozen) if teacher is not None]
        return [self.student.module, self.teacher.network, *others]


def build(config: Config, world: World, given: dict[str, Tensor], of_teacher: dict[str, Tensor]) -> Engines:
    """Build student, teacher and optimizer, wrap them in DeepSpeed and write their initial values.

    Args:
        given: fp32 values to start from, by the name of a parameter or running statistic; those that are not named are
            drawn by the initialisers of models/initialize.py.
        of_teacher: fp32 values of the frozen teacher, by name; empty without one.

    Raises:
        UserError: trunk, objective, crops and batch do not fit each other, the DeepSpeed config contradicts the run
            config (see ds_config.fill), or the precision needs a GPU that this machine does not have.
    """
    import deepspeed

    meta = _network_on_meta(config, world.size)
    ds = ds_config.fill(config, world.size)
    ds_config.fit_reduction_bucket(ds, sum(p.numel() for p in meta.parameters() if p.requires_grad))
    if config.train.compile:
        blocks = [block for trunk in meta.trunks for block in trunk.blocks]
        ds_config.gather_whole(ds, [name for name, m in meta.named_modules() if any(m is b for b in blocks)])
    if config.train.precision == "fp16" and world.device.type == "cpu":
        raise UserError("train.precision=fp16: needs a GPU; on a CPU use bf16 or fp32")
    layout_type = zero.layout_type(ds)
    module = layout_type.build_module(lambda: build_student(config), ds)
    in_autocast = world.device.type if config.train.precision == "autocast" else None
    for trunk in module.trunks:
        activation_checkpointing.apply(trunk, config.train.activation_checkpointing, in_autocast)
    matrices = hidden_matrices(meta.trunks, meta) if config.optim.name == "muon" else []
    groups = optimizer_groups(meta, meta.trunk, config.optim, {m.name for m in matrices})
    optimizer = optimizers.build(config.optim, _param_groups(module, groups), layout_type.steps_flat_tensors)
    student, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds, dist_init_required=False)
    layout = layout_type(student, ds)
    if config.train.precision == "fp16":
        layout.keep_minimum_loss_scale()
    elif not ds["gradient_clipping"]:
        layout.leave_finite_check_to_hooks()
    _initialise(student.module, layout, config.seed, initial_values(meta), given)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if isinstance(optimizer, optimizers.LayerWise):
        optimizer.own(layout.partitions, names, layout.sum_over_ranks_)
    if isinstance(optimizer, Muon):
        optimizer.own(matrices, layout.partitions, layout.stepped_tensors(), world.device)
    watched = list(largest_of_each_part(meta).values())
    clip, clip_by = config.optim.clip, config.optim.clip_by
    clipper = GradientClipper(optimizer, layout, names, watched, clip, clip_by, world.device)
    teacher = Teacher(student.module, layout, lambda: build_teacher(config))
    gram, start = None, config.objective.gram_start
    if config.objective.gram_weight and start is not None:
        make = lambda: build_gram_network(config)  # noqa: E731
        gram = GramTeacher(student.module, teacher, layout, make, start, config.objective.gram_every)
    frozen = None
    if meta.objective.has_frozen_teacher:
        frozen = FrozenTeacher(layout, lambda: build_frozen_teacher(config, meta.objective), of_teacher)
    group_of = {name: group for group, members in groups.items() for name in members}
    moments = {group: optimizers.moments(config.optim.name, group) for group in groups}
    scales = {group: lr_scale(group, meta.trunk, config.optim) for group in groups}
    engines = Engines(
        *(student, optimizer, group_of, teacher, gram, frozen, clipper, layout, weight_dtype(config), moments, scales)
    )
    if config.train.compile:
        for network in engines._replace(frozen=None).networks:  # its blocks are not those that ZeRO 3 gathers whole
            for trunk in _trunks(network):
                compilation.apply(trunk, world.device)
    return engines


def use_implementations(engines: Engines, attention: str, prototype_loss: str) -> None:
    """Let the networks compute window attention and the loss over prototypes with the implementations of these names."""
    for network in engines.networks:
        for trunk in _trunks(network):
            trunk.use_attention(window_attention_implementations.implementation(attention))
    for objective in engines.student.module.objectives:
        if objective.passes is not None:
            objective.passes = prototype_passes.implementation(prototype_loss)


def _trunks(network: nn.Module) -> list[Trunk]:
    return cast(list[Trunk], network.trunks)


def set_lr_and_weight_decay(engines: Engines, lr: float, trunk_lr: float, weight_decay: float) -> None:
    """Set the learning rate of all parameter groups, and the weight decay of those that decay, for the next step.

    Args:
        trunk_lr: learning rate of the trunk, where it has groups of its own; each has it times its `lr_scales`.
    """
    for group in engines.student.optimizer.param_groups:
        name = group["name"]
        group["lr"] = (trunk_lr if name.startswith(TRUNK) else lr) * engines.lr_scales[name]
        group["weight_decay"] = 0.0 if kind_of(name) == "no_decay" else weight_decay


@ranges.named("optimizer step")
def take_step(
    engines: Engines,
    loss: Tensor,
    *,
    freeze_last_layer: bool,
    measure_updates: bool,
    flags: int = 0,
    freeze_trunk: bool = False,
) -> bool:
    """Step the optimizer if the backward before was that of a step's last micro-batch; call it after every backward.

    Args:
        loss: this rank's loss, summed over the micro-batches so far.
        freeze_last_layer: keep the prototypes and their optimizer state as they are.
        measure_updates: measure how far the weights move (`GradientClipper.take_changes`).
        flags: this rank's flags for all ranks (`GradientClipper.take_flags`).
        freeze_trunk: keep the trunk and its optimizer state as they are (`optim.freeze_trunk_steps`).

    Returns:
        True when the weights moved: the loss and all gradients were finite on every rank.
    """
    engines.clipper.prepare(loss, freeze_last_layer, measure_updates, flags, freeze_trunk)
    engines.student.step()
    return bool(engines.student.was_step_applied()) and engines.clipper.take_finite()


def loss_scale_can_fall(engines: Engines) -> bool:
    """Return whether a skipped step lowers the fp16 loss scale, in which case the run need not react to the skip."""
    return engines.layout.loss_scale_can_fall()


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Return the bf16 autocast context for a teacher's forward (disabled unless `train.precision` is autocast);
    DeepSpeed enters one for the student's forward itself."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "autocast")


def _network_on_meta(config: Config, world_size: int) -> Network:
    """Build the network on the meta device, where it occupies no memory and shows the full parameter shapes, which ZeRO
    3 hides in the student. Raise UserError if the batch does not fit the objective."""
    with torch.device("meta"):
        network = build_network(config)
    check_local_batch(network.objective, config, world_size)
    return network


def _param_groups(module: nn.Module, groups: dict[str, list[str]]) -> list[dict[str, Any]]:
    parameters = dict(module.named_parameters())
    return [{"name": name, "params": [parameters[n] for n in names]} for name, names in groups.items() if names]


@torch.no_grad()
def _initialise(
    student: nn.Module, layout: Layout, seed: int, initializers: dict[str, Initializer], given: dict[str, Tensor]
) -> None:
    """Write initial values into this rank's intervals of the parameters and into the running statistics: those `given`
    by name, else those that the initializers draw."""

    def value(name: str, shape: torch.Size) -> Tensor:
        return (given[name] if name in given else initial_value(name, initializers[name], shape, seed)).view(-1)

    for p in layout.partitions:
        p.master.copy_(value(p.name, p.shape)[p.start : p.start + p.length])
    for f in layout.frozen(student):
        f.values.copy_(value(f.name, f.shape)[f.start : f.start + len(f.values)])
    layout.sync_working_weights()
    cast_buffers_to_fp32(student)
    for name, buffer in persistent_buffers(student).items():
        buffer.copy_(given.get(name, buffer))
