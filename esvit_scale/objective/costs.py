"""What a run costs: parameters, FLOPs, and the activations that a backward needs; for every trunk and objective.

Swin's costs (models/complexity.py) and those of EsViT's heads and loss (here) are arithmetic on the config. Any other
trunk or objective is run once on the meta device and counted (models/traced.py); `traced` says which it was.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from esvit_scale.config import Config
from esvit_scale.models import complexity
from esvit_scale.models import traced as models_traced
from esvit_scale.models.complexity import Count
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.registry import SHAPES, build_trunk, trunk_shape
from esvit_scale.models.trunk import Features, call
from esvit_scale.objective.dino import DINO
from esvit_scale.objective.esvit import TEACHER_VIEWS, EsViT
from esvit_scale.objective.network import StudentNetwork, build_network, build_student
from esvit_scale.objective.registry import OBJECTIVES, build_objective

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of the working copies; fp32 otherwise
TEACHER_TEMP = 0.07  # any


class Parameters(NamedTuple):
    trunk: int
    heads: int  # of all that the objective holds, prototypes and gains included


class Activations(NamedTuple):
    """Bytes that the student's forward keeps for its backward (without parameters and cached index tables)."""

    per_image: int
    per_step: int  # whatever the number of images: position-bias networks, gradients of the prototypes

    def total(self, images: int) -> int:
        return images * self.per_image + self.per_step


def parameters(config: Config) -> Parameters:
    """Raises UserError on a trunk or an objective that cannot be built."""
    with torch.device("meta"):
        network = build_network(config)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return Parameters(count(network.trunk), count(network.objective))


def traced(config: Config) -> bool:
    """Whether something of it has no closed form."""
    return not (_is_swin(config) and _is_esvit(config))


def _is_swin(config: Config) -> bool:
    return config.model.trunk in SHAPES


def _is_esvit(config: Config) -> bool:
    return OBJECTIVES.get(config.objective.name) in (DINO, EsViT)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def image_flops(config: Config, count: Count = "published") -> int:
    """FLOPs of one training step for each image: student's forward and backward, teacher, heads, matching, loss.

    Recomputation under activation checkpointing is not counted. Per-step costs that do not grow with the batch (V2's
    position bias, the centre) are left out: they vanish beside an image.

    Args:
        count: of a Swin (models/complexity.py); what is traced has one count, "executed", and a backward of two
            forwards.
    """
    if not _is_esvit(config):
        has_teacher, of_objective = _objective_flops(_key(config))
    else:
        has_teacher, of_objective = True, _esvit_flops(config, count)
    student = sum(_student_flops(config, size, count) for size in config.crop_sizes)
    teacher = sum(crop_flops(config, size, count) for size in config.crop_sizes[:TEACHER_VIEWS]) if has_teacher else 0
    flops = 3 * student + teacher + of_objective
    if count == "executed" and _is_swin(config):  # pixels need no gradient
        flops -= sum(complexity.embedding_flops(config, size) for size in config.crop_sizes)
    return flops


def crop_flops(config: Config, size: int, count: Count = "published") -> int:
    """Forward FLOPs of the trunk on one crop of `size` pixels."""
    return (
        complexity.crop_flops(config, size, count) if _is_swin(config) else models_traced.crop_cost(config, size).flops
    )


def _student_flops(config: Config, size: int, count: Count) -> int:
    """Of its forward."""
    if _is_swin(config):
        return complexity.crop_flops(config, size, count)
    return models_traced.crop_cost(config, size).flops_with_keys


def _region_grid(config: Config, size: int) -> tuple[int, int]:
    if not _is_swin(config):
        return models_traced.crop_cost(config, size).grid
    side = complexity.region_side(config, size)
    return side, side


def _dim(config: Config) -> int:
    return (
        trunk_shape(config).widths[-1]
        if _is_swin(config)
        else models_traced.crop_cost(config, config.crop_sizes[0]).dim
    )


def _esvit_flops(config: Config, count: Count) -> int:
    """Heads, matching and loss of both networks, forward and backward, for an image."""
    o, dim = config.objective, _dim(config)
    grids = [_region_grid(config, size) for size in config.crop_sizes] if o.regions else []
    regions = [h * w for h, w in grids]
    student_tokens = len(config.crop_sizes) + sum(regions)
    teacher_tokens = TEACHER_VIEWS + sum(regions[:TEACHER_VIEWS])
    mlp = 2 * (dim * o.head_hidden + o.head_hidden**2 + o.head_hidden * o.bottleneck)
    logits = 2 * o.bottleneck * o.prototypes
    compared = sum(regions) if count == "executed" else sum(regions[1:])  # with either teacher view
    match = 2 * TEACHER_VIEWS * regions[0] * dim * compared if regions else 0
    flops = (3 * student_tokens + teacher_tokens) * (mlp + logits) + match
    if count == "executed":
        # The fused loss takes four products for a token of either network: the logits twice, the expected prototype,
        # and the prototypes' gradient.
        flops += (3 * teacher_tokens + student_tokens) * logits
    return flops


@lru_cache(maxsize=64)
def _objective_flops(key: str) -> tuple[bool, int]:
    """Whether an objective has a teacher, and its FLOPs for an image: the teacher's role, the student's, its backward."""
    config = Config.model_validate_json(key)
    grids = [_region_grid(config, size) for size in config.crop_sizes]
    with models_traced.on_meta():
        trunk = build_trunk(config)
        objective = build_objective(trunk, config)
        counts = []
        least = max(2, objective.images_at_least)
        for images in (least, least + 1):
            teacher = _features(grids[:TEACHER_VIEWS], images, trunk.dim)
            student = _features(grids, images, trunk.dim)
            with models_traced.flop_counter() as counter:
                targets = None
                if objective.has_teacher:
                    with torch.no_grad():
                        targets = objective.targets(teacher)
                objective(student, targets, TEACHER_TEMP)[0].backward()
            counts.append(counter.get_total_flops())
    return objective.has_teacher, counts[1] - counts[0]


