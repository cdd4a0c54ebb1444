"""The config of a fine-tuning: `esvit-scale finetune` fills in what follows from its weights and its training set.

The trunk's shape and the pixel format are those of the weights in `model.init_from`, the classes those of the training
set, each unless the user gave another value. The run is then one like any other (pretraining.py).
"""

from pathlib import Path
from typing import Any

from esvit_scale import config as configs
from esvit_scale.checkpoint import convert, exported_folder, state_file, step_folders
from esvit_scale.config import Config, Data
from esvit_scale.data.mix import MixedSets
from esvit_scale.data.remote import place
from esvit_scale.data.url_stream import UrlSets
from esvit_scale.errors import UserError

# Sections and keys whose values are those of the weights, unless the user gave others.
OF_WEIGHTS = {
    "model": ("trunk", "window", "pretrained_windows", "embed_dim", "depths", "heads", "registers", "keep"),
    "data": ("channels", "bits", "mean", "std"),
}


def resolve(name: str, overrides: list[str]) -> Config:
    """Return the complete config of a fine-tuning: of a preset's name or a YAML file, with overrides on top.

    Raises:
        UserError: as `config.resolve`; or the config has no weights to start from or no labels to learn, or the weights
            or the training set cannot be read.
    """
    placeholder = {"objective": {"classes": 2, "class_names": []}}  # until the training set is known
    asked = configs.resolve(name, overrides, above=placeholder)
    if asked.data.global_crops.count != 1:
        raise UserError(
            f"{name}: is no config of a fine-tuning, but of {asked.objective.name}; take the preset classify, or a YAML file "
            "with its objective and data sections"
        )
    configs.require_training_data(asked)
    below = of_weights(_source(asked))
    classes = class_names(asked.data)
    above = {"objective": {"classes": len(classes), "class_names": list(classes)}} if classes else {}
    return configs.resolve(name, overrides, below, above)


def of_weights(config: Config) -> dict[str, Any]:
    """Return the values that weights with this config give a run that starts from them, as nested dicts."""
    values = config.model_dump(mode="json")
    found = {section: {key: values[section][key] for key in keys} for section, keys in OF_WEIGHTS.items()}
    found["data"]["global_crops"] = {"size": config.data.global_crops.size}
    return found


def _source(asked: Config) -> Config:
    """Return the config of the weights.

    A run that has begun recorded what they gave, and goes on when the weights are no longer there.

    Raises:
        UserError: no weights are named, or they cannot be read.
    """
    recorded = asked.run_path / "config.yaml"
    if recorded.is_file():
        return configs.load(recorded)
    if asked.model.init_from is None:
        raise UserError(
            "model.init_from: not set; give the weights to start from: a run dir, a step folder, a .safetensors file or an "
            "official .pth (`pretrain` trains from random weights, also with labels)"
        )
    return config_of(Path(asked.model.init_from), "model.init_from")


def config_of(weights: Path, key: str) -> Config:
    """Return the config of weights in any supported format.

    Args:
        key: what named the weights, for messages.

    Raises:
        UserError: they cannot be read.
    """
    try:
        path = step_folders.follow_pointer(weights)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir() or exported_folder.is_exported(path):
            return convert.read(path).config
        folder = step_folders.resolve(path)
        return configs.validate(state_file.read_state(folder)["config"], where=str(folder / state_file.STATE))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def class_names(data: Data) -> tuple[str, ...]:
    """Return the names of the classes of a training set; none for plain tars, which do not say them.

    Raises:
        UserError: the set has no classes, or only one, or mixed sets have different ones.
    """
    if UrlSets.wanted(data) and not MixedSets.wanted(data):
        return ()
    sets = [mixed.urls for mixed in data.mix] or [data.train]
    found = [place.open_set(urls, data).classes for urls in sets]
    for urls, classes in zip(sets, found, strict=True):
        if not classes:
            raise UserError(f"{urls}: its images have no labels to learn; write it from class folders")
        if classes != found[0]:
            raise UserError(
                f"data.mix: {urls} has other classes than {sets[0]}; fine-tuning needs the same in all sets"
            )
    if len(found[0]) < 2:
        raise UserError(f"{sets[0]}: has one class, {found[0][0]}; classification needs two")
    return found[0]
