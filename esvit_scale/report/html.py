"""report.html: one self-contained page about a run, or about several side by side."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from esvit_scale import __version__, files
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.report import about_run, baselines, metric_groups, run_files, sample_images, tables
from esvit_scale.report.run_files import Json, RunFiles, try_or_note
from esvit_scale.report.templates import render

NAME = "report.html"


def write_report(run_dirs: Path | Sequence[Path], out: Path | None = None) -> Path:
    """Write one HTML page about a run, or about several side by side; return its path. It also lists missing files.

    The page is made from config.yaml, metrics.jsonl, summary.json and environment.json, and from the results of
    `esvit-scale evaluate` in the run dir or one folder below (knn*.json, linear*.json, transfer*.json,
    retrieval*.json, copies*.json, segmentation*.json, depth*.json, video*.json, correspondence*.json, and pictures). Crops and neighbours are drawn
    from the data sets that these name, if those still exist.

    Args:
        out: the file to write; None writes report.html in the run dir, or for several runs in the folder that holds the
            first.

    Raises:
        UserError: one of `run_dirs` is not a run dir, or is named twice.
    """
    paths = [run_dirs] if isinstance(run_dirs, Path) else list(run_dirs)
    resolved = [path.resolve() for path in paths]
    if twice := [path for path, r in zip(paths, resolved, strict=True) if resolved.count(r) > 1]:
        raise UserError(f"{twice[0]}: named twice; name each run once")
    runs = [run_files.read(path) for path in paths]
    target = out or (paths[0] if len(paths) == 1 else resolved[0].parent) / NAME
    if target.is_dir():
        raise UserError(f"{target}: is a folder, but --out must name a file, for example {target / NAME}")
    target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, render("template.html.j2", **_contents(runs)))
    return target


def _contents(runs: list[RunFiles]) -> Json:
    """Return the variables of template.html.j2, by name."""
    several = len(runs) > 1
    names = run_files.unique_names(runs)
    labels = names if several else [""]
    named = list(zip(labels, runs, strict=True))
    missing: list[str] = []
    differences = tables.config_differences(named, missing) if several else None
    learning = try_or_note("table of baselines", missing, lambda: baselines.learning(named))
    evaluations = [*([learning] if learning else []), *tables.evaluations(named, missing)]
    groups = metric_groups.groups(runs, names, missing)
    parts = [_pictures(r, label) for label, r in named]
    return {
        "title": f"{len(runs)} runs: {', '.join(names)}" if several else names[0],
        "heading": f"{len(runs)} runs side by side" if several else names[0],
        "subtitle": "" if several else _subtitle(runs[0]),
        "legend": list(zip(names, metric_groups.colours(runs), map(_subtitle, runs), strict=True)) if several else [],
        "tiles": [] if several else _tiles(runs[0]),
        "verdict": [] if several else try_or_note("verdict", missing, lambda: baselines.verdict(runs[0])) or [],
        "about": None if several else try_or_note("about this run", missing, lambda: about_run.about(runs[0])),
        "overview": tables.overview(named) if several else None,
        "differences": differences,
        "evaluations": evaluations,
        "groups": groups,
        "by_layer": metric_groups.by_layer(runs, labels),
        "pictures": parts,
        "missing": [m if not label else f"{label}: {m}" for label, r in named for m in r.missing] + missing,
        "details": [
            {
                "name": label,
                "tables": [(title, tables.flatten(values)) for title, values in _files(r) if values],
                "config": r.config_text,
            }
            for label, r in named
        ],
        "version": __version__,
        "paths": ", ".join(str(r.path) for r in runs),
    }


def _pictures(of: RunFiles, label: str) -> Json:
    """Return the images that the page shows of a run, and their captions.

    They are crops, neighbours, and the pictures of `evaluate retrieval`, `copies`, `segmentation`, `depth`, `video`, `correspondence` and `attention`.
    """
    latest = next((r for r in reversed(of.results["knn"]) if r.get("examples")), None)
    config = of.config
    crops = (
        try_or_note("crops", of.missing, lambda: sample_images.crop_grid(config))
        if config and (config.data.train or config.data.mix)
        else None
    )
    neighbours = try_or_note("neighbours", of.missing, lambda: _neighbours(latest)) if latest else None
    for kind, command in (("correspondence", "correspondence"), ("attention", "attention")):
        if not of.pictures[kind]:
            of.missing.append(
                f"{kind} pictures: not there; `esvit-scale evaluate {command} … --out` a folder in the run dir adds them"
            )
    measures = "".join(
        f"; {tables.MEASURES.get(name, name)}: {found['top_accuracy']:.1f} % of the 10 most similar are right"
        for result in of.results["correspondence"][-1:]
        for name, found in result.get("measures", {}).items()
        if isinstance(found, dict) and isinstance(found.get("top_accuracy"), float)
    )
    return {"name": label, "crops": crops, "neighbours": neighbours, "measures": measures} | of.pictures


def _neighbours(result: Json) -> Json:
    rows = sample_images.neighbour_rows(result)
    all_neighbours = [n for row in rows for n in row.neighbours]
    return {
        "of": tables.result_name(result),
        "rows": rows,
        "columns": max(len(row.neighbours) for row in rows),
        "right": sum(n.right for n in all_neighbours),
        "total": len(all_neighbours),
    }


def _subtitle(of: RunFiles) -> str:
    parts = _described(of.config) if of.config else []
    if of.rows:
        parts.append(f"step {of.rows[-1].get('step', len(of.rows))}")
    return " · ".join(parts)


def _described(config: Config) -> list[str]:
    sizes = [
        f"{config.data.global_crops.count}×{config.data.global_crops.size}",
        *(f"{g.count}×{g.size}" for g in config.data.local_crops),
    ]
    return [
        f"{config.objective.name} ({'view + region' if config.objective.regions else 'view'})",
        f"trunk {config.model.trunk}, window {config.model.window}",
        f"crops {' + '.join(sizes)}",
        f"batch {config.train.global_batch}",
        f"{config.train.precision}, seed {config.seed}",
    ]


def _tiles(of: RunFiles) -> list[tuple[str, str]]:
    """Return the key figures of a run, each with its label."""
    tiles = []
    for result in of.results["knn"][-3:]:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # the table's note tells of the file
            k, top1 = tables.quoted(result)
            tiles.append((f"{top1:.1f} %", f"k-NN (k = {k}), {tables.result_name(result)}"))
    if of.rows:
        last = of.rows[-1]
        if isinstance(last.get("images_seen"), int):
            tiles.append((f"{last['images_seen']:,}", f"images seen in {last.get('step', '?')} steps"))
        if (median := tables.median_rate(of)) != tables.NO_VALUE:
            tiles.append((median, "images per second (median)"))
        if isinstance(last.get("loss"), float):
            tiles.append((f"{last['loss']:.3f}", "last logged loss"))
    return tiles


def _files(of: RunFiles) -> list[tuple[str, Json | None]]:
    return [("Summary (summary.json)", of.summary), ("Environment (environment.json)", of.environment)]
