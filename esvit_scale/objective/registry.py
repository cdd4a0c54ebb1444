"""The registry of objectives by name, and the checks that an objective suits the run's trunk, crops and batch."""

from collections.abc import Callable

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.division import nearest_multiple
from esvit_scale.errors import UserError, nearest
from esvit_scale.models.masking import cells_of
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective import distill
from esvit_scale.objective.byol import BYOL
from esvit_scale.objective.classify import Classify
from esvit_scale.objective.dino import DINO
from esvit_scale.objective.esvit import EsViT
from esvit_scale.objective.esvit_modalities import ModalEsViT
from esvit_scale.objective.moco_v3 import MoCoV3
from esvit_scale.objective.objective import Objective
from esvit_scale.objective.simclr import SimCLR
from esvit_scale.objective.simsiam import SimSiam
from esvit_scale.objective.sparsify import Sparsify
from esvit_scale.objective.swav import SwAV
from esvit_scale.objective.triplet import Triplet
from esvit_scale.objective.vatt import VATT

OBJECTIVES: dict[str, Callable[[int, configs.Objective], Objective]] = {  # (C of the trunk, config.objective)
    "byol": BYOL,
    "classify": Classify,
    "dino": DINO,
    "distill": distill.build,
    "esvit": EsViT,
    "esvit_modalities": ModalEsViT,
    "moco_v3": MoCoV3,
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "sparsify": Sparsify,
    "swav": SwAV,
    "triplet": Triplet,
    "vatt": VATT,
}


def build_objective(trunk: Trunk, config: Config) -> Objective:
    """Build the objective that `config.objective` names, for the features of `trunk`.

    Raises:
        UserError: the name is unknown, or the objective does not suit the trunk or the crops; the message is one line.
    """
    name = config.objective.name
    if name not in OBJECTIVES:
        raise UserError(f"objective.name: unknown objective {name!r}{nearest(name, OBJECTIVES)}")
    objective = OBJECTIVES[name](trunk.dim, config.objective)
    _check_frozen_teacher(objective, config)
    _check_labels(objective, config)
    _check_signals(trunk, objective, config)
    if objective.needs_regions and not trunk.has_regions:
        raise UserError(
            f"model.trunk: {config.model.trunk} gives no region tokens, which {name} with objective.regions=true needs; "
            "set objective.regions=false, or take a trunk with a grid of tokens"
        )
    if config.objective.regions and not objective.needs_regions:
        raise UserError(f"objective.regions: {name} has no region loss; leave it out, or take objective.name=esvit")
    if config.objective.mask_weight:
        _check_masks(trunk, objective, config)
    if config.objective.gram_weight and not trunk.has_regions:
        raise UserError(
            f"objective.gram_weight: {config.model.trunk} gives no region tokens to compare; set objective.gram_weight=0, or "
            "take a trunk with a grid of tokens"
        )
    if not (objective.has_teacher or objective.has_frozen_teacher or objective.takes_labels) and (
        config.objective.ema_momentum or config.objective.ema_momentum_end
    ):
        raise UserError(
            f"objective.ema_momentum: {name} has no teacher, whose weights are what evaluation reads; set "
            "objective.ema_momentum=0 and objective.ema_momentum_end=0, and they are the student's"
        )
    if config.data.local_crops and not objective.multi_crop:
        does = "sees one crop of an image" if objective.takes_labels else "compares the two global crops alone"
        raise UserError(f"data.local_crops: {name} {does}; set data.local_crops=[]")
    return objective


def _check_frozen_teacher(objective: Objective, config: Config) -> None:
    """Raise UserError if the objective needs a frozen teacher and the config names none, or the other way round."""
    name, teacher = config.objective.name, config.objective.teacher
    if objective.has_frozen_teacher and teacher is None:
        raise UserError(
            f"objective.teacher: {name} needs the weights of a teacher, such as objective.teacher=runs/large"
        )
    if objective.has_frozen_teacher and config.objective.targets not in objective.teacher_targets:
        raise UserError(
            f"objective.targets: {name} cannot learn {config.objective.targets}; set objective.targets="
            f"{objective.teacher_targets[0]}"
        )
    if config.objective.students and not objective.has_frozen_teacher:
        raise UserError(f"objective.students: {name} trains one student; leave it out, or take objective.name=distill")
    if teacher is not None and not objective.has_frozen_teacher:
        raise UserError(
            f"objective.teacher: {name} has no frozen teacher; leave it out, or take objective.name=distill"
        )


