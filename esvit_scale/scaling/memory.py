"""Estimate of a rank's memory, part by part, at each ZeRO stage: computed from the config, checked against real steps.

The state in bytes, with P parameters of trunk and heads (padded as ZeRO pads them), e = 2 bytes in bf16 and 4 in fp32,
and W ranks (parallel/zero.py and ema.py say how it is stored):

    stage      parameters   masters    moments    EMA       teacher    gradients
    0 (fp32)   4P           –          8P         4P        the EMA    4P
    1, 2       eP           4P/W       8P/W       4P/W      eP         eP/W
    3          eP/W         4P/W       8P/W       4P/W      eP/W       eP/W

Gram anchoring adds a second teacher, of the trunk alone, with T parameters: 4T at stage 0, eT + 4·min(T, P/W) at stages
1 and 2, where the first ranks own the trunk, and (e + 4)T/W at stage 3. A frozen teacher of F parameters takes eF at
stages 0 to 2 and eF/W at stage 3.

With gradient accumulation, bf16 and fp16 gradients are summed in fp32, 4P/W at stages 1 to 3 (stage 1 then runs as
stage 2; parallel/ds_config.py says why).

The moments are AdamW's; Muon keeps 4P/W for its matrices, and so do SGD and LARS for everything. They are allocated in
the first step. The peak is the state plus the largest of three phases: the forward
(activations, loss workspace), the backward (activations, gradients, the reduction bucket, gathered parameters) and the
optimizer's step (the flattened gradient of one parameter group and its fp32 copy). benchmarks/plan.py measures the sum.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from esvit_scale.config import Config
from esvit_scale.models.heads import Prototypes
from esvit_scale.objective import costs
from esvit_scale.objective.costs import Checkpointing
from esvit_scale.objective.network import Network, build_frozen_teacher, build_network
from esvit_scale.objective.param_groups import MATRICES, TRUNK, hidden_matrices, kind_of, optimizer_groups
from esvit_scale.objective.prototype_passes import LARGEST_BOTTLENECK
from esvit_scale.objective.prototype_tiles import CPU_TILE_BYTES, GPU_TILE_SHARE
from esvit_scale.parallel import optimizers
from esvit_scale.parallel.ds_config import BUCKET, ZeroSizes, accumulates_in_fp32, zero_sizes

START_ALIGNMENT = 2  # stages 1 and 2 pad a group to a multiple of this many elements per rank


class ElementCounts(NamedTuple):
    """Numbers of trainable elements of the student, by parameter group, block and head."""

    groups: dict[str, list[int]]  # parameter group → the number of elements of each of its parameters
    moments: dict[str, int]  # parameter group → how many tensors of a parameter's size the optimizer keeps
    trunk: dict[str, list[int]]  # `groups` of the trunk alone
    blocks: list[int]  # number of elements of each block of the trunks
    heads: int
    prototypes: list[int]  # number of elements of each prototype layer
    frozen: list[int]  # number of elements of each parameter of a frozen teacher

    @property
    def total(self) -> int:
        """Return the number of all trainable elements."""
        return sum(sum(sizes) for sizes in self.groups.values())

    @property
    def matrices(self) -> int:
        """Return the number of elements of the matrices that Muon orthogonalises, 0 for other optimizers."""
        return sum(sum(sizes) for name, sizes in self.groups.items() if kind_of(name) == MATRICES)


class Memory(NamedTuple):
    """Bytes on one rank: first the lasting parts, then the temporary ones, then the sum of each phase of a step."""

    parameters: int
    masters: int
    moments: int
    ema: int
    teacher: int  # the teacher's working copy of its weights
    gram: int  # the Gram teacher's fp32 values and working copy; 0 without Gram anchoring
    frozen: int  # the weights of a frozen teacher; 0 without one
    gradients: int  # this rank's gradients, kept from the backward to the step
    buckets: int  # buffers in which gradients are reduced
    gathered: int  # parameters that are temporarily gathered (stage 3)
    activations: int  # kept for the backward, including the crops
    loss: int  # workspace of the fused cross-entropy
    forward_phase: int
    backward_phase: int
    step_phase: int

    @property
    def state(self) -> int:
        """Return the bytes that stay allocated between steps, except stage 3's gradients and reduction bucket."""
        return self.parameters + self.masters + self.moments + self.ema + self.teacher + self.gram + self.frozen

    @property
    def at_start(self) -> int:
        """Return the bytes of the state before the first step, which allocates the moments."""
        return self.state - self.moments

    @property
    def peak(self) -> int:
        """Return the peak bytes of a step: the state plus the largest phase."""
        return self.state + max(self.forward_phase, self.backward_phase, self.step_phase)


