"""What a rank keeps in memory, part by part, at each ZeRO stage: arithmetic on the config, checked against real steps.

State (parallel/zero.py and ema.py say how it is stored; P parameters of trunk and heads, padded as ZeRO
pads them, e = 2 bytes in bf16 and 4 in fp32, W ranks; bytes):

    stage      parameters   masters    moments    EMA       teacher    gradients
    0 (fp32)   4P           –          8P         4P        the EMA    4P
    1, 2       eP           4P/W       8P/W       4P/W      eP         eP/W
    3          eP/W         4P/W       8P/W       4P/W      eP/W       eP/W

Gradients of bf16 and fp16 that several micro-batches add up are kept in fp32, 4P/W at stages 1 to 3 (where stage 1 runs
as stage 2; parallel/ds_config.py says why).

The moments come with the first step. On top of the state comes the larger of two phases: the backward (gradients,
activations, loss workspace, the reduction bucket, gathered parameters) and the optimizer's step (the gradient of one
parameter group flattened, and once more in fp32). benchmarks/plan.py measures the sum.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from esvit_scale.config import Config
from esvit_scale.models.heads import Prototypes
from esvit_scale.objective import costs
from esvit_scale.objective.network import build_network
from esvit_scale.objective.param_groups import parameter_groups
from esvit_scale.objective.prototypes import CPU_TILE_BYTES, GPU_TILE_SHARE
from esvit_scale.parallel.ds_config import accumulates_in_fp32

BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time (its default), reserved whole at stages 1–3
LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered (its default)
START_ALIGNMENT = 2  # stages 1 and 2 pad a group to this many elements a rank


class ElementCounts(NamedTuple):
    """Numbers of trainable elements, by parameter group, block and head."""

    groups: dict[str, list[int]]  # of every parameter, by parameter group
    blocks: list[int]  # of every block of the trunk
    heads: int
    prototypes: list[int]  # of every head that has some

    @property
    def total(self) -> int:
        """Return the number of all trainable elements."""
        return sum(sum(sizes) for sizes in self.groups.values())


class Memory(NamedTuple):
    """Bytes on one rank: first the parts that last, then the temporary ones, then the sums of the phases of a step."""

    parameters: int
    masters: int
    moments: int
    ema: int
    teacher: int  # its working copy
    gradients: int  # this rank's, from the backward to the step
    buckets: int  # in which gradients are reduced
    gathered: int  # parameters that are whole for a while (stage 3)
    activations: int  # kept for the backward, with the crops themselves
    loss: int  # workspace of the fused cross-entropy
    forward_phase: int
    backward_phase: int
    step_phase: int

    @property
    def state(self) -> int:
        """Return the bytes that stay between two steps, without stage 3's reduction bucket and gradients."""
        return self.parameters + self.masters + self.moments + self.ema + self.teacher

    @property
    def at_start(self) -> int:
        """Return the bytes of the state once everything is built, before the first step."""
        return self.state - self.moments

    @property
    def peak(self) -> int:
        """Return the largest sum of bytes that a step reaches."""
        return self.state + max(self.forward_phase, self.backward_phase, self.step_phase)


def network_of(config: Config) -> ElementCounts:
    """Count the elements of a config's network; it is built on the meta device and takes no memory.

    Raises:
        UserError: a trunk that cannot be built.
    """
    with torch.device("meta"):
        network = build_network(config)
    group_of = parameter_groups(network)
    sizes: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        if name in group_of:
            sizes.setdefault(group_of[name], []).append(parameter.numel())
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    prototypes = [m.weight_v.numel() for m in network.objective.modules() if isinstance(m, Prototypes)]
    return ElementCounts(sizes, [count(block) for block in network.trunk.blocks], count(network.objective), prototypes)


class _Demand(NamedTuple):
    """What memory depends on at every stage; sizes are bytes on one rank."""

    network: ElementCounts
    ranks: int
    element: int  # a working weight, an activation or a gradient
    summed_element: int  # a gradient between the backward and the step
    on_cpu: bool
    pixels: int  # crops
    activations: int  # kept for the backward, with the crops
    loss: int  # workspace of the fused cross-entropy
    early: int  # highest sum of activations over the backward
    late: int  # the same with the gradients that are already there

    @property
    def bucket(self) -> int:
        """Bytes of a bucket that are written."""
        return self.element * min(self.network.total, BUCKET)

    @property
    def reserved_bucket(self) -> int:
        """Bytes of a bucket as stages 1 to 3 allocate it; on a CPU, only what is written counts."""
        return self.bucket if self.on_cpu else self.element * BUCKET

    @property
    def left_at_reduction(self) -> int:
        """Bytes of activations and crops that are left at the last reduction of the backward, or at the first when the
        gradients fill more than one bucket."""
        return self.activations if self.network.total > BUCKET else self.pixels

    def flattened(self, largest: int) -> int:
        """Bytes of one parameter group's gradient in the step (`largest` elements): flat, and once more in fp32."""
        return (self.summed_element if self.summed_element < 4 else 0) * largest + 4 * largest


