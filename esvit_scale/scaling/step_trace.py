"""A training step without numbers: the kernels it launches, its peak of memory, and what ranks say to each other.

The real networks run forward and backward on the meta device, where tensors have shapes and no values, at the size of one
rank's micro-batch. A dispatch mode sees every operation of torch on the way: its FLOPs, the bytes it reads and writes, and
the storages it allocates, which are counted until they are freed. Collectives of the loss run as in a world of the given
size (`collectives.pretend`). What DeepSpeed does around the networks is not traced, because its engines need real
tensors; traffic.py and roofline.py model it.

An operation of torch is taken for one kernel, as it is on a GPU without torch.compile. On a GPU window attention and the
loss over prototypes run in fused kernels, which are counted by what they must read, write and multiply.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from esvit_scale.config import Config
from esvit_scale.data.mixing import mix_labels
from esvit_scale.models import recomputation
from esvit_scale.models import traced as models_traced
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.windows import WindowPlan
from esvit_scale.objective.costs import Checkpointing, weight_dtype
from esvit_scale.objective.network import (
    StudentNetwork,
    build_frozen_teacher,
    build_gram_network,
    build_student,
    build_teacher,
)
from esvit_scale.objective.prototype_passes import Expectations, Passes, Side
from esvit_scale.objective.prototype_tiles import GPU_TILE_SHARE, NARROWEST_TILE, TilePasses
from esvit_scale.parallel import activation_checkpointing, collectives
from esvit_scale.scaling import memory

TEACHER, STUDENT, LOSS, RECOMPUTE, BACKWARD = (
    "teacher's forward",
    "student's forward",
    "student's heads and loss",
    "recomputation",
    "backward",
)
PRODUCTS, ATTENTION, OTHERS = "matrix products", "window attention", "elementwise operations and copies"
TEACHER_TEMP = 0.07  # any value: costs do not depend on it


class Kernel(NamedTuple):
    """The costs of one launch of a kernel."""

    phase: str
    kind: str
    flops: int
    bytes: int  # read and written


class Layer(NamedTuple):
    """A module with parameters of its own, as a forward calls it."""

    name: str
    sizes: list[int]  # elements of each of its own parameters
    checkpointed: bool  # whether the backward computes it again


class StepTrace(NamedTuple):
    """What one rank does in one micro-batch, and what it holds in memory beside weights, gradients and optimizer."""

    kernels: Counter[Kernel]
    collectives: list[tuple[str, int]]  # kind and bytes of the loss's own in a micro-batch
    of_statistics: list[tuple[str, int]]  # the same of what the objective keeps (centres), once a step
    peaks: memory.Peaks
    teacher: list[Layer]  # in the order of their calls in the forwards of teachers
    student: list[Layer]


class Kernels(NamedTuple):
    """Which implementations a step is traced with."""

    fused_attention: bool  # window attention in one kernel, else written out
    fused_prototypes: bool  # the loss over prototypes in fused kernels, else on tiles of logits
    tile_bytes: int | None  # of a tile of logits; None: as on a CPU


def kernels_on_gpu(config: Config, capacity: int) -> Kernels:
    """Return the implementations that a run of the config is expected to have on a GPU of `capacity` bytes."""
    half = config.train.precision in ("bf16", "fp16")
    return Kernels(
        config.model.attention in ("triton", "flex", "sdpa") or (config.model.attention == "auto" and half),
        memory.resolves_to_triton(config),
        capacity // GPU_TILE_SHARE,
    )


ON_CPU = Kernels(False, False, None)


def trace(config: Config, ranks: int, checkpointing: Checkpointing, kernels: Kernels) -> StepTrace:
    """Trace one micro-batch of the config on one of so many ranks.

    Args:
        checkpointing: what activation checkpointing keeps.
        kernels: the implementations of attention and loss.

    Raises:
        UserError: the networks cannot be built.
    """
    images = config.train.global_batch // ranks // config.train.grad_accum
    said: list[tuple[str, int]] = []
    recorder = _Recorder()
    with torch.device("meta"), collectives.pretend(ranks, lambda kind, count: said.append((kind, count))):
        student, teachers = _networks(config, checkpointing, kernels, recorder)
        _run(config, images, student, teachers, recorder)
        in_batch = len(said)
        for objective in student.objectives:
            objective.commit()
    return StepTrace(
        recorder.kernels,
        said[:in_batch],
        said[in_batch:],
        recorder.peaks(),
        recorder.layers_of_teacher,
        recorder.layers_of_student,
    )


class _Teachers(NamedTuple):
    """The networks whose forwards give the student's targets and anchors."""

    targets: nn.Module | None
    anchors: nn.Module | None


