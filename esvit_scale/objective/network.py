"""What an engine wraps: the trunk and the objective as one module with one forward."""

from torch import Tensor, nn

from esvit_scale.config import Config
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.swin import Swin
from esvit_scale.objective.esvit import EsViT, Targets


class Network(nn.Module):
    """Parameters are named `trunk.…`, `objective.view_head.…` and `objective.region_head.…`."""

    def __init__(self, trunk: Swin, objective: EsViT) -> None:
        super().__init__()
        self.trunk = trunk
        self.objective = objective

    def forward(
        self,
        crops: list[Tensor],
        targets: Targets | None = None,
        drop_keys: Tensor | None = None,
        teacher_temp: float | None = None,
    ) -> Targets | tuple[Tensor, dict[str, Tensor], Tensor]:
        """Without `targets` the teacher's role: crops of the two globals → targets (call without gradient).
        With them the student's: all crops → (loss, logs, detached view features [ΣB, C])."""
        features = self.trunk(crops, drop_keys)
        if targets is None:
            return self.objective.targets(features)
        if teacher_temp is None:
            raise TypeError("the student's forward needs teacher_temp")
        return *self.objective(features, targets, teacher_temp), features.view.detach()


def build_network(config: Config) -> Network:
    """Teacher and student are the same class; the student's forward is given drop keys, the teacher's is not."""
    trunk = build_trunk(config)
    if config.model.freeze_patch_embed:
        trunk.patch_embed.proj.requires_grad_(False)
    return Network(trunk, EsViT(trunk.dim, config.objective))
