"""Parameter counts, FLOPs and activation bytes of a training run, for every trunk and objective.

The costs of a trunk or objective with formulas (`Trunk.formulas`, `Objective.formulas`) are computed from these; any
other is run on the meta device and its costs are counted (models/traced.py). `traced` tells which of the two applies.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from esvit_scale.config import Config
from esvit_scale.data.mixing import SoftLabels, mix_labels
from esvit_scale.models import traced as models_traced
from esvit_scale.models.descriptions import Activations, Count, CropCost, KeptActivations
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Features, SignalFeatures, Trunk, call
from esvit_scale.objective import frozen, gram, koleo
from esvit_scale.objective.network import (
    Network,
    StudentNetwork,
    build_network,
    build_student,
    configs_of_students,
)
from esvit_scale.objective.objective import Objective, joined_targets
from esvit_scale.objective.registry import build_objective

# What activation checkpointing keeps of a block for its backward: everything that autograd saves; the block's inputs and
# its expensive products (models/recomputation.py); the inputs alone.
Checkpointing = Literal["none", "selective", "full"]
TEACHER_VIEWS = 2  # the two global crops
TEACHER_TEMP = 0.07  # any value: costs do not depend on it


class Parameters(NamedTuple):
    """The numbers of parameters of a network."""

    trunk: int
    heads: int  # all parameters of the objective, prototypes and gains included, and the mask token


def parameters(config: Config) -> Parameters:
    """Return the numbers of parameters of the config's network; raise UserError if it cannot be built."""
    network = _network(config)
    count: Callable[[nn.Module], int] = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    trunks = sum(map(count, network.trunks))
    return Parameters(trunks, count(network) - trunks)


def weight_dtype(config: Config) -> torch.dtype:
    """Return the type of the weights that a forward uses (fp32 in autocast, which casts them at each product)."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision, torch.float32)


def traced(config: Config) -> bool:
    """Return whether the trunk or the objective has no formulas, so that costs are counted by running it."""
    return any(None in (n.trunk.formulas(), n.objective.formulas()) for n in _network(config).networks)


def _network(config: Config) -> Network:
    """Return the config's network on the meta device, for its parameters and formulas; it is cached and never run."""
    return _network_of(_key(config))


@lru_cache(maxsize=64)
def _network_of(key: str) -> Network:
    with torch.device("meta"):
        return build_network(Config.model_validate_json(key))


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def image_flops(config: Config, count: Count = "published") -> int:
    """Return the FLOPs of a training step per image: student's forward and backward, teacher's forward, heads and loss.

    A frozen teacher's forward takes the place of the teacher's. Of several students everything is counted but the
    teacher's trunk and heads, which run once.

    Recomputation under activation checkpointing is not counted. Costs per step that do not grow with the batch (Swin
    V2's position bias, the centre) are left out because they are negligible, and so is KoLeo's comparison of view
    features: 4 · C per image that an image is compared with, 13 MFLOP for Swin-T and 4,096 images, of 154 GFLOP.
    Masks of regions add no product: hidden tokens pass through the network like others, and their targets are there.
    Gram anchoring is counted as at its steps, from `objective.gram_start` on: a second teacher's forward and the cosines.

    Args:
        count: the way of counting (models/descriptions.py). A traced trunk or objective only has the count "executed",
            and the backward of a traced trunk counts as two forwards.
    """
    first, *further = configs_of_students(config)
    own = _student_flops(first, count)
    own += sum(_student_flops(one, count) - _target_flops(one, count) for one in further)
    objective, size = _network(first).objective, config.data.global_crops.size
    if objective.has_frozen_teacher:
        return (
            own
            + config.data.global_crops.count * _crop_cost(frozen.teacher_config(config.objective), size, count).flops
        )
    crop = _crop_cost(first, size, count)
    teacher = TEACHER_VIEWS * crop.flops + models_traced.signals_cost(first)[0] if objective.has_teacher else 0
    if config.objective.gram_weight:
        teacher += TEACHER_VIEWS * (crop.flops + gram.flops(crop.grid, _network(first).trunk.dim))
    return own + teacher


