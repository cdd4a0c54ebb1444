"""Reading a run dir for the report: everything that is there, and notes on what is missing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.errors import RestartCanHelp, UserError
from esvit_scale.report import plots, sample_images
from esvit_scale.train import row_file

Json = dict[str, Any]
T = TypeVar("T")

EVALUATIONS = ("knn", "linear", "transfer", "retrieval", "copies", "segmentation", "depth", "video", "correspondence")
PICTURES = (
    "correspondence",
    "attention",
    "components",
    "kept",
    "retrieval",
    "copies",
    "segmentation",
    "depth",
    "video",
)


class RunFiles(NamedTuple):
    """The content of a run dir that the report shows."""

    path: Path
    name: str
    config: Config | None
    config_text: str | None
    rows: list[Json]  # rows of metrics.jsonl
    columns: dict[str, np.ndarray]  # the same rows as columns, float64 [rows]
    summary: Json | None
    environment: Json | None
    results: dict[str, list[Json]]  # evaluation → the content of its JSON files, in the order of training steps
    pictures: dict[str, list[str]]  # one of PICTURES → PNGs as data URIs
    missing: list[str]  # what is missing or damaged, a sentence each


def read(path: Path) -> RunFiles:
    """Return the content of a run dir; files that are missing or damaged are noted in `missing`.

    Raises:
        UserError: `path` is not a run dir.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run dir")
    if not (path / "config.yaml").is_file() and not (path / "metrics.jsonl").is_file():
        raise UserError(f"{path}: not a run dir: it has neither config.yaml nor metrics.jsonl")
    missing: list[str] = []
    text = _text(path / "config.yaml", missing)
    config = try_or_note("config.yaml", missing, lambda: configs.load(path / "config.yaml")) if text else None
    rows = [row for row in row_file.read_rows(path / "metrics.jsonl") if isinstance(row, dict)]
    if not rows:
        missing.append("curves: no step is logged in metrics.jsonl")
    summary, environment = (_json(path / name, missing) for name in ("summary.json", "environment.json"))
    results = {kind: _results(path, kind, missing) for kind in EVALUATIONS}
    if not results["knn"]:
        missing.append("k-NN: no knn*.json; `esvit-scale evaluate knn … --out` the run dir adds it")
    elif not any(result.get("name") for result in results["knn"]):
        missing.append(
            "k-NN of baselines: not there; `esvit-scale evaluate knn --checkpoint untrained:RUN … --out RUN/knn-untrained`, and "
            "the same with `--checkpoint pixels`, show what training gained"
        )
    return RunFiles(
        path,
        config.name if config else path.resolve().name,
        config,
        text,
        rows,
        plots.columns(rows),
        summary,
        environment,
        results,
        {kind: _pictures(path, kind) for kind in PICTURES},
        missing,
    )


def try_or_note(what: str, missing: list[str], make: Callable[[], T]) -> T | None:
    """Call `make` and return its result; if it fails, return None and add the reason to `missing`.

    The rest of the page can then still be shown. `what` names the part that `make` makes.
    """
    try:
        return make()
    except (UserError, RestartCanHelp, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        says = (
            str(error)
            if isinstance(error, UserError | RestartCanHelp | OSError)
            else f"not in the form expected ({error!r})"
        )
        missing.append(f"{what}: {' '.join(says.split())}")
        return None


def unique_names(runs: list[RunFiles]) -> list[str]:
    """Return a name for each run: its config's, or its folder's where two runs have the same name."""
    names = [run.name for run in runs]
    names = [str(r.path.resolve().name) if names.count(n) > 1 else n for r, n in zip(runs, names, strict=True)]
    return [str(r.path) if names.count(n) > 1 else n for r, n in zip(runs, names, strict=True)]


def _results(run: Path, kind: str, missing: list[str]) -> list[Json]:
    """Return the results of one evaluation in the order of training steps; those without a step (baselines) come first."""
    found = []
    for path in sorted([*run.glob(f"{kind}*.json"), *run.glob(f"*/{kind}*.json")]):
        result = _json(path, missing, path.relative_to(run))
        if result is not None:
            found.append(result)
    return sorted(found, key=lambda r: r["step"] if isinstance(r.get("step"), int) else -1)


def _pictures(run: Path, kind: str) -> list[str]:
    paths = sorted([*run.glob(f"{kind}*.png"), *run.glob(f"*/{kind}*.png")])
    return [sample_images.data_uri(path.read_bytes(), "image/png") for path in paths]


def _text(path: Path, missing: list[str], name: object = None) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing.append(f"{name or path.name}: not in the run dir")
    except (OSError, UnicodeDecodeError) as error:
        missing.append(f"{name or path.name}: cannot be read: {error}")
    return None


def _json(path: Path, missing: list[str], name: object = None) -> Json | None:
    text = _text(path, missing, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, Mapping):
        missing.append(f"{name or path.name}: not valid JSON")
        return None
    return dict(value)
