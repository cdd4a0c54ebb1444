"""What an engine wraps: the trunk and the objective as one module with one forward."""

from typing import Any

from torch import Tensor, nn

from esvit_scale.config import Config
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Trunk
from esvit_scale.objective.objective import Objective, spread
from esvit_scale.objective.registry import build_objective


class Network(nn.Module):
    """Parameters are named `trunk.…` and `objective.<head>.…`."""

    def __init__(self, trunk: Trunk, objective: Objective) -> None:
        super().__init__()
        self.trunk = trunk
        self.objective = objective

    def forward(
        self,
        crops: list[Tensor],
        targets: Any = None,
        drop_keys: Tensor | None = None,
        teacher_temp: float | None = None,
    ) -> Any:
        """Without `teacher_temp` the teacher's role: crops of the two globals → targets (call without gradient).
        With it the student's: all crops → (loss, logs, detached view features [ΣB, C])."""
        features = self.trunk(crops, drop_keys)
        if teacher_temp is None:
            return self.objective.targets(features)
        view = features.view.detach()
        loss, logs = self.objective(features, targets, teacher_temp)
        return loss, {**logs, "feature_std": spread(view)}, view


def build_network(config: Config) -> Network:
    """Teacher and student are the same class; the student's forward is given drop keys, the teacher's is not.

    Raises:
        UserError: trunk and objective do not fit each other or the config; one line.
    """
    trunk = build_trunk(config)
    if config.model.freeze_patch_embed:
        trunk.patch_projection.requires_grad_(False)
    return Network(trunk, build_objective(trunk, config))
