"""The run's implementation of window attention (`model.attention`)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from esvit_scale.models import attention_choice
from esvit_scale.models.implementation_choice import Outcome
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.window_attention_implementations import NAMES, AttendWindows, implementation, unavailable
from esvit_scale.models.windows import WindowLayout
from esvit_scale.objective import frozen
from esvit_scale.objective.network import configs_of_students
from esvit_scale.train.recorded_choice import RecordedChoice


class AttentionChoice(RecordedChoice):
    """The choice of the implementation of window attention, checked and timed on the windows of the config's trunk."""

    part, key, file, field = "window attention", "model.attention", "attention.json", "attention"
    names, plain = NAMES, "math"

    @property
    def asked(self) -> str:
        """Return the value of `model.attention`."""
        return self.config.model.attention

    def missing(self) -> str | None:
        """Return that the trunk has no window attention of ours; None if it has."""
        return None if self._layouts(1) else f"{self.config.model.trunk} has no window attention of ours"

    def unavailable(self, name: str) -> str | None:
        """Return why an implementation cannot run on this machine, as a clause; None when it may."""
        return unavailable(name, self.device)

    def inaccuracy(self, name: str) -> str | None:
        """Return how an implementation differs from fp32 by more than it may, at the windows of one image."""
        return attention_choice.inaccuracy(implementation(name), self._layouts(1), self.dtype, self.device)

    def fastest(self, names: Sequence[str]) -> Outcome:
        """Check these implementations at the windows of one image, and time them at those of a micro-batch."""
        small, real = self._layouts(1), self._layouts(self.micro_batch)
        candidates: dict[str, Callable[[], AttendWindows]] = {name: partial(implementation, name) for name in names}
        return attention_choice.choose(candidates, small, real, self.dtype, self.device)

    def _layouts(self, images: int) -> list[WindowLayout]:
        """Return the layouts of the windows of the trunks, and of a frozen teacher's, for a micro-batch of so many images;
        empty: they have none of ours."""
        data = self.config.data
        globals_ = (data.global_crops.count * images, data.global_crops.size)
        crops = [globals_, *((g.count * images, g.size) for g in data.local_crops)]
        with torch.device("meta"):
            trunks = [(build_trunk(of_student), crops) for of_student in configs_of_students(self.config)]
            if self.config.objective.teacher_config is not None:
                trunks.append((build_trunk(frozen.teacher_config(self.config.objective)), crops[:1]))
        return [layout for trunk, of_trunk in trunks for layout in trunk.window_layouts(of_trunk, self.device)]
