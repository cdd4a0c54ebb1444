"""The tables of the report: evaluation results and configs of all runs. All cells are text."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from esvit_scale.checkpoint.card_results import quoted_k
from esvit_scale.evaluate.copies import protocol_in_words as copies_protocol
from esvit_scale.evaluate.depth import protocol_in_words as depth_protocol
from esvit_scale.evaluate.segmentation import protocol_in_words as segmentation_protocol
from esvit_scale.evaluate.video import protocol_in_words as video_protocol
from esvit_scale.report.run_files import Json, RunFiles, try_or_note

NO_VALUE = "–"
MEASURES = {"mirrored": "flipped, grey", "cropped": "cropped", "stereo": "stereo pair"}
NamedRun = tuple[str, RunFiles]  # a run and its name on the page, which is "" if it is the only run


class Cell(NamedTuple):
    """A cell of a table; the best of its row is shown in bold."""

    text: str
    best: bool = False


class Row(NamedTuple):
    """A row of a table, with a bar for its main figure."""

    name: str
    cells: list[Cell]
    bar: float | None = None  # length of the bar in percent; None draws none


class Remark(NamedTuple):
    """What is said of one run below a table: sentences, and the reasons that they introduce."""

    run: str  # its name; "" if it is the only run
    sentences: list[str]
    reasons: list[str]


class Table(NamedTuple):
    """A table of the report; `id` is its anchor on the page."""

    id: str
    title: str
    note: str
    head: list[str]
    rows: list[Row]
    warning: str = ""  # what keeps the rows from being compared
    remarks: Sequence["Remark"] = ()


def evaluations(runs: Sequence[NamedRun], missing: list[str]) -> list[Table]:
    """Return a table for every kind of evaluation that any run has.

    When a result file has an unexpected form, only its table is left out, with a note in `missing`.
    """
    dense = (segmentation, segmented_classes, depth, video)
    makers = (knn, few_shot, linear, transfer, retrieval, revisited, copies, *dense, correspondence)
    made = (try_or_note(f"{make.__name__.replace('_', '-')} table", missing, lambda m=make: m(runs)) for make in makers)  # type: ignore[misc]
    return [table for table in made if table is not None and table.rows]


def knn(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of k-NN accuracies; None without results."""
    found = [(join(name, result_name(r)), r) for name, run in runs for r in run.results["knn"] if "results" in r]
    if not found:
        return None
    ks = sorted({int(k) for _, r in found for k in r["results"]})
    rows = [
        Row(
            name,
            [_score(r["results"].get(str(k)), "top1", k == quoted_k(r["results"])) for k in ks]
            + [Cell(str(r["feature_dim"]))],
            quoted(r)[1],
        )
        for name, r in found
    ]
    sizes = {(r["n_test"], r["n_train"]) for _, r in found}
    over = " or ".join(f"{test:,} test images, by a vote of the k most similar of {train:,}" for test, train in sizes)
    note = (
        f"Top-1 in percent on {over} training images (weight exp(s / 0.07) at cosine similarity s). Pretraining uses no "
        "labels. In bold, and drawn as a bar: the k to quote, 10 where it was measured. It is fixed beforehand, because the "
        "best k of a row would be chosen on the test images."
    )
    head = ["features", *(f"k = {k}" for k in ks), "dimensions"]
    return Table("knn", "k-NN accuracy", note, head, rows, _different_sets(found))


def quoted(result: Json) -> tuple[int, float]:
    """Return the number of neighbours for which a k-NN result is quoted, and its top-1 in percent."""
    k = quoted_k(result["results"])
    return k, result["results"][str(k)]["top1"]


def _different_sets(results: Sequence[tuple[str, Json]]) -> str:
    """Return a sentence if k-NN results are of different images; the same ones may lie in another folder."""
    sets: dict[tuple[object, ...], str] = {}
    for name, r in results:
        paths = [Path(str(r.get(split, ""))) for split in ("train", "test")]
        words = f"{name} on {r['n_test']:,} images of {paths[1]}, by {r['n_train']:,} of {paths[0]}"
        sets.setdefault((r["n_test"], r["n_train"], *(path.name for path in paths)), words)
    return not_comparable(list(sets.values()))


