"""What one rank sends and receives in a training step, in bytes, at each ZeRO stage.

The collectives of the loss are traced (step_trace.py). Those around the networks are DeepSpeed's and this package's own:
they are modelled here, with P trainable elements, e bytes per element of the training precision, W ranks and m
micro-batches per step:

    stage   gradients                        parameters
    0       all-reduce of 4P, once           –
    1       all-reduce of eP, once           as at stage 2
    2       all-reduce of eP, m times        all-gather of eP for the student and of eP for the teacher, once
    3       reduce-scatter of eP, m times    all-gather of eP for each forward, m times, and in the backward again for the
                                             parameters that were released since

DeepSpeed's stages 1 and 2 do all-reduce the gradients: every rank receives all sums and keeps its part. Flat buffers and
parameters are padded to a multiple of W. Gradient norms, the test for NaN and the ranks' flags are one small all-reduce
for each parameter group. Metrics (every `train.log_every` steps), checkpoints and evaluations are not part of a step.

tests/scaling/test_traffic.py compares the bytes of each kind with those of real engines. What stage 3 gathers again is not
part of the comparison, because it happens in networks of more than a thousand million elements: it is an upper bound.
"""

from collections.abc import Sequence
from typing import NamedTuple

from esvit_scale.config import Config
from esvit_scale.parallel.ds_config import ZeroSizes, accumulates_in_fp32, zero_sizes
from esvit_scale.parallel.gradients import FLAGS
from esvit_scale.scaling.memory import START_ALIGNMENT, ElementCounts
from esvit_scale.scaling.step_trace import Layer, StepTrace

TRACED, MODELLED = "traced", "modelled"


class Traffic(NamedTuple):
    """Collectives of one kind and purpose in one step."""

    purpose: str
    kind: str  # all_reduce, all_gather, reduce_scatter or all_to_all
    bytes: int  # the whole that is reduced, gathered or scattered; for all_to_all what this rank sends
    calls: int  # modelled ones to about one; bytes are exact
    source: str  # TRACED or MODELLED
    backward: bool = False  # at stage 3, whether it runs beside the backward, and not beside the forwards

    def wire(self, ranks: int) -> int:
        """Return the bytes that one rank sends, in the algorithms that send the fewest."""
        share = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}[self.kind]
        return share * self.bytes * (ranks - 1) // ranks


def of_step(config: Config, network: ElementCounts, stage: int, ranks: int, step: StepTrace) -> list[Traffic]:
    """Return what one rank communicates in a step at a ZeRO stage."""
    element = 2 if config.train.precision in ("bf16", "fp16") else 4
    found, sizes = _of_loss(config, step), zero_sizes(config)
    if stage == 3:
        found += _partitioned(config, network, ranks, step, element, sizes)
    elif stage == 0:
        found.append(Traffic("gradients", "all_reduce", 4 * network.total, 1, MODELLED, True))
    else:
        found += _flat(config, network, stage, ranks, element, sizes)
    return [*found, *_control(config, network, stage, sizes), *_of_optimizer(config, network, stage, ranks)]


def _of_loss(config: Config, step: StepTrace) -> list[Traffic]:
    """Return the traced collectives."""
    said = config.train.grad_accum * step.collectives + step.of_statistics
    return [
        Traffic(
            "loss and its statistics",
            kind,
            sum(count for other, count in said if other == kind),
            sum(other == kind for other, _ in said),
            TRACED,
        )
        for kind in dict.fromkeys(kind for kind, _ in said)
    ]