def _student_flops(config: Config, count: Count) -> int:
    """Return the FLOPs per image of a student's forward and backward, and of both networks' heads and the loss."""
    objective = _network(config).objective
    crops = [_crop_cost(config, size, count) for size in config.crop_sizes]
    formulas = objective.formulas()
    of_objective = (
        _objective_flops(_key(config)) if formulas is None else formulas.image_flops([c.grid for c in crops], count)
    )
    student = sum(crop.flops_with_keys for crop in crops) + models_traced.signals_cost(config)[1]
    pixels = sum(crop.pixel_flops for crop in crops) if count == "executed" else 0  # pixels need no gradient
    return 3 * student + of_objective - pixels


def _target_flops(config: Config, count: Count) -> int:
    """Return the FLOPs per image of the teacher's heads, as `_student_flops` counts them."""
    formulas = _network(config).objective.formulas()
    if formulas is None:
        return _objective_flops(_key(config), targets_only=True)
    return formulas.teacher_flops([_crop_cost(config, size, count).grid for size in config.crop_sizes], count)


def region_grids(config: Config) -> list[tuple[int, int]]:
    """Return (H, W) of the region tokens of every crop of an image, the two global crops first."""
    return [region_grid(config, size) for size in config.crop_sizes]


def region_grid(config: Config, size: int) -> tuple[int, int]:
    """Return (H, W) of the region tokens of a crop of `size` pixels; (0, 0) from a trunk without regions."""
    return _crop_cost(config, size, "executed").grid


def crop_flops(config: Config, size: int, count: Count = "published") -> int:
    """Return the forward FLOPs of the trunk on one crop of `size` pixels."""
    return _crop_cost(config, size, count).flops


def _crop_cost(config: Config, size: int, count: Count) -> CropCost:
    formulas = _network(config).trunk.formulas()
    return models_traced.crop_cost(config, size) if formulas is None else formulas.crop_cost(size, count)


@lru_cache(maxsize=64)
def _objective_flops(key: str, targets_only: bool = False) -> int:
    """Return the traced FLOPs of an objective per image: the teacher's targets, the student's loss and its backward.

    With `targets_only` it is those of the teacher's targets alone.
    """
    config = Config.model_validate_json(key)
    grids = region_grids(config)
    with models_traced.on_meta():
        trunk = build_trunk(config)
        objective = build_objective(trunk, config)
        of_teacher = _of_teacher(config, objective, trunk.dim)
        least = max(2, objective.images_at_least)
        fewer, more = (
            _objective_step_flops(objective, of_teacher, grids, images, trunk, config, targets_only)
            for images in (least, least + 1)
        )
    return more - fewer


class _OfTeacher(NamedTuple):
    """The instance of an objective whose `targets` the student's loss takes, and the width of the features it takes."""

    objective: Objective
    dim: int


def _of_teacher(config: Config, objective: Objective, dim: int) -> _OfTeacher | None:
    """Return the teacher's side of the student's `objective` for features of width `dim`; None if it has no teacher."""
    if objective.has_frozen_teacher:
        width = frozen.teacher_dim(config.objective)
        theirs = frozen.teacher_config(config.objective).objective
        return _OfTeacher(objective.of_frozen_teacher(width, theirs), width)
    return _OfTeacher(objective, dim) if objective.has_teacher else None


def _objective_step_flops(
    objective: Objective,
    of_teacher: _OfTeacher | None,
    grids: list[tuple[int, int]],
    images: int,
    trunk: Trunk,
    config: Config,
    targets_only: bool,
) -> int:
    student = _with_signals(_features(grids, images, trunk.dim), trunk, config, images, keyed=True)
    with models_traced.flop_counter() as counter:
        targets = None
        if of_teacher is not None:
            with torch.no_grad():
                seen = _features(grids[:TEACHER_VIEWS], images, of_teacher.dim)
                targets = of_teacher.objective.targets(_with_signals(seen, trunk, config, images, keyed=False))
        if not targets_only:
            objective(student, joined_targets(_labels(objective, images), targets), TEACHER_TEMP)[0].backward()
    return counter.get_total_flops()