def network_of(config: Config) -> ElementCounts:
    """Count the trainable elements of a config's network, built on the meta device without memory.

    Raises:
        UserError: a trunk that cannot be built.
    """
    with torch.device("meta"):
        network = build_network(config)
    muon = config.optim.name == "muon"
    matrices = {m.name for m in hidden_matrices(network.trunks, network)} if muon else set()
    parameters = dict(network.named_parameters())
    sizes: dict[str, list[int]] = {}
    trunk: dict[str, list[int]] = {}
    for group, names in optimizer_groups(network, network.trunk, config.optim, matrices).items():
        sizes[group] = [parameters[name].numel() for name in names]
        if of_trunk := [parameters[name].numel() for name in names if name.startswith(TRUNK)]:
            trunk[group] = of_trunk
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    prototypes = [m.weight_v.numel() for o in network.objectives for m in o.modules() if isinstance(m, Prototypes)]
    moments = {group: len(optimizers.moments(config.optim.name, group)) for group in sizes}
    blocks = [count(block) for trunk in network.trunks for block in trunk.blocks]
    return ElementCounts(
        *(sizes, moments, trunk, blocks, sum(map(count, network.objectives)), prototypes),
        _of_frozen(config, network),
    )


def _of_frozen(config: Config, network: Network) -> list[int]:
    """Return the number of elements of each parameter of the config's frozen teacher; empty without one."""
    if not network.objective.has_frozen_teacher:
        return []
    with torch.device("meta"):
        return [p.numel() for p in build_frozen_teacher(config, network.objective).parameters()]


class Peaks(NamedTuple):
    """Peaks of one rank's memory in a traced step (step_trace.py) beside weights, gradients, optimizer and crops, in bytes."""

    forward: int
    backward: int
    backward_with_gradients: int


