"""The model zoo: small trained backbones that ship with the package, named `zoo:NAME` wherever weights are taken.

Each is a folder in esvit_scale/zoo/, an export in the format safetensors with about.json (source and licence of the
images, command, accuracies), the run's metrics.jsonl and environment.json. docs/zoo.md has their figures.
"""

from pathlib import Path

from esvit_scale.errors import UserError, nearest
from esvit_scale.resources import shipped_folder

PREFIX = "zoo:"


def names() -> list[str]:
    """Return the names of the shipped backbones, sorted."""
    return sorted(path.parent.name for path in shipped_folder("zoo").glob("*/model.safetensors"))


def located(weights: Path) -> Path:
    """Return the shipped folder that a path of the form `zoo:NAME` stands for, and any other path as it is.

    Raises:
        UserError: the zoo has no backbone of this name.
    """
    text = str(weights)
    if not text.startswith(PREFIX):
        return weights
    name = text.removeprefix(PREFIX)
    if name not in names():
        raise UserError(f"{text}: the zoo has no backbone of this name{nearest(name, names())}")
    return shipped_folder("zoo") / name