def _labels(objective: Objective, images: int) -> SoftLabels | None:
    """Return labels of as many images; None for an objective that learns none."""
    return mix_labels(torch.zeros(images, dtype=torch.int64), None) if objective.takes_labels else None


def _features(grids: list[tuple[int, int]], images: int, dim: int) -> Features:
    """Return uninitialised features in the shapes that a trunk returns for `images` images, given each crop's grid."""
    tokens = images * sum(h * w for h, w in grids)
    groups = [(images * grids.count(grid), *grid) for grid in dict.fromkeys(grids)]
    view, regions = (torch.empty(n, dim, requires_grad=True) for n in (images * len(grids), tokens))
    return Features(view, regions, groups)


@torch.no_grad()
def _with_signals(features: Features, trunk: Trunk, config: Config, samples: int, keyed: bool) -> Features:
    """Return features with those of the signals of `samples` samples; without and with the tokens that DropToken drops."""
    if not config.signal_views:
        return features
    keys = drop_keys(0, 0, torch.arange(samples), sum(config.signal_views.values())) if keyed else None
    found = {
        name: SignalFeatures(*(torch.empty_like(x, requires_grad=x.is_floating_point()) for x in signal))
        for name, signal in trunk([], keys, models_traced.example_signals(config, samples)).signals.items()
    }
    return features._replace(signals=found, has_image=torch.empty(samples, dtype=torch.bool))


# --- activations -----------------------------------------------------------------------------------------------------


def checkpointing_of(config: Config) -> Checkpointing:
    """Return what the config's activation checkpointing keeps."""
    implementation = config.train.activation_checkpointing
    return implementation if implementation in ("none", "selective") else "full"


def activation_bytes(config: Config, checkpointing: Checkpointing | None = None) -> Activations:
    """Return the bytes that the student's forward keeps for its backward, with heads and loss, at the run's precision.

    Args:
        checkpointing: what activation checkpointing keeps, on top of which the activations of one block are counted
            while it is recomputed; None: as the config says.
    """
    checkpointing = checkpointing or checkpointing_of(config)
    held = bytes_after_forward(config, checkpointing)
    if checkpointing == "none":
        return held
    of_a_block = (max(column) for column in zip(*kept(config).blocks, strict=True))
    return Activations(*(a + b for a, b in zip(held, of_a_block, strict=True)))


def bytes_after_forward(config: Config, checkpointing: Checkpointing) -> Activations:
    """Return the bytes that are kept at the end of the student's forward, when no block is being recomputed."""
    _, blocks, inputs, products, outside = kept(config)
    parts = {"none": blocks, "selective": [*inputs, *products], "full": inputs}[checkpointing]
    return Activations(*(sum(column) for column in zip(outside, *parts, strict=True)))


def block_activation_bytes(config: Config, checkpointing: Checkpointing = "none") -> list[int]:
    """Return the bytes per image that each call of a block keeps until its backward begins, in forward order."""
    _, blocks, inputs, products, _ = kept(config)
    if checkpointing == "none":
        return [block.per_image for block in blocks]
    taken = [product.per_image for product in products] if checkpointing == "selective" else [0] * len(inputs)
    return [given.per_image + product for given, product in zip(inputs, taken, strict=True)]


def kept(config: Config) -> KeptActivations:
    """Return the bytes that the students' forward keeps for its backward, per block call and outside the blocks.

    Blocks of further students are numbered after those of the first.
    """
    each = configs_of_students(config)
    found = [_traced_kept(_key(one)) if traced(one) else _kept_by_formulas(one) for one in each]
    before = [0, *accumulate(len(_network(one).trunk.blocks) for one in each)]
    called = [first + block for first, of in zip(before, found, strict=False) for block in of.called]
    blocks, inputs, products = (
        [x for of in found for x in getattr(of, name)] for name in ("blocks", "inputs", "products")
    )
    outside = Activations(*(sum(column) for column in zip(*(of.outside for of in found), strict=True)))
    return KeptActivations(called, blocks, inputs, products, outside)