class _Demand(NamedTuple):
    """The inputs that the memory estimate needs at every ZeRO stage; sizes are bytes on one rank."""

    network: ElementCounts
    ranks: int
    element: int  # bytes of one working weight, activation or gradient
    summed_element: int  # bytes of one gradient element between the backward and the step
    on_cpu: bool
    pixels: int  # bytes of the crops
    activations: int  # kept for the backward, including the crops, and what a block keeps while it is recomputed
    held: int  # the part of them that is there at the end of the forward
    loss: int  # workspace of the fused cross-entropy
    early: int  # peak of the activations during the backward
    late: int  # peak of the activations plus the gradients computed so far
    gram: dict[str, list[int]]  # parameter group → the number of elements of each parameter of the Gram teacher
    sizes: ZeroSizes  # of buffers, and of what stage 3 keeps gathered

    @property
    def bucket(self) -> int:
        """Return the bytes of the reduction bucket; on a CPU, of the part of it that is written."""
        elements = self.sizes.bucket(self.network.total)
        return self.element * (min(elements, self.network.total) if self.on_cpu else elements)

    @property
    def reduces_early(self) -> bool:
        """Return whether the reduction bucket is full, and is reduced, before the backward ends."""
        return self.network.total > self.sizes.bucket(self.network.total)

    @property
    def left_at_reduction(self) -> int:
        """Return the bytes of activations and crops that are still allocated while gradients are reduced.

        If all gradients fit into one bucket, it is reduced at the end of the backward, when only the crops are left;
        otherwise the first reduction comes early, and all activations are counted.
        """
        return self.activations if self.reduces_early else self.pixels

    def moments(self, groups: dict[str, int]) -> int:
        """Return the bytes of the optimizer's averages of the gradients, for parameter groups of so many elements."""
        return 4 * sum(self.network.moments[name] * elements for name, elements in groups.items())

    @property
    def exchanged(self) -> int:
        """Return the bytes in which Muon sends and receives intervals of matrices, and of the matrices that a rank owns."""
        return 12 * -(-self.network.matrices // self.ranks)

    def flattened(self, largest: int) -> int:
        """Return the bytes of the optimizer step's copies of the gradient of one parameter group of `largest` elements.

        They are a flat copy in the gradient's dtype, if that is not fp32, and one in fp32.
        """
        return (self.summed_element if self.summed_element < 4 else 0) * largest + 4 * largest


def memory(
    config: Config,
    network: ElementCounts,
    stage: int,
    ranks: int,
    checkpointing: Checkpointing,
    on_cpu: bool = False,
    capacity: int = 80 * 10**9,
    traced: Peaks | None = None,
) -> Memory:
    """Return the bytes of each part of memory on one rank at a ZeRO stage.

    Args:
        network: the numbers of elements, from `network_of`.
        checkpointing: what activation checkpointing keeps.
        on_cpu: estimate resident memory on a CPU with gloo: a bucket counts as far as it is written, and gloo copies what
            it scatters.
        capacity: bytes of one GPU; the loss on tiles takes a fraction of them as workspace.
        traced: peaks of forward and backward to take in place of those that are estimated from the blocks' activations.
    """
    e = 2 if config.train.precision in ("bf16", "fp16") else 4
    images = config.train.global_batch // ranks // config.train.grad_accum
    pixels = _pixel_bytes(config, images, e)
    activations = costs.activation_bytes(config, checkpointing).total(images) + pixels
    held = costs.bytes_after_forward(config, checkpointing).total(images) + pixels
    tile = CPU_TILE_BYTES if on_cpu else 0 if resolves_to_triton(config) else capacity // GPU_TILE_SHARE
    loss = _loss_workspace(network, e, tile)
    early, late = backward_peaks(config, network, images, checkpointing, pixels, e)
    if traced is not None:
        held, early, late = (pixels + peak for peak in traced)
        held -= loss  # the sum of both is what counts
    summed = 4 if accumulates_in_fp32(config) else e
    gram = network.trunk if config.objective.gram_weight else {}
    return _AT_STAGE[stage](
        _Demand(
            network, ranks, e, summed, on_cpu, pixels, activations, held, loss, early, late, gram, zero_sizes(config)
        )
    )


def _replicated(d: _Demand) -> Memory:
    """Return the memory at stage 0: everything is fp32 and whole on every rank.

    The EMA weights are the teacher's, without another copy; gradients are reduced in flat copies after the backward.
    """
    whole, bucket = d.network.total, 4 * min(d.network.total, BUCKET)
    moments = d.moments({name: sum(sizes) for name, sizes in d.network.groups.items()})
    return Memory(
        *(4 * whole, 0, moments, 4 * whole, 0, 4 * sum(map(sum, d.gram.values())), 4 * sum(d.network.frozen)),
        *(4 * whole, bucket, 0, d.activations, d.loss),
        forward_phase=d.held + d.loss,
        backward_phase=max(d.early, d.late),
        step_phase=4 * whole + bucket + d.exchanged + 8 * d.network.matrices,
    )


def _flat(d: _Demand) -> Memory:
    """Return the memory at stages 1 and 2: every rank has all working weights of student and teacher.

    The rest is partitioned over the ranks in flat buffers with padding.
    """
    multiple = START_ALIGNMENT * d.ranks
    groups = {name: -(-sum(sizes) // multiple) * multiple // d.ranks for name, sizes in d.network.groups.items()}
    part, largest = sum(groups.values()), max(groups.values())
    whole = part * d.ranks
    gradients = d.summed_element * part
    # The trunk comes first in a group's buffer, so that the first ranks own its fp32 values.
    of_gram = sum(d.element * sum(sizes) + 4 * min(sum(sizes), groups[name]) for name, sizes in d.gram.items())
    refresh = d.element * (d.ranks + 1) * max((groups[name] for name in d.gram), default=0)
    growing = max(d.early, min(d.late, d.early + d.bucket + gradients)) if d.on_cpu else d.early + d.bucket
    return Memory(
        *(d.element * whole, 4 * part, d.moments(groups), 4 * part, d.element * whole),
        *(of_gram, d.element * sum(d.network.frozen), gradients, d.bucket, 0, d.activations, d.loss),
        forward_phase=d.held + d.loss,
        backward_phase=max(growing, d.bucket + gradients + d.left_at_reduction),
        step_phase=max(gradients + d.flattened(largest) + d.exchanged, refresh),
    )


def _partitioned(d: _Demand) -> Memory:
    """Return the memory at stage 3: every parameter is partitioned over the ranks and gathered where it is used."""
    groups = {name: sum(-(-size // d.ranks) for size in sizes) for name, sizes in d.network.groups.items()}
    part = sum(groups.values())
    gradients = d.summed_element * part
    of_gram = (d.element + 4) * sum(-(-size // d.ranks) for sizes in d.gram.values() for size in sizes)
    of_frozen = d.element * sum(-(-size // d.ranks) for size in d.network.frozen)
    live = d.sizes.stage3_max_live_parameters if d.ranks > 1 else 0
    gathered = d.element * min(d.network.total, live)
    of_teacher = d.element * min(sum(d.network.frozen), live)  # gathered in its forward
    scattered = d.bucket * (2 if d.on_cpu else 1)  # a copy of the bucket, ordered by the rank that owns each part
    lasting = gradients + d.bucket  # both are kept from step to step
    left = d.left_at_reduction + (gathered if d.reduces_early else 0)
    return Memory(
        *(d.element * part, 4 * part, d.moments(groups), 4 * part, d.element * part, of_gram, of_frozen, gradients),
        *(d.bucket + scattered, gathered, d.activations, d.loss),
        forward_phase=lasting + max(gathered + d.held + d.loss, of_teacher + d.pixels),
        # The backward frees gathered parameters once it is done with them, so none is left at the last reduction.
        backward_phase=lasting + max(d.early + gathered, scattered + left),
        step_phase=lasting + d.flattened(max(groups.values())) + d.exchanged,
    )


_AT_STAGE: dict[int, Callable[[_Demand], Memory]] = {0: _replicated, 1: _flat, 2: _flat, 3: _partitioned}


def backward_peaks(
    config: Config, network: ElementCounts, images: int, checkpointing: Checkpointing, pixels: int, e: int
) -> tuple[int, int]:
    """Return two peaks of the backward in bytes: of activations alone, and of activations plus gradients so far.

    The backward goes from the last call of a block to the first and frees activations on the way. A gradient element
    takes `e` bytes. A block that is called once per crop size has its gradient from its first backward on.

    Args:
        images: number of images of a micro-batch on one rank.
        pixels: bytes of the crops.
    """
    blocks = [images * b for b in costs.block_activation_bytes(config)]
    kept = [images * b for b in costs.block_activation_bytes(config, checkpointing)]
    recomputed = [0] * len(blocks) if checkpointing == "none" else blocks
    outside = costs.bytes_after_forward(config, checkpointing).total(images) + pixels - sum(kept)
    left, done = outside + sum(kept), e * network.heads
    early = late = left
    waiting = dict(enumerate(network.blocks))
    for i, block in reversed(list(enumerate(costs.kept(config).called))):
        now = left + recomputed[i]
        done += e * waiting.pop(block, 0)
        early, late = max(early, now), max(late, now + done)
        left -= kept[i]
    return early, max(late, e * network.total + pixels)


def resolves_to_triton(config: Config) -> bool:
    """Return whether the loss over prototypes runs in fused kernels on a GPU, without tiles of logits in memory: if
    `objective.prototype_loss` names them, or leaves the choice open and they can run."""
    asked, of_products = config.objective.prototype_loss, config.train.precision in ("bf16", "fp16", "autocast")
    can_run = of_products and config.objective.bottleneck <= LARGEST_BOTTLENECK
    return asked == "triton" or (asked == "auto" and can_run)


def _pixel_bytes(config: Config, images: int, e: int) -> int:
    """Return the bytes of the crops of `images` images in all three copies.

    The copies are uint8 as loaded, fp32 for the augmentations, and `e` bytes per value as the trunk's input.
    """
    return images * sum(3 * size**2 for size in config.crop_sizes) * (1 + 4 + e)


def _loss_workspace(network: ElementCounts, e: int, tile: int) -> int:
    """Return the bytes of the fused cross-entropy's workspace.

    It holds the normalised prototypes of all the teacher's heads and of the student's largest one, and for one tile of
    logits (`tile` bytes in fp32; 0 in fused kernels, whose tiles stay in registers) the logits, the student's
    probabilities (counted as a whole tile), and in bf16 and fp16 a copy of both in that dtype.
    """
    if not network.prototypes:
        return 0
    return e * (sum(network.prototypes) + max(network.prototypes)) + tile * (2 if e == 4 else 3)


def checkpoint_bytes(network: ElementCounts, anchored: bool = False) -> int:
    """Return the bytes of a checkpoint on disk: student, EMA and moments of every trainable parameter in fp32.

    Centres and JSON files are so small that they are not counted.

    Args:
        anchored: whether it holds a Gram teacher.
    """
    gram = 4 * sum(map(sum, network.trunk.values())) if anchored else 0
    return (
        gram + 8 * network.total + 4 * sum(network.moments[name] * sum(sizes) for name, sizes in network.groups.items())
    )
