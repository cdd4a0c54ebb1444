"""The files that ship with the code: folders of the repository in a checkout, package data in a wheel."""

from pathlib import Path

from esvit_scale.errors import UserError, nearest

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """Return the path of the shipped folder `name` (ds_configs or slurm) in the installed wheel or the checkout."""
    packaged = _PACKAGE / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def ds_config_path(name_or_path: str) -> Path:
    """Return the path of the DeepSpeed JSON for a value of `train.ds_config`: a path ending in .json or a shipped name.

    Raises:
        UserError: there is no such file, or no shipped config of that name (the error gives the nearest).
    """
    path = Path(name_or_path)
    if path.suffix == ".json":
        if not path.is_file():
            raise UserError(f"train.ds_config: {name_or_path}: no such file{nearest(path.stem, ds_config_names())}")
        return path
    if name_or_path not in ds_config_names():
        raise UserError(
            f"train.ds_config: no shipped DeepSpeed config is named {name_or_path!r}{nearest(name_or_path, ds_config_names())}"
        )
    return shipped_folder("ds_configs") / f"{name_or_path}.json"


def ds_config_names() -> list[str]:
    """Return the names of the shipped DeepSpeed configs, sorted."""
    return sorted(path.stem for path in shipped_folder("ds_configs").glob("*.json"))