def _networks(
    config: Config, checkpointing: Checkpointing, kernels: Kernels, recorder: "_Recorder"
) -> tuple[StudentNetwork, _Teachers]:
    """Build the config's networks on the meta device, in training precision and with the chosen implementations."""
    dtype = weight_dtype(config)
    student = build_student(config).to(dtype)
    targets: nn.Module | None = None
    if student.objective.has_frozen_teacher:
        targets = build_frozen_teacher(config, student.objective)
    elif student.objective.has_teacher:
        targets = build_teacher(config)
    anchors = build_gram_network(config) if config.objective.gram_weight else None
    for network in (targets, anchors):
        if network is not None:
            network.to(dtype).requires_grad_(False)
    implementation: activation_checkpointing.Implementation = "torch" if checkpointing == "full" else checkpointing
    for trunk in student.trunks:
        activation_checkpointing.apply(trunk, implementation)
    attend = recorder.attend
    for network in (student, targets, anchors):
        for trunk in [] if network is None or not kernels.fused_attention else network.trunks:  # type: ignore[union-attr]
            trunk.use_attention(attend)
    for objective in student.objectives:
        if objective.passes is not None:
            objective.passes = _FusedPasses(recorder) if kernels.fused_prototypes else _Tiles(kernels.tile_bytes)
    return student, _Teachers(targets, anchors)


def _run(config: Config, images: int, student: StudentNetwork, teachers: _Teachers, recorder: "_Recorder") -> None:
    """Run the forwards and the backward of one micro-batch under the recorder."""
    sizes, dtype = config.crop_sizes, weight_dtype(config)
    channels = student.trunk.in_chans
    crops = [torch.empty(images * sizes.count(s), channels, s, s, dtype=dtype) for s in dict.fromkeys(sizes)]
    keys = drop_keys(0, 0, torch.arange(images), len(sizes) + sum(config.signal_views.values()))
    signals = models_traced.example_signals(config, images)
    beside: list[Any] = [signals, torch.empty(images, dtype=torch.bool)] if signals else []
    blocks = {id(block) for trunk in student.trunks for block in trunk.blocks}
    with torch.no_grad():  # makes the tables that trunks keep, which are not part of a step
        for trunk in student.trunks:
            trunk(crops, keys, *beside[:1])
        for network in teachers:
            if network is not None:
                network.trunk(crops[:1])  # type: ignore[operator,union-attr]
    with recorder.follow(student, blocks, recorder.layers_of_student), recorder, models_traced.FusedAttention():
        targets: Any = None
        anchors = None
        recorder.phase = TEACHER
        with torch.no_grad():
            if student.objective.takes_labels:
                targets = mix_labels(torch.zeros(images, dtype=torch.int64), None)
            if teachers.targets is not None:
                with recorder.follow(teachers.targets, set(), recorder.layers_of_teacher):
                    targets = teachers.targets(crops[:1], *beside)
            if teachers.anchors is not None:
                with recorder.follow(teachers.anchors, set(), recorder.layers_of_teacher):
                    anchors = teachers.anchors(crops[:1])
        recorder.phase = STUDENT
        loss, *_ = student(crops, targets, keys, TEACHER_TEMP, anchors, *beside)
        recorder.end_forward()
        loss.backward()


