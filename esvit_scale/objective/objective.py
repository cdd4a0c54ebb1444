"""The base class of all objectives: the interface through which the training step uses any of them alike.

Teacher and student each hold an instance; the teacher's parameters are a moving average of the student's.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esvit_scale import config as configs
from esvit_scale.data.mixing import SoftLabels
from esvit_scale.models.descriptions import ObjectiveCard, ObjectiveFormulas
from esvit_scale.models.trunk import Features
from esvit_scale.objective.prototype_passes import Passes

Logs = dict[str, Tensor]  # detached scalars by name: `feature_std`, `loss_…` and an objective's own diagnostics


class LabelsAndTargets(NamedTuple):
    """What an objective learns that takes labels and has a frozen teacher."""

    labels: SoftLabels
    targets: Any  # what the frozen teacher's `targets` returned


class Objective(nn.Module):
    """The base class of all objectives: a loss with its heads.

    Attributes:
        needs_regions: whether the objective reads `Features.regions`.
        multi_crop: whether it takes local crops beside the two global ones.
        has_teacher: whether the moving average of the student computes targets. If not, targets come from the student's
            own features, or from a frozen teacher, and the average is not run. Without any teacher, a recipe sets
            `ema_momentum` to 0, so that the average, which evaluation reads, is the student itself.
        has_frozen_teacher: whether a frozen teacher, `objective.teacher`, computes targets.
        teacher_targets: the values of `objective.targets`, of what a frozen teacher gives, that it can learn.
        takes_labels: whether it learns labels of the images (data/mixing.SoftLabels), which `forward` then takes as its
            targets (with a frozen teacher, as `LabelsAndTargets`). It has no other teacher then, and sees one global crop of
            an image.
        takes_masks: whether the loss has a term for hidden regions. `forward` then takes, as a fourth argument, which
            regions of the global crops are hidden, bool [2B·T], or None.
        takes_signals: whether the loss compares modalities, `Features.signals`, which the config then has to read.
        modalities: the modalities that it compares, if its config names them; empty: all that the config reads.
        image_views: the numbers of global crops that it can have; an objective that takes labels sees one.
        images_at_least: the smallest number of images per micro-batch and rank for which the loss is defined.
        passes: the implementation of the passes of a loss over prototypes; None for objectives without such a loss.
    """

    needs_regions = False
    multi_crop = True
    has_teacher = True
    has_frozen_teacher = False
    teacher_targets: tuple[str, ...] = ("prototypes", "cosine")
    takes_labels = False
    takes_masks = False
    takes_signals = False
    modalities: tuple[str, ...] = ()
    image_views: tuple[int, ...] = (2,)
    images_at_least = 1
    passes: Passes | None = None

    def targets(self, teacher: Features) -> Any:
        """Return the targets that the student's loss needs, from the teacher's features of the two global views.

        The rows of the features are crop 0 of all images, then crop 1 of all images. Targets are plain data (tensors),
        no modules. The method is called without gradient.
        """
        raise NotImplementedError

    def of_frozen_teacher(self, dim: int, config: configs.Objective) -> "Objective":
        """Return the objective whose `targets` a frozen teacher computes; only if `has_frozen_teacher`.

        Args:
            dim: C of the teacher's features.
            config: the section `objective` of the teacher's own config.
        """
        raise NotImplementedError

    def forward(self, student: Features, targets: Any, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the student's loss of all crops.

        Args:
            student: features of crop 0 of all images, crop 1 of all images, …
            targets: what the teacher's `targets` returned, or the labels, or both; None without a teacher.
            teacher_temp: the teacher's temperature at this step, for objectives that have one.

        Returns:
            The loss (scalar; the mean over this rank's images), and scalars to log. The loss must depend on every
            trainable parameter at every call: ZeRO-3 would update an unused parameter by an old gradient.
        """
        raise NotImplementedError

    def comparable(self, views: dict[str, Tensor], a: str, b: str) -> tuple[Tensor, Tensor] | None:
        """Return unit vectors of modalities a and b that can be compared, [n, D] each, given view features [n, C].

        Objectives with `takes_signals` define it. It is None if there is no common space of the two.
        """
        raise NotImplementedError

    def commit(self) -> None:
        """Update statistics (such as centres) from the observed micro-batches, after an applied optimizer step.

        All ranks call it.
        """

    def discard(self) -> None:
        """Forget the micro-batches observed since the last optimizer step, after a skipped step."""

    def extra_state(self) -> dict[str, Tensor]:
        """Return the student's state that checkpoints must hold beside parameters and buffers, by name.

        It is the same on all ranks, in fp32. A name begins with the head that the tensor belongs to: "view.values"
        belongs to `view_head`.
        """
        return {}

    def empty_extra_state(self, device: torch.device) -> dict[str, Tensor]:
        """Return tensors with the names and shapes of `extra_state` after a step, to be filled from a checkpoint."""
        return {}

    def load_extra_state(self, extra_state: dict[str, Tensor]) -> None:
        """Restore the state that `extra_state` returned, or a part of it."""

    # --- descriptions of the objective; both methods have a default --------------------------------------------------

    def formulas(self) -> ObjectiveFormulas | None:
        """Return formulas for the objective's FLOPs and activations; None: these are traced instead (costs.py)."""
        return None

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        return ObjectiveCard()


def joined_targets(labels: SoftLabels | None, of_teacher: Any) -> Any:
    """Return what `Objective.forward` takes as targets: labels or a teacher's targets, or both if there are both."""
    if labels is None or of_teacher is None:
        return labels or of_teacher
    return LabelsAndTargets(labels, of_teacher)


def smoothed_cross_entropy(logits: Tensor, labels: SoftLabels, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy of logits [B, K] with labels, and the fraction of images that are right.

    An image is right if its highest logit is that of the class with the larger weight.

    Args:
        smoothing: part of a label that is spread evenly over all classes.
    """
    with fixed_precision(logits.device):
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
        of_classes = (scores.gather(1, labels.classes) * labels.weights).sum(1)
        loss = -((1 - smoothing) * of_classes + smoothing * scores.mean(1)).mean()
    main = labels.classes.gather(1, labels.weights.argmax(1, keepdim=True))[:, 0]
    return loss, (logits.detach().argmax(1) == main).to(loss.dtype).mean()


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Return how different the rows of features [n, C] are: 1 for unit vectors in all directions, 0 when all are equal.

    It is √C times the mean over channels of the unit rows' standard deviation.
    """
    return unit(features.detach()).std(0, correction=0).mean() * features.shape[1] ** 0.5


def unit(features: Tensor) -> Tensor:
    """Scale the rows of features [n, C] to unit norm, in fp32 or wider so that no argmax depends on bf16 rounding."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def fixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context with autocast switched off, for code that chooses its precisions itself.

    On the meta device, which has no autocast, the context does nothing.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
