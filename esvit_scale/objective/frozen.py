"""What a run's config says about its frozen teacher: `objective.teacher_config`, read from the weights at the start.

It has the sections data, model and objective of the teacher's own config, as far as they say what the network is, and a
checksum of its tensors. So a config alone says how wide the teacher is, what it costs, and whether the weights are the
same as when the run began; weights and exports of the student can be read where the teacher is not.
"""

import json
from functools import lru_cache
from typing import Any

import torch

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.registry import build_trunk

CHECKSUM = "checksum"
_OF_MODEL = {"trunk", "window", "embed_dim", "depths", "heads", "registers"}
_OF_HEADS = {"prototypes", "head_hidden", "bottleneck"}
_OF_DATA = {"channels", "bits", "mean", "std"}


def described(teacher: Config, checksum: str) -> dict[str, Any]:
    """Return the value of `objective.teacher_config` for a teacher with this config and checksum of its tensors."""
    of_data = teacher.data.model_dump(mode="json", include=_OF_DATA, exclude_defaults=True)
    of_data["global_crops"] = {"size": teacher.data.global_crops.size}
    # A network of timm is built for its sizes of crops.
    of_data["local_crops"] = [{"size": crops.size, "count": crops.count} for crops in teacher.data.local_crops]
    sparse = teacher.model.model_dump(mode="json", include={"keep"}, exclude_none=True)
    of_heads = teacher.objective.model_dump(mode="json", include=_OF_HEADS)
    return {
        CHECKSUM: checksum,
        "data": of_data,
        "model": teacher.model.model_dump(mode="json", include=_OF_MODEL) | sparse | {"drop_path": 0.0},
        "objective": of_heads | {"regions": False},  # whether they are used, the student's config says
    }


def teacher_config(config: configs.Objective) -> Config:
    """Return the config of the teacher that the section `objective` of a run's config describes.

    Raises:
        UserError: it describes none, because nothing has read the weights yet; or it is damaged.
    """
    if config.teacher_config is None:
        raise UserError("objective.teacher_config: not known before the weights of objective.teacher were read")
    sections = {name: value for name, value in config.teacher_config.items() if name != CHECKSUM}
    return configs.validate(sections, where="objective.teacher_config")


def teacher_dim(config: configs.Objective) -> int:
    """Return C of the teacher's features; raise UserError as `teacher_config`."""
    return _dim_of(json.dumps(teacher_config(config).model_dump(mode="json")))


@lru_cache(maxsize=16)
def _dim_of(config: str) -> int:
    with torch.device("meta"):
        return build_trunk(Config.model_validate_json(config)).dim


def teacher_name(config: configs.Objective) -> str:
    """Return the name of the teacher's trunk, for people; "" if it is not known."""
    return teacher_config(config).model.trunk if config.teacher_config else ""