def _features(grids: list[tuple[int, int]], images: int, dim: int) -> Features:
    """Of the shape that a trunk gives, crops of one size a group."""
    tokens = images * sum(h * w for h, w in grids)
    groups = [(images * grids.count(grid), *grid) for grid in dict.fromkeys(grids)]
    view, regions = (torch.empty(n, dim, requires_grad=True) for n in (images * len(grids), tokens))
    return Features(view, regions, groups)


# --- activations -----------------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What a forward keeps for its backward, call by call of the trunk's blocks, and outside them.

    A packed trunk calls each block once; timm's networks call each once for every crop size.
    """

    called: list[int]  # which block of the trunk each call runs
    blocks: list[Activations]  # what each call keeps
    inputs: list[Activations]  # what is kept of it under activation checkpointing
    outside: Activations  # all else: patch embedding, merging, norms, heads, loss


def activation_bytes(config: Config, checkpointing: bool | None = None) -> Activations:
    """What the student's forward keeps for the backward, heads and loss included, at the run's precision.

    Args:
        checkpointing: keep every block's input only, and one block's activations while it is recomputed; None: as the
            config says.
    """
    if checkpointing is None:
        checkpointing = config.train.activation_checkpointing != "none"
    _, blocks, inputs, outside = kept(config)
    parts = [outside, *inputs] if checkpointing else [outside, *blocks]
    per_image, per_step = (sum(column) for column in zip(*parts, strict=True))
    if checkpointing:
        per_image, per_step = per_image + max(b.per_image for b in blocks), per_step + max(b.per_step for b in blocks)
    return Activations(per_image, per_step)


def block_activation_bytes(config: Config) -> list[int]:
    """Return what each call of a block keeps for one image, in the forward's order, without activation checkpointing."""
    return [block.per_image for block in kept(config).blocks]


def block_input_bytes(config: Config) -> list[int]:
    """Return what activation checkpointing keeps of each call for one image, in the forward's order."""
    return [given.per_image for given in kept(config).inputs]


def kept(config: Config) -> Kept:
    return traced_kept(config) if traced(config) else _closed_form_kept(config)


def _closed_form_kept(config: Config) -> Kept:
    o, e, wide = config.objective, complexity.element(config), 4
    # A head's token: the inputs of its layers and GELUs, the bottleneck with its length, the loss's gradient.
    token = (_dim(config) + 4 * o.head_hidden + o.bottleneck) * e + (o.bottleneck if e != wide else 0) * wide + 2 * wide
    token += o.bottleneck * (wide - e)  # the bottleneck is normalised in fp32
    outside = 0
    for size in config.crop_sizes:
        tokens = 1 + (complexity.region_side(config, size) ** 2 if o.regions else 0)
        outside += complexity.kept_outside_blocks(config, size) + tokens * token
    gradients = (2 if o.regions else 1) * o.prototypes * o.bottleneck * e  # of the prototypes, known in the forward
    blocks, bias = complexity.block_activation_bytes(config), complexity.kept_by_position_bias(config)
    return Kept(
        list(range(len(blocks))),
        [Activations(*both) for both in zip(blocks, bias, strict=True)],
        [Activations(given, 0) for given in complexity.block_input_bytes(config)],
        Activations(outside, gradients),
    )


def traced_kept(config: Config) -> Kept:
    """By running the student's forward of two numbers of images."""
    return _traced_kept(_key(config))


@lru_cache(maxsize=64)
def _traced_kept(key: str) -> Kept:
    config = Config.model_validate_json(key)
    with models_traced.on_meta():
        network = build_student(config).to(DTYPES.get(config.train.precision, torch.float32))
        least = max(2, network.objective.images_at_least)
        (called, *fewer), (_, *more) = (_traced_step(network, config, images) for images in (least, least + 1))

    def each(a: int, b: int) -> Activations:
        return Activations(b - a, max(0, a - least * (b - a)))

    columns = [[each(*pair) for pair in zip(*pairs, strict=True)] for pairs in zip(fewer, more, strict=True)]
    return Kept(called, columns[0], columns[1], columns[2][0])


def _traced_step(
    network: StudentNetwork, config: Config, images: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Run the student's forward on `images` images: the blocks called, bytes saved and given call by call, and [bytes
    saved outside]."""
    sizes, dtype = config.crop_sizes, next(network.parameters()).dtype
    crops = [
        torch.empty(images * sizes.count(s), network.trunk.in_chans, s, s, dtype=dtype) for s in dict.fromkeys(sizes)
    ]
    targets = None
    if network.objective.has_teacher:
        with torch.no_grad():
            targets = network.objective.targets(network.trunk(crops[:1]))
    noted = models_traced.Kept(network)
    blocks = models_traced.KeptByBlocks(noted, network.trunk.blocks)
    network.trunk.run_block = blocks
    keys = drop_keys(0, 0, torch.arange(images), len(sizes))
    with noted.hooks(), models_traced.FusedAttention():
        loss, *_ = network(crops, targets, keys, TEACHER_TEMP)
    network.trunk.run_block = call
    noted.note_attributes(loss.grad_fn)
    return blocks.called, blocks.saved, blocks.inputs, [noted.bytes - sum(blocks.saved)]


def _key(config: Config) -> str:
    """What a network and its crops are made of."""
    return config.model_dump_json(
        include={
            "model": True,
            "objective": True,
            "data": {"global_crops", "local_crops", "channels"},
            "train": {"precision"},
        }
    )
