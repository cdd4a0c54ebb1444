"""What every objective is: the contract between objective/ and the training step, which never asks which one it is.

Teacher and student each hold an instance with the same parameters; the teacher's are the student's moving average.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from esvit_scale.models.descriptions import ObjectiveCard, ObjectiveFormulas
from esvit_scale.models.trunk import Features

Logs = dict[str, Tensor]  # detached scalars; `feature_std`, `loss_…` and whatever the objective finds worth watching


class Objective(nn.Module):
    """The base class of all objectives: a loss with its heads.

    Attributes:
        needs_regions: whether it reads `Features.regions`.
        multi_crop: whether it takes local crops beside the two global ones.
        has_teacher: False: targets come from the student's own features, and the teacher is not run. A recipe of such
            an objective sets `ema_momentum` to 0, so that the teacher, which is what evaluation reads, is the student.
        images_at_least: images of a micro-batch on one rank, below which the loss is not defined.
    """

    needs_regions = False
    multi_crop = True
    has_teacher = True
    images_at_least = 1

    def targets(self, teacher: Features) -> Any:
        """Map the teacher's features of the two global views to what the student's loss needs, tensors only.

        Rows are crop 0 of all images, then crop 1 of all images. It is called without gradient.
        """
        raise NotImplementedError

    def forward(self, student: Features, targets: Any, teacher_temp: float) -> tuple[Tensor, Logs]:
        """Return the student's loss of all crops.

        Args:
            student: features of crop 0 of all images, crop 1 of all images, …
            targets: what the teacher's `targets` gave; None without a teacher.
            teacher_temp: τ_t at this step, for objectives that have one.

        Returns:
            The loss (scalar; the mean over this rank's images), and scalars to log. Every trainable parameter takes
            part at every call: ZeRO-3 would step a parameter that is not used by an old gradient.
        """
        raise NotImplementedError

    def commit(self) -> None:
        """Let what was observed since the last step count, after an applied optimizer step. All ranks call it."""

    def discard(self) -> None:
        """Forget what was observed, after a skipped optimizer step."""

    def extra_state(self) -> dict[str, Tensor]:
        """Return the student's state between steps beside parameters and buffers, for checkpoints.

        It is the same on all ranks, in fp32. A name begins with the head that it belongs to: "view.values" to `view_head`.
        """
        return {}

    def empty_extra_state(self, device: torch.device) -> dict[str, Tensor]:
        """Return tensors of the names and shapes that `extra_state` has after a step, to be filled from a checkpoint."""
        return {}

    def load_extra_state(self, extra_state: dict[str, Tensor]) -> None:
        """Restore what `extra_state` gave, all or a part of it."""

    # --- what an objective says about itself; both have an answer for one that does not ------------------------------

    def formulas(self) -> ObjectiveFormulas | None:
        """Return the objective's costs in closed form; None: they are counted by running it (costs.py)."""
        return None

    def card(self) -> ObjectiveCard:
        """Return what a model card says about the objective."""
        return ObjectiveCard()


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """Return how different the rows of features [n, C] are: 1 for unit vectors in all directions, 0 when all are equal.

    It is √C times the mean over channels of the unit rows' standard deviation.
    """
    return unit(features.detach()).std(0, correction=0).mean() * features.shape[1] ** 0.5


def unit(features: Tensor) -> Tensor:
    """Scale rows to unit norm in fp32 or wider: an argmax must not depend on bf16 rounding."""
    return nn.functional.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def fixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast changes nothing: precisions are chosen by hand. The meta device has no
    autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
