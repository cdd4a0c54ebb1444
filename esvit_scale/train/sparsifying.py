"""The config of a sparsification: `esvit-scale sparsify` fills in what follows from its weights (docs/sparsify.md).

The run starts from the weights, as the sparse form of their trunk, and learns from them as its frozen teacher. The trunk's
shape and the pixel format are those of the weights; with labels, the classes are those of the training set. The run is then
one like any other (pretraining.py).
"""

from pathlib import Path
from typing import Any

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models.registry import SPARSE
from esvit_scale.train import finetuning


def resolve(weights: str, name: str, overrides: list[str], keep: float | None = None, labels: bool = False) -> Config:
    """Return the complete config of a sparsification of `weights`: of a preset's name or a YAML file, with overrides on top.

    Args:
        weights: dense weights in any supported format.
        keep: `model.keep`; None: that of the config.
        labels: whether the run also learns the labels of its training set.

    Raises:
        UserError: as `config.resolve`; or the config is not for a sparsification, or the weights or the training set cannot
            be read, or the weights are sparse already.
    """
    given: dict[str, Any] = {"objective": {"teacher": weights, "teacher_config": None}}
    given["model"] = {"init_from": weights} | ({} if keep is None else {"keep": keep})
    placeholder = {"objective": {"classes": 2}, "data": {"global_crops": {"count": 1}}} if labels else {}
    asked = configs.resolve(name, overrides, above=configs.merged(given, placeholder))
    if asked.objective.targets != "features":
        raise UserError(
            f"{name}: is no config of a sparsification; take the preset sparsify or sparsify_swin, or a YAML file like them"
        )
    configs.require_training_data(asked)
    recorded = asked.run_path / "config.yaml"
    source = configs.load(recorded) if recorded.is_file() else finetuning.config_of(Path(weights), "CHECKPOINT")
    trunk = source.model.trunk
    if trunk.startswith(SPARSE) and not recorded.is_file():
        raise UserError(
            f"{weights}: is sparse already (keep {source.model.keep}); name the dense weights that it came from"
        )
    values = finetuning.of_weights(source)
    shape = {key: value for key, value in values.pop("model").items() if key != "keep"}
    shape |= {"trunk": SPARSE + trunk.removeprefix(SPARSE)}
    above = configs.merged(given, {"model": shape})
    if labels:
        classes = finetuning.class_names(asked.data)
        learned = {"classes": len(classes), "class_names": list(classes)} if classes else {}
        above = configs.merged(above, {"objective": learned, "data": {"global_crops": {"count": 1}}})
    return configs.resolve(name, overrides, values, above)
