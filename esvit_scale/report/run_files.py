"""One run dir as the report reads it: whatever is there, and in words what is missing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.report import plots, sample_images
from esvit_scale.train import row_file

Json = dict[str, Any]
T = TypeVar("T")

EVALUATIONS = ("knn", "linear", "transfer", "correspondence")


class RunFiles(NamedTuple):
    path: Path
    name: str
    config: Config | None
    config_text: str | None
    rows: list[Json]  # of metrics.jsonl
    columns: dict[str, np.ndarray]  # the same by name, float64 [rows]
    summary: Json | None
    environment: Json | None
    results: dict[str, list[Json]]  # of EVALUATIONS: what their JSON files hold, by training step
    pictures: dict[str, list[str]]  # "correspondence", "attention", "components" → PNGs as data URIs
    missing: list[str]  # what is not there, a sentence each


def read(path: Path) -> RunFiles:
    """
    Raises:
        UserError: not a run dir. What is missing or damaged inside one is said in `missing`.
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
        {kind: _pictures(path, kind) for kind in ("correspondence", "attention", "components")},
        missing,
    )


def try_or_note(what: str, missing: list[str], make: Callable[[], T]) -> T | None:
    """What `make` gives, or None with a note: a part that cannot be shown must not cost the rest of the report."""
    try:
        return make()
    except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        says = str(error) if isinstance(error, UserError | OSError) else f"not in the form expected ({error!r})"
        missing.append(f"{what}: {' '.join(says.split())}")
        return None


def unique_names(runs: list[RunFiles]) -> list[str]:
    """A name for each run, by its folder where two are named alike."""
    names = [run.name for run in runs]
    names = [str(r.path.resolve().name) if names.count(n) > 1 else n for r, n in zip(runs, names, strict=True)]
    return [str(r.path) if names.count(n) > 1 else n for r, n in zip(runs, names, strict=True)]


def _results(run: Path, kind: str, missing: list[str]) -> list[Json]:
    """By training step, those without a step (baselines) first. Of k-NN there may be several files (knn-….json)."""
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
