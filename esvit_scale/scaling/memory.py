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

from typing import NamedTuple

import torch

from esvit_scale.config import Config
from esvit_scale.models.heads import Prototypes
from esvit_scale.objective import costs
from esvit_scale.objective.network import build_network
from esvit_scale.objective.param_groups import parameter_groups
from esvit_scale.objective.prototypes import CPU_TILE_BYTES, GPU_TILE_SHARE
from esvit_scale.parallel.ds_config import accumulates_in_fp32

STAGES = (0, 1, 2, 3)
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
        on_cpu: count resident memory with gloo: only the written part of a reserved bucket, and the copies that gloo
            makes of what it scatters.
        capacity: bytes of one GPU; the loss works in a fraction of them.
    """
    e = 2 if config.train.precision in ("bf16", "fp16") else 4
    whole, part, largest = _padded(network, stage, ranks)
    images = config.train.global_batch // ranks // config.train.grad_accum
    pixels = _pixel_bytes(config, images, e)
    activations = costs.activation_bytes(config, checkpointing).total(images) + pixels
    loss = _loss_workspace(network, e, CPU_TILE_BYTES if on_cpu else capacity // GPU_TILE_SHARE)
    filled = min(network.total, BUCKET)
    reserved = e * (filled if on_cpu else BUCKET) if stage else 0
    gathered = e * min(network.total, LIVE) if stage == 3 and ranks > 1 else 0
    early, late = backward_peaks(config, network, images, checkpointing, pixels, e)
    full_bucket = network.total > BUCKET  # then reductions happen while activations are still there
    if stage == 0:
        # The teacher works on the EMA itself; gradients are reduced in flat copies after the backward.
        step = 4 * whole + 4 * filled
        return Memory(
            *(4 * whole, 0, 8 * whole, 4 * whole, 0, 4 * whole, 4 * filled, 0, activations, loss),
            forward_phase=activations + loss,
            backward_phase=max(early, late),
            step_phase=step,
        )
    added_up = 4 if accumulates_in_fp32(config) else e  # bytes of a gradient until the step
    flattened = (added_up if added_up < 4 else 0) * largest + 4 * largest
    masters, moments, ema, gradients = 4 * part, 8 * part, 4 * part, added_up * part
    if stage < 3:
        growing = max(early, late) if on_cpu else early + reserved
        reduction = reserved + gradients + (activations if full_bucket else pixels)
        return Memory(
            *(e * whole, masters, moments, ema, e * whole, gradients, reserved, 0, activations, loss),
            forward_phase=activations + loss,
            backward_phase=max(growing, reduction),
            step_phase=gradients + flattened,
        )
    scattered = e * filled * (2 if on_cpu else 1)  # the bucket once more, in the order of its owners
    lasting = gradients + reserved  # both are kept from step to step
    return Memory(
        *(e * part, masters, moments, ema, e * part, gradients, reserved + scattered, gathered, activations, loss),
        forward_phase=lasting + gathered + activations + loss,
        # Parameters that the backward is done with are let go, so that none is left for the last reduction.
        backward_phase=lasting + max(early + gathered, scattered + (activations + gathered if full_bucket else pixels)),
        step_phase=lasting + flattened,
    )


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


def _padded(network: ElementCounts, stage: int, ranks: int) -> tuple[int, int, int]:
    """Return the numbers of elements, with padding, of all parameters, of this rank's partitions, and of its partition
    of the largest group.
    """
    if stage == 3:
        parts = [sum(-(-size // ranks) for size in sizes) for sizes in network.groups.values()]
        return network.total, sum(parts), max(parts)
    multiple = START_ALIGNMENT * ranks if stage else 1
    wholes = [-(-sum(sizes) // multiple) * multiple for sizes in network.groups.values()]
    owners = ranks if stage else 1
    return sum(wholes), sum(wholes) // owners, max(wholes) // owners


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