def _kept_by_formulas(config: Config) -> KeptActivations:
    network, sizes = _network(config), config.crop_sizes
    of_trunk, of_objective = network.trunk.formulas(), network.objective.formulas()
    assert of_trunk is not None
    assert of_objective is not None
    element = weight_dtype(config).itemsize
    found = of_trunk.kept(sizes, element)
    heads = of_objective.kept([of_trunk.crop_cost(size, "executed").grid for size in sizes], element)
    others = koleo.kept_bytes(network.trunk.dim, element) if config.objective.koleo_weight else 0
    if config.objective.gram_weight:
        grid = of_trunk.crop_cost(sizes[0], "executed").grid
        others += TEACHER_VIEWS * gram.kept_bytes(grid, network.trunk.dim, element)
    per_image = found.outside.per_image + heads.per_image + others
    outside = Activations(per_image, found.outside.per_step + heads.per_step)
    return found._replace(outside=outside)


@lru_cache(maxsize=64)
def _traced_kept(key: str) -> KeptActivations:
    """Return the bytes that the student's forward keeps, traced at two batch sizes to separate the per-image part."""
    config = Config.model_validate_json(key)
    with models_traced.on_meta():
        network = build_student(config).to(weight_dtype(config))
        least = max(2, network.objective.images_at_least)
        (called, *fewer), (_, *more) = (_traced_step(network, config, images) for images in (least, least + 1))

    def each(a: int, b: int) -> Activations:
        return Activations(b - a, max(0, a - least * (b - a)))

    columns = [[each(*pair) for pair in zip(*pairs, strict=True)] for pairs in zip(fewer, more, strict=True)]
    return KeptActivations(called, columns[0], columns[1], columns[2], columns[3][0])


def _traced_step(
    network: StudentNetwork, config: Config, images: int
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Run the student's forward on `images` images and count the bytes that it keeps.

    Returns:
        For each call of a block, in order: the index of the block, the bytes it saves, the bytes of its inputs, and
        those of the products that selective checkpointing keeps. Last, in a list of one element: the bytes saved
        outside the blocks.
    """
    sizes, dtype = config.crop_sizes, next(network.parameters()).dtype
    crops = [
        torch.empty(images * sizes.count(s), network.trunk.in_chans, s, s, dtype=dtype) for s in dict.fromkeys(sizes)
    ]
    targets: Any = None
    signals = models_traced.example_signals(config, images)
    beside: list[Any] = [signals, torch.empty(images, dtype=torch.bool)] if signals else []
    if network.objective.has_teacher:
        with torch.no_grad():
            targets = network.objective.targets(network.features(crops[:1], None, None, *beside))
    elif of_teacher := _of_teacher(config, network.objective, network.trunk.dim):
        given = _features(region_grids(config)[:TEACHER_VIEWS], images, of_teacher.dim)
        with torch.no_grad():
            network.trunk(crops[:1])  # makes the tables that trunks keep, which are not part of a step
            targets = of_teacher.objective.to(dtype).targets(
                given._replace(view=given.view.to(dtype), regions=given.regions.to(dtype))
            )
    labels = _labels(network.objective, images)
    noted = models_traced.Kept(network)
    blocks = models_traced.KeptByBlocks(noted, network.trunk.blocks)
    network.trunk.run_block = blocks
    anchors = None
    if config.objective.gram_weight:
        with torch.no_grad():
            anchors = network.trunk(crops[:1]).regions
    keys = drop_keys(0, 0, torch.arange(images), len(sizes) + sum(config.signal_views.values()))
    with noted.hooks(), models_traced.FusedAttention():
        loss, *_ = network(crops, joined_targets(labels, targets), keys, TEACHER_TEMP, anchors, *beside)
    network.trunk.run_block = call
    noted.note_attributes(loss.grad_fn)
    return blocks.called, blocks.saved, blocks.inputs, blocks.products, [noted.bytes - sum(blocks.saved)]


def _key(config: Config) -> str:
    """Return the part of the config that determines the network and its crops, as JSON; caches use it as their key."""
    return config.model_dump_json(
        include={
            "model": True,
            "objective": True,
            "data": {"global_crops", "local_crops", "channels", "audio", "video", "text"},
            "train": {"precision"},
        }
    )