def _flat(
    config: Config, network: ElementCounts, stage: int, ranks: int, element: int, sizes: ZeroSizes
) -> list[Traffic]:
    multiple = START_ALIGNMENT * ranks
    padded = sum(-(-sum(group) // multiple) * multiple for group in network.groups.values())
    # Stage 1 reduces the sums of a step's micro-batches; where bf16 gradients are summed in fp32 it runs as stage 2.
    batches = config.train.grad_accum if stage == 2 or accumulates_in_fp32(config) else 1
    groups = len(network.groups)
    buckets = -(-network.total // sizes.bucket(network.total))
    return [
        Traffic("gradients", "all_reduce", batches * element * network.total, batches * buckets, MODELLED, True),
        Traffic("student's parameters", "all_gather", element * padded, groups, MODELLED),
        Traffic("teacher's parameters", "all_gather", element * padded, groups, MODELLED),
    ]


def _partitioned(
    config: Config, network: ElementCounts, ranks: int, step: StepTrace, element: int, sizes: ZeroSizes
) -> list[Traffic]:
    batches = config.train.grad_accum

    def gathers(purpose: str, parameters: Sequence[int], backward: bool = False) -> Traffic:
        count = sum(-(-size // ranks) * ranks for size in parameters)
        calls = -(-count // sizes.stage3_prefetch_bucket_size) if count else 0
        return Traffic(purpose, "all_gather", batches * element * count, batches * calls, MODELLED, backward)

    every = [size for group in network.groups.values() for size in group]
    scattered = sum(-(-size // ranks) * ranks for size in every)
    buckets = -(-network.total // sizes.bucket(network.total))
    return [
        gathers("teachers' parameters", _once(step.teacher)),
        gathers("student's parameters", _once(step.student)),
        gathers(
            "student's parameters, again (at most)", gathered_again(step.student, sizes.stage3_max_reuse_distance), True
        ),
        Traffic("gradients", "reduce_scatter", batches * element * scattered, batches * buckets, MODELLED, True),
    ]


def _once(layers: Sequence[Layer]) -> list[int]:
    """Return the sizes of the parameters of layers, of each layer once: at a second call they are still there."""
    return [size for sizes in {layer.name: layer.sizes for layer in layers}.values() for size in sizes]


def gathered_again(layers: Sequence[Layer], reuse: int) -> list[int]:
    """Return the sizes of the parameters that stage 3 releases after the forward and gathers again for the backward.

    DeepSpeed keeps a layer's parameters if the same layer comes again among the next calls with at most `reuse` elements.
    It also keeps some that it passed over while it looked ahead, so that it gathers fewer than these.
    A layer that activation checkpointing computes again is called twice in the backward.
    """
    behind = 0  # elements of the calls between a layer's forward and its backward
    again: list[int] = []
    for layer in reversed(layers):
        if behind >= reuse:
            again += layer.sizes
        behind += sum(layer.sizes) * (3 if layer.checkpointed else 2)
    return again


def _control(config: Config, network: ElementCounts, stage: int, sizes: ZeroSizes) -> list[Traffic]:
    """Return the all-reduces of gradient norms, the test for NaN and the ranks' flags."""
    if stage == 0:
        return [Traffic("norms and flags", "all_reduce", 4 * (1 + FLAGS), 1, MODELLED)]
    calls = len(network.groups)
    if stage == 3:
        calls = sum(len(sub_groups(group, sizes.sub_group_size)) for group in network.groups.values())
    names = sum(map(len, network.groups.values()))
    found = [Traffic("norms and flags", "all_reduce", 4 * (names + 1 + FLAGS) * calls, calls, MODELLED)]
    if config.optim.clip is not None and config.optim.clip_by == "global":
        of_norm = 8 if stage == 3 else 4  # fp64 and fp32
        found.append(Traffic("DeepSpeed's norms", "all_reduce", of_norm * calls, calls, MODELLED))
        if stage < 3 and config.train.precision in ("bf16", "fp16"):
            found.append(Traffic("DeepSpeed's test for NaN", "all_reduce", 1, 1, MODELLED))
    return found


def sub_groups(sizes: Sequence[int], most: int) -> list[int]:
    """Return the elements of the parts into which stage 3 divides a parameter group, each of which is stepped alone."""
    found, open_ = [], 0
    for i, size in enumerate(sizes):
        open_ += size
        if open_ >= most or i == len(sizes) - 1:
            found.append(open_)
            open_ = 0
    return found


def _of_optimizer(config: Config, network: ElementCounts, stage: int, ranks: int) -> list[Traffic]:
    """Return what optimizers say that work on whole parameters."""
    names = sum(map(len, network.groups.values()))
    if config.optim.name in ("lamb", "lars") and stage:
        return [
            Traffic("norms of updates", "all_reduce", 8 * names * len(network.groups), len(network.groups), MODELLED)
        ]
    if config.optim.name == "muon" and ranks > 1:  # gradients to the owners of matrices, and updates back
        return [Traffic("matrices of Muon", "all_to_all", 2 * 4 * (-(-network.matrices // ranks)), 2, MODELLED)]
    return []
