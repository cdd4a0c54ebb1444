"""RUN/report.html: one file that opens anywhere, offline: curves, crops, k-NN and neighbours of a run."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from esvit_scale import __version__, files
from esvit_scale import config as configs
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.report import pictures, plots
from esvit_scale.train import metrics

Json = dict[str, Any]


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from what the run dir holds, and says in the page what is missing.

    Read are config.yaml, metrics.jsonl, summary.json, environment.json and every knn*.json in the run dir or one folder
    below; pictures are made anew from the data that these name, where it is still there.

    Raises:
        UserError: `run_dir` is not a run dir.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run dir")
    if not (run_dir / "config.yaml").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir}: not a run dir: it has neither config.yaml nor metrics.jsonl")
    path = run_dir / "report.html"
    files.write_text(path, _render(_contents(run_dir)))
    return path


def _contents(run_dir: Path) -> Json:
    """Everything the template shows."""
    missing: list[str] = []
    text = _text(run_dir / "config.yaml", missing)
    config = configs.load(run_dir / "config.yaml") if text else None
    rows = metrics.read_rows(run_dir / "metrics.jsonl")
    if not rows:
        missing.append("curves: no step is logged in metrics.jsonl")
    summary, environment = (_json(run_dir / name, missing) for name in ("summary.json", "environment.json"))
    results = knn_results(run_dir)
    if not results:
        missing.append("k-NN: no knn*.json; `esvit-scale evaluate knn … --out` the run dir adds it")
    crops = _attempt("crops", missing, lambda: pictures.crop_grid(config)) if config else None
    latest = results[-1] if results else None
    neighbours = _attempt("neighbours", missing, lambda: _neighbours(latest)) if latest else None
    return {
        "name": config.name if config else run_dir.resolve().name,
        "subtitle": _subtitle(config, rows),
        "tiles": _tiles(rows, summary, results),
        "knn": _knn_table(results) if results else None,
        "curves": _curves(rows, config, missing) if rows else [],
        "crops": crops,
        "neighbours": neighbours,
        "neighbour_columns": max((len(r.neighbours) for r in neighbours["rows"]), default=1) if neighbours else 1,
        "missing": missing,
        "tables": [
            {"title": title, "rows": _facts(values), "open": False}
            for title, values in (("Summary (summary.json)", summary), ("Environment (environment.json)", environment))
            if values
        ],
        "config": text,
        "version": __version__,
        "run_dir": str(run_dir),
    }


def knn_results(run_dir: Path) -> list[Json]:
    """The k-NN results below a run dir by training step, those without a step (baselines) first."""
    found = []
    for path in sorted([*run_dir.glob("knn*.json"), *run_dir.glob("*/knn*.json")]):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path}: not valid JSON") from None
        if isinstance(result, dict) and "results" in result:
            found.append(result)
    return sorted(found, key=lambda r: -1 if r.get("step") is None else r["step"])


def _render(contents: Json) -> str:
    environment = Environment(
        loader=PackageLoader("esvit_scale.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html.j2").render(contents)


def _subtitle(config: Config | None, rows: Sequence[Json]) -> str:
    parts = []
    if config:
        parts.append(f"{config.objective.name} ({'view + region' if config.objective.regions else 'view'})")
        parts.append(f"trunk {config.model.trunk}, window {config.model.window}")
        sizes = [f"2×{config.data.global_crops.size}", *(f"{g.count}×{g.size}" for g in config.data.local_crops)]
        parts.append(f"crops {' + '.join(sizes)}")
        parts.append(f"batch {config.train.global_batch}")
        parts.append(f"{config.train.precision}, seed {config.seed}")
    if rows:
        parts.append(f"step {rows[-1].get('step', len(rows))}")
    return " · ".join(parts)


def _tiles(rows: Sequence[Json], summary: Json | None, results: Sequence[Json]) -> list[tuple[str, str]]:
    """The few numbers to read first."""
    tiles = []
    if results:
        tiles += [(f"{r['best']['top1']:.1f} %", f"k-NN, {_name(r)}") for r in results[-3:]]
    if rows:
        last = rows[-1]
        if isinstance(last.get("images_seen"), int):
            tiles.append((f"{last['images_seen']:,}", f"images seen in {last.get('step', '?')} steps"))
        rate = plots.columns(rows).get("images_per_s")
        if rate is not None and (rate == rate).any():
            rates = sorted(value for value in rate.tolist() if not math.isnan(value))
            tiles.append((f"{rates[len(rates) // 2]:,.0f}", "images per second (median)"))
        if isinstance(last.get("loss"), float):
            tiles.append((f"{last['loss']:.3f}", "last logged loss"))
    return tiles


def _knn_table(results: Sequence[Json]) -> Json:
    ks = sorted({int(k) for r in results for k in r["results"]})
    return {
        "ks": ks,
        "n_train": results[-1]["n_train"],
        "n_test": results[-1]["n_test"],
        "rows": [
            {
                "name": _name(r),
                "width": r["feature_dim"],
                "best": f"{r['best']['top1']:.1f}",
                "cells": [
                    {
                        "text": f"{r['results'][str(k)]['top1']:.1f}" if str(k) in r["results"] else "–",
                        "best": k == r["best"]["k"],
                    }
                    for k in ks
                ],
            }
            for r in results
        ],
    }


def _neighbours(result: Json) -> Json:
    rows = pictures.neighbour_rows(result)
    all_neighbours = [n for row in rows for n in row.neighbours]
    return {
        "name": _name(result),
        "rows": rows,
        "right": sum(n.right for n in all_neighbours),
        "total": len(all_neighbours),
    }


def _curves(rows: Sequence[Json], config: Config | None, missing: list[str]) -> list[list[Json]]:
    """Pairs of figures, side by side on a wide page."""
    columns = plots.columns(rows)
    prototypes = config.objective.prototypes if config else None
    figures: list[tuple[str, str, bytes | None]] = [
        (
            "Loss",
            "Cross-entropy of the student's predictions against the teacher's targets. It need not fall all the way: "
            "the targets sharpen and move as the teacher learns.",
            plots.losses(columns),
        ),
        (
            "Entropy of the teacher's targets",
            "In nats. At ln K the targets are uniform, at 0 every image has the same one: both are collapse.",
            plots.entropies(columns, prototypes),
        ),
        ("Gradient norm", "Before clipping.", plots.grad_norm(columns)),
        (
            "Throughput",
            "The wait is the part of a step that was spent without data to work on.",
            plots.throughput(columns),
        ),
        ("Schedules", "What moves during the run.", plots.schedules(columns)),
    ]
    missing += [f"{title}: not logged in metrics.jsonl" for title, _, image in figures if image is None]
    shown = [
        {"title": title, "caption": caption, "image": pictures.data_uri(image, "image/png")}
        for title, caption, image in figures
        if image
    ]
    return [shown[i : i + 2] for i in range(0, len(shown), 2)]


def _name(result: Json) -> str:
    if result.get("name"):
        return str(result["name"])
    return f"teacher at step {result['step']}" if result.get("step") is not None else "teacher"


def _attempt(what: str, missing: list[str], make: Callable[[], Any]) -> Any:
    """What `make` gives, or None with a note: data that has moved since must not cost the rest of the report."""
    try:
        return make()
    except (UserError, OSError, KeyError) as error:
        missing.append(f"{what}: {error}")
        return None


def _facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    facts = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            facts += _facts(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            facts.append((prefix + key, f"{value:.6g}"))
        else:
            facts.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return facts


def _text(path: Path, missing: list[str]) -> str | None:
    if path.is_file():
        return path.read_text()
    missing.append(f"{path.name}: not in the run dir")
    return None


def _json(path: Path, missing: list[str]) -> Json | None:
    text = _text(path, missing)
    try:
        value = json.loads(text) if text else None
    except ValueError:
        missing.append(f"{path.name}: not valid JSON")
        return None
    return value if isinstance(value, dict) else None