class _Event(NamedTuple):
    """An allocation, or the end of a storage as an activation."""

    number: int  # of the storage
    bytes: int  # negative at its end
    is_gradient: bool = False  # whether it ends because it holds a gradient of a parameter


class _Recorder(TorchDispatchMode):
    """A mode that notes every kernel, and follows the bytes of floating-point storages that live at each time."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = TEACHER
        self.kernels: Counter[Kernel] = Counter()
        self.layers_of_teacher: list[Layer] = []
        self.layers_of_student: list[Layer] = []
        self._events: list[_Event] = []
        self._backward = 0  # index of the backward's first event
        self._storages: dict[int, tuple[int, int]] = {}  # storage → its number and bytes, while it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation and note its kernel and the storages of its results."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if func.is_view or func is torch.ops.aten.detach.default:
            return result
        for output in outputs:
            self._allocated(output)
        if not func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            touched = inputs + [x for x in outputs if all(x is not given for given in inputs)]
            flops = _flops(func, args, kwargs, result)
            self.note(PRODUCTS if flops else OTHERS, flops, sum(map(_bytes, touched)))
        return result

    def note(self, kind: str, flops: int, count: int) -> None:
        """Note the launch of a kernel that reads and writes `count` bytes."""
        phase = RECOMPUTE if recomputation.is_recomputing() else self.phase
        self.kernels[Kernel(phase, kind, flops, count)] += 1

    def end_forward(self) -> None:
        """Take what has come for the forward, and what follows for the backward."""
        self._backward, self.phase = len(self._events), BACKWARD

    def peaks(self) -> memory.Peaks:
        """Return the peaks of memory. Storages that are still there are none of a step's activations, and are left out:
        the tables that trunks make once and keep."""
        kept = {number for number, _ in self._storages.values()}
        live = gradients = forward = backward = with_gradients = 0
        for i, event in enumerate(self._events):
            if i == self._backward:
                backward = with_gradients = live
            if event.number in kept:
                continue
            live += event.bytes
            gradients += -event.bytes if event.is_gradient else 0
            if i < self._backward:
                forward = max(forward, live)
            else:
                backward, with_gradients = max(backward, live), max(with_gradients, live + gradients)
        return memory.Peaks(forward, backward, with_gradients)

    def attend(self, qkv: Tensor, table: Tensor, plan: WindowPlan) -> Tensor:
        """Compute window attention as a fused kernel would: without numbers, and with its costs noted."""
        return _FusedWindows.apply(qkv, table, plan.window**2, self)

    @contextmanager
    def follow(self, network: nn.Module, blocks: set[int], layers: list[Layer]) -> Iterator[None]:
        """Within the context, note the calls of the network's layers, and which gradients are complete.

        Args:
            blocks: identities of the modules that activation checkpointing runs as one.
        """
        inside = [0]
        handles = []
        for name, module in network.named_modules():
            handles += self._hooks(name, module, id(module) in blocks, inside, layers)
        if isinstance(network, StudentNetwork):
            for objective in network.objectives:
                handles.append(objective.register_forward_pre_hook(lambda *_: self._set(LOSS)))
                handles.append(objective.register_forward_hook(lambda *_: self._set(STUDENT)))
            for p in network.parameters():
                if p.requires_grad:
                    handles.append(p.register_post_accumulate_grad_hook(self._became_gradient))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str, module: nn.Module, block: bool, inside: list[int], layers: list[Layer]) -> list[Any]:
        sizes = [p.numel() for p in module.parameters(recurse=False)]

        def before(*_: Any) -> None:
            inside[0] += block
            if sizes and not recomputation.is_recomputing():
                layers.append(Layer(name, sizes, inside[0] > 0))

        def after(*_: Any) -> None:
            inside[0] -= block

        found: list[Any] = [module.register_forward_pre_hook(before)]
        if block:
            found.append(module.register_forward_hook(after, always_call=True))
        return found

    def _set(self, phase: str) -> None:
        self.phase = phase

    def _allocated(self, x: Tensor) -> None:
        if not x.is_floating_point():
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = (len(self._events), storage.nbytes())
            self._events.append(_Event(len(self._events), storage.nbytes()))
            weakref.finalize(storage, self._ended, key)

    def _became_gradient(self, p: Tensor) -> None:
        if p.grad is not None:
            self._ended(p.grad.untyped_storage()._cdata, is_gradient=True)

    def _ended(self, key: int, is_gradient: bool = False) -> None:
        """Note that a storage was freed, or holds a gradient from now on."""
        if key in self._storages:
            number, count = self._storages.pop(key)
            self._events.append(_Event(number, -count, is_gradient))


def _bytes(x: Tensor) -> int:
    """Return the bytes of a tensor that an operation reads or writes; those of an expanded one count once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
}


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the FLOPs of an operation; 0 if it is no product."""
    packet = func._overloadpacket
    if packet in _FLOPS:
        return int(_FLOPS[packet](*args, **kwargs))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0


class _FusedWindows(torch.autograd.Function):
    """Window attention as one kernel for the forward and one for the backward, which computes the scores again."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, table: Tensor, length: int, recorder: _Recorder) -> Tensor:
        slots, width = len(qkv), qkv.shape[1] // 3
        out = qkv.new_empty(slots, width)
        ctx.save_for_backward(qkv, table, out)
        ctx.length, ctx.recorder = length, recorder
        recorder.note(ATTENTION, 4 * slots * length * width, qkv.nbytes + out.nbytes + table.nbytes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, table, out = ctx.saved_tensors
        ctx.recorder.note(
            ATTENTION, 10 * out.shape[0] * ctx.length * out.shape[1], 2 * qkv.nbytes + 2 * out.nbytes + 2 * table.nbytes
        )
        return torch.empty_like(qkv), torch.empty_like(table), None, None


class _Tiles(TilePasses):
    """The passes over tiles of logits, with tiles of so many bytes, whatever the device is."""

    def __init__(self, tile_bytes: int | None) -> None:
        super().__init__()
        self._bytes = tile_bytes

    def _tile_for(self, *sides: Side) -> int:
        if self._bytes is None:
            return super()._tile_for(*sides)
        tokens = sum(len(side.z) for side in sides)
        return max(self._bytes // (4 * tokens) // NARROWEST_TILE, 1) * NARROWEST_TILE


class _FusedPasses(Passes):
    """The passes as fused kernels, whose tiles never reach memory; their costs are noted."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder

    def log_sum_exp(self, side: Side) -> Tensor:
        """Note one product of tokens and prototypes."""
        self._note(2, side, side.z.new_empty(len(side.z), dtype=torch.float32))
        return side.z.new_empty(len(side.z), dtype=torch.float32)

    def column_log_sum_exp(self, side: Side, added: Tensor) -> Tensor:
        """Note one product of prototypes and tokens."""
        self._note(2, side, added)
        return added.new_empty(len(side.rows))

    def expectations(self, student: Side, teacher: Side, towards: Tensor, with_grad_rows: bool) -> Expectations:
        """Note logits and means of both sides, and logits and the prototypes' gradient in a second pass."""
        of_s, of_t = (side.z.new_empty(side.z.shape, dtype=torch.float32) for side in (student, teacher))
        self._note(4, student, of_s)
        self._note(4, teacher, of_t)
        grad_rows = torch.empty_like(student.rows) if with_grad_rows else None
        for side in (student, teacher):
            self._note(4 if with_grad_rows else 2, side, side.z)
        scalar = of_s.new_empty(())
        return Expectations(of_s[:, 0], of_s, of_t, grad_rows, scalar, scalar, scalar)

    def _note(self, per_logit: int, side: Side, written: Tensor) -> None:
        (n, d), k = side.z.shape, len(side.rows)
        self._recorder.note(PRODUCTS, per_logit * n * k * d, side.z.nbytes + side.rows.nbytes + written.nbytes)
