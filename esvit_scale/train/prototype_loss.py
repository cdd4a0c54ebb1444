"""The run's implementation of the loss over prototypes (`objective.prototype_loss`)."""

from collections.abc import Sequence

import torch

from esvit_scale.models.implementation_choice import Outcome
from esvit_scale.objective import costs, prototype_choice
from esvit_scale.objective.network import build_network
from esvit_scale.objective.prototype_choice import Shape
from esvit_scale.objective.prototype_passes import NAMES, implementation, unavailable
from esvit_scale.train.recorded_choice import RecordedChoice

TEACHER_VIEWS = 2  # the two global crops


class PrototypeLossChoice(RecordedChoice):
    """The choice of the implementation of the loss over prototypes, timed on the token counts of a micro-batch."""

    part, key, file, field = "prototype loss", "objective.prototype_loss", "prototype_loss.json", "prototype_loss"
    names, plain = NAMES, "tiles"

    @property
    def asked(self) -> str:
        """Return the value of `objective.prototype_loss`."""
        return self.config.objective.prototype_loss

    def missing(self) -> str | None:
        """Return that the objective has no loss over prototypes; None if it has."""
        with torch.device("meta"):
            objective = build_network(self.config).objective
        return None if objective.passes else f"{self.config.objective.name} has no loss over prototypes"

    def unavailable(self, name: str) -> str | None:
        """Return why an implementation cannot run on this machine, as a clause; None when it may."""
        return unavailable(name, self.device, self.dtype, self.config.objective.bottleneck)

    def inaccuracy(self, name: str) -> str | None:
        """Return how an implementation differs from fp32 by more than it may, on a few tokens."""
        bottleneck = self.config.objective.bottleneck
        return prototype_choice.inaccuracy(implementation(name), bottleneck, self._of_products, self.device)

    def fastest(self, names: Sequence[str]) -> Outcome:
        """Check these implementations on a few tokens, and time them on those of a micro-batch."""
        return prototype_choice.choose(names, self._shapes(), self._of_products, self.device)

    @property
    def _of_products(self) -> torch.dtype:
        """The type of the loss's matrix products."""
        return torch.bfloat16 if self.dtype == torch.float16 else self.dtype

    def _shapes(self) -> list[Shape]:
        """Return the shapes of the loss's calls: view tokens, and regions if the objective has them."""
        objective, images = self.config.objective, self.micro_batch
        counts = [(len(self.config.crop_sizes), TEACHER_VIEWS)]
        if objective.regions:
            regions = [h * w for h, w in costs.region_grids(self.config)]
            counts.append((sum(regions), sum(regions[:TEACHER_VIEWS])))
        return [Shape(s * images, t * images, objective.prototypes, objective.bottleneck) for s, t in counts]