def not_comparable(images: Sequence[str]) -> str:
    """Return a sentence if k-NN accuracies are on different images, which are described in words; "" for one set."""
    return f"k-NN is on different images: not comparable ({'; '.join(images)})." if len(images) > 1 else ""


def few_shot(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of k-NN accuracies with few training images of each class; None without results."""
    found = [
        (n, r["few_shot"], r) for n, run in runs for r in run.results["knn"] if isinstance(r.get("few_shot"), dict)
    ]
    if not found:
        return None
    ks = sorted({int(k) for _, few, _ in found for row in few["results"].values() for k in row})
    rows = [
        Row(join(name, result_name(r), f"{shots} of each class"), [_with_margin(row.get(str(k))) for k in ks])
        for name, few, r in found
        for shots, row in few["results"].items()
    ]
    note = f"Mean top-1 in percent over {found[0][1]['tries']} draws of the training images, ± half the 95 % interval."
    return Table("few-shot", "Few-shot k-NN", note, ["training images", *(f"k = {k}" for k in ks)], rows)


def linear(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of linear probes; it has no rows without results."""
    found = [(join(name, _step(r)), r) for name, run in runs for r in run.results["linear"]]
    rows = [
        Row(
            join(name, protocol),
            [Cell(f"{row['top1']:.1f}"), Cell(_interval(row)), _score(row, "top5"), Cell(f"{r['n_train']:,}")],
            row["top1"],
        )
        for name, r in found
        for protocol, row in r["results"].items()
    ]
    note = (
        "Top-1 with its 95 % interval, and top-5, in percent. official: EsViT's protocol. grid: the best of many heads, and "
        "logistic: logistic regression, both selected on a held-out part of the training set."
    )
    return Table("linear", "Linear probe", note, ["probe", "top-1", "95 %", "top-5", "training images"], rows)


def transfer(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of transfer to other data sets; None without results."""
    found = [(join(name, _step(r)) or "score", r) for name, run in runs for r in run.results["transfer"]]
    if not found:
        return None
    metric = {data: row["metric"] for _, r in found for data, row in r["datasets"].items()}
    columns = [(name, {data: row["score"] for data, row in r["datasets"].items()}) for name, r in found]
    columns += [
        (join(name if len(found) > 1 else "", "baseline"), r["baseline"]["scores"])
        for name, r in found
        if "baseline" in r
    ]
    rows = [_ranked(f"{data} ({metric[data]})", [scores.get(data) for _, scores in columns]) for data in metric]
    means = [sum(scores.values()) / len(scores) if scores else None for _, scores in columns]
    rows.append(_ranked(f"mean of {len(metric)}", means))
    failed = sorted({data for _, r in found for data in r.get("failed", {})})
    wins = [
        f"{name}: better on {r['baseline']['wins']}, worse on {r['baseline']['losses']} of {r['baseline']['common']}"
        for name, r in found
        if "baseline" in r
    ]
    notes = ["Each data set's own metric, in percent."]
    notes += [f"Against the baseline: {'; '.join(wins)}."] if wins else []
    notes += [f"Failed: {', '.join(failed)}."] if failed else []
    return Table("transfer", "Transfer", " ".join(notes), ["data set", *(name for name, _ in columns)], rows)


def retrieval(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of retrieval in labelled sets; None without results."""
    found = [(join(name, result_name(r)), r) for name, r in _retrievals(runs, "labelled")]
    if not found:
        return None
    ks = sorted({int(k) for _, r in found for k in r["results"]["recall"]})
    rows = [
        Row(
            name,
            [
                *(_score(r["results"]["recall"].get(str(k)), "value") for k in ks),
                Cell(f"{r['results']['map']['value']:.1f}"),
                Cell(_interval(r["results"]["map"])),
                Cell(f"{r['mean_per_class']['map']:.1f}"),
                Cell(f"{r['n_queries']:,} in {r['n_bank']:,}"),
            ],
            r["results"]["map"]["value"],
        )
        for name, r in found
    ]
    note = (
        "Images of the query's class are relevant. R@k: percentage of queries with a relevant image among the k nearest; "
        "mAP: mean average precision over the whole ranking, with its 95 % bootstrap interval over queries, and its mean "
        "over classes. Nothing is trained."
    )
    head = ["features", *(f"R@{k}" for k in ks), "mAP", "95 %", "mAP by class", "queries"]
    return Table("retrieval", "Retrieval", note, head, rows)


def revisited(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of retrieval in the revisited Oxford and Paris sets; None without results."""
    found = [(join(name, result_name(r)), r) for name, r in _retrievals(runs, "revisited")]
    if not found:
        return None
    rows = [
        Row(
            join(name, r["ground_truth"], setting),
            [_score(row, "map"), Cell(_interval(row)), Cell(str(row["queries"]))],
        )
        for name, r in found
        for setting, row in r["results"].items()
    ]
    sides = sorted({r["protocol"]["largest_side"] for _, r in found})
    note = (
        f"mAP in percent with its 95 % bootstrap interval over queries; images at most {' or '.join(map(str, sides))} pixels "
        "long, one scale, queries cropped to their boxes."
    )
    return Table("revisited", "Retrieval, revisited sets", note, ["setting", "mAP", "95 %", "queries"], rows)


def _retrievals(runs: Sequence[NamedRun], kind: str) -> list[tuple[str, Json]]:
    return [(name, r) for name, run in runs for r in run.results["retrieval"] if r.get("kind") == kind]


def copies(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of copy detection, with the protocol of every result; None without results."""
    found = [(join(name, result_name(r)), r) for name, run in runs for r in run.results["copies"]]
    if not found:
        return None
    rows = [
        Row(
            join(name, attack),
            [
                Cell(f"{row['uap']:.1f}"),
                Cell(_interval(row)),
                Cell(f"{row['recall_at_p90']:.1f}"),
                Cell(f"{row['map']:.1f}"),
                Cell(f"{row['queries']:,} in {r['n_bank']:,}"),
            ],
            row["uap"],
        )
        for name, r in found
        for attack, row in r["results"].items()
    ]
    note = (
        "Originals of distorted images are searched; nothing is trained. In percent: micro average precision over all pairs "
        "of copy and image with its 95 % bootstrap interval over copies, recall at a precision of 90 %, and the mean over "
        "copies of the average precision."
    )
    head = ["features and attack", "µAP", "95 %", "recall at 90 %", "mAP", "copies"]
    return Table("copies", "Copy detection", note, head, rows, *_protocols(copies_protocol, found))


def _protocols(in_words: Callable[[Json], str], found: Sequence[tuple[str, Json]]) -> tuple[str, list[Remark]]:
    """Return a warning if the protocols of results differ, and the remark that lists them."""
    protocols = list(dict.fromkeys(in_words(r) for _, r in found))
    warning = "The protocols differ: not comparable." if len(protocols) > 1 else ""
    return warning, [Remark("", ["Protocol, without which the figures cannot be compared:"], protocols)]


def segmentation(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of segmentation, with the protocol of every result; None without results."""
    found = [(join(name, result_name(r)), r) for name, run in runs for r in run.results["segmentation"]]
    if not found:
        return None
    rows = [
        Row(
            join(name, head),
            [
                Cell(f"{row['miou']:.1f}"),
                Cell(_interval(row)),
                Cell(f"{row['pixel_accuracy']:.1f}"),
                Cell(f"{row['mean_accuracy']:.1f}"),
            ],
            row["miou"],
        )
        for name, r in found
        for head, row in r["results"].items()
    ]
    guessed: dict[str, tuple[float, float]] = {
        f"always {r['largest_class']['class']}": (r["largest_class"]["miou"], r["largest_class"]["pixel_accuracy"])
        for _, r in found
    }
    rows += [
        Row(name, [Cell(f"{miou:.1f}"), Cell(NO_VALUE), Cell(f"{share:.1f}"), Cell(NO_VALUE)], miou)
        for name, (miou, share) in guessed.items()
    ]
    note = (
        "Heads on frozen stage maps. In percent: mean IoU over the classes with its 95 % bootstrap interval over images, "
        "pixel accuracy, and the mean accuracy of the classes."
    )
    head = ["features and head", "mIoU", "95 %", "pixels", "classes"]
    protocols = _protocols(segmentation_protocol, found)
    return Table("segmentation", "Segmentation", note, head, rows, *protocols)


def segmented_classes(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of the IoU of every class; None without results."""
    found = [
        (join(name, result_name(r), head), {row["class"]: row for row in result["per_class"]})
        for name, run in runs
        for r in run.results["segmentation"]
        for head, result in r["results"].items()
    ]
    if not found:
        return None
    classes = dict.fromkeys(name for _, rows in found for name in rows)
    rows = [
        Row(name, [Cell(NO_VALUE) if not (of := columns.get(name)) else _score(of, "iou") for _, columns in found])
        for name in classes
    ]
    note = "IoU in percent; – for a class that is neither in the masks nor predicted."
    return Table("segmented-classes", "Segmentation, class by class", note, ["class", *(n for n, _ in found)], rows)


def depth(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of depth, with the protocol of every result; None without results."""
    found = [(join(name, result_name(r)), r) for name, run in runs for r in run.results["depth"]]
    if not found:
        return None
    rows = [
        Row(
            join(name, head) if head != "constant" else join(name, f"always {r['mean_depth']:.2f} m"),
            [
                Cell(f"{row['rmse']:.3f}"),
                Cell("{:.3f} – {:.3f}".format(*row["interval"])),
                Cell(f"{row['abs_rel']:.3f}"),
                Cell(f"{row['delta1']:.1f}"),
            ],
            row["delta1"],
        )
        for name, r in found
        for head, row in r["results"].items()
    ]
    note = (
        "A linear head on frozen stage maps, means over images: root mean squared error in metres with its 95 % bootstrap "
        "interval, absolute relative error, and the percentage of pixels within a factor of 1.25 of the truth (drawn as a bar)."
    )
    head = ["features and head", "RMSE, m", "95 %", "relative error", "δ1"]
    return Table("depth", "Depth", note, head, rows, *_protocols(depth_protocol, found))


def video(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of label propagation, with the protocol of every result; None without results."""
    found = [(join(name, result_name(r)), r) for name, run in runs for r in run.results["video"]]
    if not found:
        return None
    rows = [
        Row(
            join(name, method) if method != "static" else join(name, "first mask kept"),
            [
                Cell(f"{row['jf']:.1f}"),
                Cell(_interval(row) if row["interval"] else NO_VALUE),
                Cell(f"{row['j']:.1f}"),
                Cell(f"{row['f']:.1f}"),
            ],
            row["jf"],
        )
        for name, r in found
        for method, row in r["results"].items()
    ]
    note = (
        "Masks of the first frames are propagated by the similarity of frozen features; nothing is trained. In percent, over "
        "all objects: region similarity J (intersection over union), boundary accuracy F, and their mean with its 95 % "
        "bootstrap interval over videos."
    )
    head = ["features and method", "J&F", "95 %", "J", "F"]
    return Table("video", "Label propagation", note, head, rows, *_protocols(video_protocol, found))


def correspondence(runs: Sequence[NamedRun]) -> Table | None:
    """Return the table of correspondences between two views; it has no rows without results."""
    found = [(join(name, _step(r)), r) for name, run in runs for r in run.results["correspondence"]]
    rows = [
        Row(
            join(name, MEASURES.get(measure, measure)),
            [Cell(f"{m[key]:.1f}") for key in ("top_accuracy", "top_distance_px", "accuracy", "distance_px", "chance")],
            m["top_accuracy"],
        )
        for name, r in found
        for measure, m in r["measures"].items()
    ]
    note = (
        "Each region token of one view is matched to the most similar one of another view of the same image: the "
        "percentage matched to the true cell, and the mean distance to it in pixels, over the 10 most similar pairs "
        "(EsViT's measure) and over all. Nothing is trained."
    )
    head = ["second view", "10 best, %", "px", "all, %", "px", "chance, %"]
    return Table("correspondence", "Correspondence", note, head, rows)


def overview(runs: Sequence[NamedRun]) -> Table:
    """Return the table with one row per run: its progress, its last loss and its k-NN accuracy."""
    rows = []
    for name, run in runs:
        last = run.rows[-1] if run.rows else {}
        knns = [quoted(r) for r in run.results["knn"] if r.get("step") and isinstance(r.get("results"), Mapping)]
        state = "finished" if (run.summary or {}).get("finished") else "not finished"
        cells = [
            state,
            _whole(last.get("step")),
            _whole(last.get("images_seen")),
            median_rate(run),
            _short(last.get("loss")),
        ]
        rows.append(
            Row(name, [Cell(c) for c in [*cells, f"{knns[-1][1]:.1f} % (k = {knns[-1][0]})" if knns else NO_VALUE]])
        )
    head = ["run", "state", "step", "images seen", "images/s (median)", "last loss", "k-NN"]
    return Table("runs", "Runs", "", head, rows)


def config_differences(runs: Sequence[NamedRun], missing: list[str]) -> Table | None:
    """Return the table of config keys in which runs differ; None, with a note in `missing`, if fewer than two have a config."""
    known = [(name, dict(flatten(run.config.model_dump(mode="json")))) for name, run in runs if run.config]
    if len(known) < 2:
        missing.append("config differences: fewer than two runs have a config")
        return None
    keys = dict.fromkeys(key for _, values in known for key in values)
    differ = [key for key in keys if key != "run_dir" and len({values.get(key) for _, values in known}) > 1]
    rows = [Row(key, [Cell(values.get(key, NO_VALUE)) for _, values in known]) for key in differ]
    note = "Every key in which the runs differ." if rows else "The runs have the same config."
    return Table("differences", "Config differences", note, ["key", *(name for name, _ in known)], rows)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested mappings, and lists of mappings, to a dict of dotted key → value as text."""
    found = []
    for key, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, Mapping):
            found += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            found.append((prefix + key, f"{value:.6g}"))
        else:
            found.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return found


def result_name(result: Json) -> str:
    """Return the label of a k-NN result: the name it holds (baselines), or "teacher at step …"."""
    if result.get("name"):
        return str(result["name"])
    return f"teacher at {_step(result)}" if result.get("step") is not None else "teacher"


def _step(result: Json) -> str:
    if result.get("name"):
        return str(result["name"])
    return f"step {result['step']}" if result.get("step") is not None else Path(str(result.get("checkpoint", ""))).name


def join(*parts: str) -> str:
    """Return the parts of a label that are not empty, separated by dots."""
    return " · ".join(part for part in parts if part)


def _score(row: Mapping[str, Any] | None, key: str, best: bool = False) -> Cell:
    return Cell(f"{row[key]:.1f}", best) if row and row.get(key) is not None else Cell(NO_VALUE)


def _with_margin(row: Mapping[str, Any] | None) -> Cell:
    if not row:
        return Cell(NO_VALUE)
    interval = row.get("interval")
    return Cell(f"{row['top1']:.1f}" + (f" ± {interval[1] - row['top1']:.1f}" if interval else ""))


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['interval'][0]:.1f} – {row['interval'][1]:.1f}" if row.get("interval") else NO_VALUE


def _ranked(name: str, scores: Iterable[float | None]) -> Row:
    scores = list(scores)
    there = [s for s in scores if s is not None]
    best: Callable[[float], bool] = lambda s: len(there) > 1 and s == max(there)  # noqa: E731
    return Row(name, [Cell(NO_VALUE) if s is None else Cell(f"{s:.1f}", best(s)) for s in scores])


def median_rate(run: RunFiles) -> str:
    """Return the median of a run's images per second, as text."""
    found = run.columns.get("images_per_s")
    values = sorted(found[found == found].tolist()) if found is not None else []
    return f"{values[len(values) // 2]:,.0f}" if values else NO_VALUE


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NO_VALUE


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else NO_VALUE