def memory(
    config: Config,
    network: ElementCounts,
    stage: int,
    ranks: int,
    checkpointing: bool,
    on_cpu: bool = False,
    capacity: int = 80 * 10**9,
) -> Memory:
    """Return the bytes of each part on one rank at a ZeRO stage.

    Args:
        checkpointing: recompute activations in the backward.
        on_cpu: count resident memory with gloo: only the written part of a reserved bucket, and the copies that gloo
            makes of what it scatters.
        capacity: bytes of one GPU; the loss works in a fraction of them.
    """
    e = 2 if config.train.precision in ("bf16", "fp16") else 4
    images = config.train.global_batch // ranks // config.train.grad_accum
    pixels = _pixel_bytes(config, images, e)
    activations = costs.activation_bytes(config, checkpointing).total(images) + pixels
    loss = _loss_workspace(network, e, CPU_TILE_BYTES if on_cpu else capacity // GPU_TILE_SHARE)
    early, late = backward_peaks(config, network, images, checkpointing, pixels, e)
    summed = 4 if accumulates_in_fp32(config) else e
    return _AT_STAGE[stage](_Demand(network, ranks, e, summed, on_cpu, pixels, activations, loss, early, late))


def _replicated(d: _Demand) -> Memory:
    """Stage 0: the teacher works on the EMA itself; gradients are reduced in flat copies after the backward."""
    whole, bucket = d.network.total, 4 * min(d.network.total, BUCKET)
    return Memory(
        *(4 * whole, 0, 8 * whole, 4 * whole, 0, 4 * whole, bucket, 0, d.activations, d.loss),
        forward_phase=d.activations + d.loss,
        backward_phase=max(d.early, d.late),
        step_phase=4 * whole + bucket,
    )


def _flat(d: _Demand) -> Memory:
    """Stages 1 and 2: working weights are whole; the rest is divided over ranks, in flat buffers with padding."""
    multiple = START_ALIGNMENT * d.ranks
    groups = [-(-sum(sizes) // multiple) * multiple for sizes in d.network.groups.values()]
    whole, part, largest = sum(groups), sum(groups) // d.ranks, max(groups) // d.ranks
    gradients = d.summed_element * part
    growing = max(d.early, d.late) if d.on_cpu else d.early + d.reserved_bucket
    return Memory(
        *(d.element * whole, 4 * part, 8 * part, 4 * part, d.element * whole, gradients, d.reserved_bucket, 0),
        *(d.activations, d.loss),
        forward_phase=d.activations + d.loss,
        backward_phase=max(growing, d.reserved_bucket + gradients + d.left_at_reduction),
        step_phase=gradients + d.flattened(largest),
    )


def _partitioned(d: _Demand) -> Memory:
    """Stage 3: everything is divided over ranks, parameter by parameter, and weights are gathered where they are used."""
    groups = [sum(-(-size // d.ranks) for size in sizes) for sizes in d.network.groups.values()]
    part, gradients = sum(groups), d.summed_element * sum(groups)
    gathered = d.element * min(d.network.total, LIVE) if d.ranks > 1 else 0
    scattered = d.bucket * (2 if d.on_cpu else 1)  # the bucket once more, in the order of its owners
    lasting = gradients + d.reserved_bucket  # both are kept from step to step
    left = d.left_at_reduction + (gathered if d.network.total > BUCKET else 0)
    return Memory(
        *(d.element * part, 4 * part, 8 * part, 4 * part, d.element * part, gradients),
        *(d.reserved_bucket + scattered, gathered, d.activations, d.loss),
        forward_phase=lasting + gathered + d.activations + d.loss,
        # Parameters that the backward is done with are let go, so that none is left for the last reduction.
        backward_phase=lasting + max(d.early + gathered, scattered + left),
        step_phase=lasting + d.flattened(max(groups)),
    )


_AT_STAGE: dict[int, Callable[[_Demand], Memory]] = {0: _replicated, 1: _flat, 2: _flat, 3: _partitioned}


def backward_peaks(
    config: Config, network: ElementCounts, images: int, checkpointing: bool, pixels: int, e: int
) -> tuple[int, int]:
    """Return the largest sums over the backward: of the activations that are left, and of those with the gradients so
    far.

    The backward goes from the last call of a block to the first. A gradient element takes e bytes; a block that is
    called for several crop sizes has its gradient from its last call on.
    """
    blocks = [images * b for b in costs.block_activation_bytes(config)]
    kept = [images * b for b in costs.block_input_bytes(config)] if checkpointing else blocks
    outside = costs.activation_bytes(config, checkpointing).total(images) + pixels - sum(kept)
    outside -= max(blocks) if checkpointing else 0
    left, done = outside + sum(kept), e * network.heads
    early = late = left
    waiting = dict(enumerate(network.blocks))
    for i, block in reversed(list(enumerate(costs.kept(config).called))):
        now = left + (blocks[i] if checkpointing else 0)
        done += e * waiting.pop(block, 0)
        early, late = max(early, now), max(late, now + done)
        left -= kept[i]
    return early, max(late, e * network.total + pixels)


def _pixel_bytes(config: Config, images: int, e: int) -> int:
    """Return the bytes of the crops as they arrive (uint8), while they are augmented (fp32), and as the trunk reads
    them.
    """
    return images * sum(3 * size**2 for size in config.crop_sizes) * (1 + 4 + e)


def _loss_workspace(network: ElementCounts, e: int, tile: int) -> int:
    """Return the bytes that the fused cross-entropy works in.

    They are the normalised prototypes of the teacher's heads and of one of the student's, and for a tile (`tile` bytes
    of fp32 logits) the logits, the probabilities of the student's part (at least half), and both once more in the
    products' narrower dtype.
    """
    if not network.prototypes:
        return 0
    return e * (sum(network.prototypes) + max(network.prototypes)) + tile * (2 if e == 4 else 3)


def checkpoint_bytes(network: ElementCounts) -> int:
    """Return the bytes of a checkpoint on disk: student, EMA and both moments of every trainable parameter in fp32.
    Centres and JSON are negligible.
    """
    return 16 * network.total