def _check_labels(objective: Objective, config: Config) -> None:
    """Raise UserError if the objective learns labels and the config has none for it, or the other way round."""
    name, classes, views = config.objective.name, config.objective.classes, config.data.global_crops.count
    if views not in objective.image_views:
        wanted = max(objective.image_views)
        raise UserError(
            f"data.global_crops.count: {name} needs {wanted} global crop{'s' * (wanted > 1)} of an image, got {views}; set "
            f"data.global_crops.count={wanted}"
        )
    if views == 1:
        for key in ("koleo_weight", "gram_weight"):
            if getattr(config.objective, key):
                raise UserError(f"objective.{key}: {name} has no second view of an image; set objective.{key}=0")
    if not objective.takes_labels:
        if classes:
            raise UserError(f"objective.classes: {name} learns without labels; set objective.classes=0")
        return
    if classes < 2:
        raise UserError(
            f"objective.classes: {name} needs at least 2 classes, got {classes}; `esvit-scale finetune` takes their number "
            "from the training set"
        )


def _check_signals(trunk: Trunk, objective: Objective, config: Config) -> None:
    """Raise UserError if the config reads other modalities beside the image than trunk and objective use."""
    name, read = config.objective.name, tuple(config.signal_views)
    if read and not objective.takes_signals:
        raise UserError(
            f"data.{read[0]}.views: {name} learns from images alone; set data.{read[0]}.views=0, or take objective.name=vatt"
        )
    if read and set(read) != set(trunk.modalities):
        raise UserError(
            f"data.{read[0]}.views: {config.model.trunk} sees images alone; set data.{read[0]}.views=0, or take "
            "model.trunk=modal_small"
        )
    if not objective.takes_signals:
        return
    if not read:
        raise UserError(
            f"data.audio.views: {name} compares modalities, and the config reads none; set data.audio.views=1"
        )
    used = objective.modalities or ("image", *read)
    for modality in used:
        if modality != "image" and modality not in read:
            raise UserError(f"data.{modality}.views: objective.pairs has {modality}, which is not read; set it to 1")
    for modality in read:
        if modality not in used:
            raise UserError(f"objective.pairs: no pair has {modality}; add one, or set data.{modality}.views=0")
    if config.objective.students:
        raise UserError(f"objective.students: not with {name}")


def _check_masks(trunk: Trunk, objective: Objective, config: Config) -> None:
    """Raise UserError if the objective has no masked term, or the trunk's crops cannot be masked."""
    if not objective.takes_masks:
        raise UserError(
            f"objective.mask_weight: {config.objective.name} with objective.regions={str(config.objective.regions).lower()} "
            "has no loss of masked regions; set objective.mask_weight=0, or take objective.name=esvit with regions"
        )
    geometry, size = trunk.mask_geometry, config.data.global_crops.size
    if geometry is None:
        raise UserError(
            f"objective.mask_weight: {config.model.trunk} cannot be masked, which only the Swin, Focal, ViL and plain "
            "vision transformers of this package can; set objective.mask_weight=0, or take one of them"
        )
    if cells_of(geometry, size) < 2:
        pixels = geometry.patch * geometry.patches
        raise UserError(
            f"objective.mask_weight: global crops of {size} pixels have one region of {pixels} pixels, so that nothing would "
            f"be left to see; at least data.global_crops.size={2 * pixels}"
        )


def check_local_batch(objective: Objective, config: Config, world_size: int) -> None:
    """Raise UserError if micro-batches have fewer images per rank than the objective's loss, or KoLeo, needs."""
    images = config.train.global_batch // config.train.grad_accum // world_size
    if images < objective.images_at_least:
        whole = objective.images_at_least * config.train.grad_accum * world_size
        raise UserError(
            f"train.global_batch: {config.train.global_batch} gives {images} images to a rank at a time, and "
            f"{config.objective.name} needs {objective.images_at_least}; at least train.global_batch={whole}"
        )
    if images % 2 and (config.data.mixup or config.data.cutmix):
        whole = 2 * config.train.grad_accum * world_size
        raise UserError(
            f"train.global_batch: {config.train.global_batch} gives {images} images to a rank at a time, and data.mixup and "
            f"data.cutmix mix pairs; nearest: train.global_batch={nearest_multiple(config.train.global_batch, whole)}"
        )
    compared = images * (world_size if config.objective.koleo_across_ranks else 1)
    if config.objective.koleo_weight and compared < 2:
        whole = 2 * config.train.grad_accum * (1 if config.objective.koleo_across_ranks else world_size)
        raise UserError(
            "objective.koleo_weight: KoLeo compares an image with others, and a rank has 1 image at a time; "
            f"at least train.global_batch={whole}"
        )
