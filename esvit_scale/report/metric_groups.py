"""The curves of the report, in groups: one small figure per column of metrics.jsonl, with a curve for every run."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esvit_scale.report import baselines, instability, plots, sample_images
from esvit_scale.report.plots import BLUE, GREEN, GREY, ORANGE, VIOLET, Curve, Panel
from esvit_scale.report.run_files import RunFiles

RUN_COLOURS = (BLUE, ORANGE, GREEN, VIOLET, "#ec4899", "#14b8a6", "#ca8a04", "#ef4444")
# Columns without a figure of their own; knn_top1_pixels is a line in that of knn_top1.
NOT_DRAWN = (
    "step",
    "images_seen",
    "stage",
    "time",
    "knn_top1_pixels",
    "knn_largest_class",
    "knn_images",
    "knn_held_out",
    "top1_low",
    "top1_high",
    "held_out_images",
    "guard_below",
)


class Group(NamedTuple):
    """A group of figures that belong together."""

    title: str
    caption: str
    columns: Mapping[
        str, tuple[str, str]
    ]  # column of metrics.jsonl → title of its figure, colour of the curve if there is one run


PARTS = {"patch_embed": "patch embedding", "norm": "final norm"}  # titles of parts whose names are not plain words
# Columns that every run logs; others depend on the objective and the config.
EXPECTED = {"loss", "grad_norm", "feature_std", "rank_me", "images_per_s", "data_wait_s", "lr", "wd", "momentum"}
GROUPS = (
    Group(
        "Quality",
        "Accuracy of a k-NN vote with the teacher's features on held-out images, from 0 to 1; dashed: the untrained trunk and "
        "raw pixels on the same images. A fall while the loss looks well is the first sign of an instability.",
        {
            "knn_top1": ("k-NN on held-out images", GREEN),
            "held_out_rank": ("effective rank on held-out images", BLUE),
            "neighbours_kept": ("neighbours kept from the start", VIOLET),
        },
    ),
    Group(
        "Accuracy",
        "Accuracy of the classifier on held-out images, from 0 to 1, with the averaged weights (EMA), which evaluation and "
        "exports read, and with the student's own; and its accuracy on the mixed and augmented images that it learns from.",
        {
            "top1": ("top-1 on held-out images", GREEN),
            "top5": ("top-5 on held-out images", GREEN),
            "top1_student": ("top-1, student's own weights", BLUE),
            "top5_student": ("top-5, student's own weights", BLUE),
            "train_top1": ("top-1 while training", ORANGE),
        },
    ),
    Group(
        "Loss",
        "The loss that training minimises. EsViT's is the cross-entropy between the student's predictions and the teacher's "
        "targets, also shown separately for views and regions. It need not fall all the way, because the targets change as "
        "the teacher learns.",
        {
            "loss": ("total", BLUE),
            "loss_view": ("view (V)", ORANGE),
            "loss_region": ("region (R)", GREEN),
            "loss_masked": ("masked regions, before their weight", VIOLET),
            "loss_koleo": ("KoLeo, before its weight", VIOLET),
            "loss_gram": ("Gram anchoring, before its weight", ORANGE),
            "loss_tokens": ("kept tokens, before their weight", GREEN),
            "loss_ratio": ("kept fractions, before their weight", VIOLET),
            "loss_class": ("labels", GREY),
        },
    ),
    Group(
        "Kept tokens",
        "Fraction of the tokens that each pruning stage of a sparse trunk keeps, in the mean over crops.",
        {
            "kept_1": ("first pruning", BLUE),
            "kept_2": ("second pruning", ORANGE),
            "kept_3": ("third pruning", GREEN),
        },
    ),
    Group(
        "Similarities",
        "Cosine similarity of predictions and targets, for two views of the same image and for other images, and how often "
        "the nearest in the batch is the other view of the image. A spread of the projections of 1 is isotropic, 0 is "
        "collapse.",
        {
            "positive_similarity": ("of an image's views", GREEN),
            "negative_similarity": ("of near other images", ORANGE),
            "contrastive_accuracy": ("nearest is the other view", BLUE),
            "projection_std": ("spread of the projections", BLUE),
        },
    ),
    Group(
        "Stability",
        "Entropies in nats: at ln K (dashed) the targets are uniform, at 0 every image has the same one; both are collapse. "
        "The gradient norm is before clipping. A spread of the features of 1 is isotropic, 0 is collapse.",
        {
            "teacher_entropy_view": ("teacher's entropy, view", ORANGE),
            "teacher_entropy_region": ("teacher's entropy, region", GREEN),
            "student_entropy_view": ("student's entropy, view", ORANGE),
            "student_entropy_region": ("student's entropy, region", GREEN),
            "prototypes_used_view": ("prototypes in use, view", ORANGE),
            "prototypes_used_region": ("prototypes in use, region", GREEN),
            "center_norm_view": ("norm of the centre, view", ORANGE),
            "center_norm_region": ("norm of the centre, region", GREEN),
            "grad_norm": ("gradient norm", VIOLET),
            "feature_std": ("spread of the features", BLUE),
            "rank_me": ("effective rank of the features", BLUE),
            "skipped_steps": ("skipped steps", GREY),
            "bad_samples": ("bad samples", GREY),
        },
    ),
    Group(
        "Speed",
        "MFU (model FLOPs utilisation) is the fraction of the device's rate on large matrix products that training reached. "
        "The wait for data is the time in a step during which the device had no batch to work on.",
        {
            "images_per_s": ("images per second", GREEN),
            "data_wait_s": ("wait for data, seconds per step", ORANGE),
            "mfu": ("MFU", BLUE),
            "step_s": ("seconds per step", VIOLET),
            "save_s": ("seconds stopped for checkpoints", GREY),
            "mirror_lag_steps": ("steps that the mirror's checkpoint is behind", GREY),
            "peak_memory_gib": ("peak memory of a rank, GiB", BLUE),
            "compute_s_max": ("seconds of computing, slowest rank", VIOLET),
            "compute_s_median": ("seconds of computing, median rank", VIOLET),
            "worker_images_per_s": ("images per second of a loader process", ORANGE),
            "worker_images_per_s_min": ("… of the slowest loader process", ORANGE),
        },
    ),
    Group(
        "Schedules",
        "Settings that change during the run by plan.",
        {
            "lr": ("learning rate", BLUE),
            "wd": ("weight decay", BLUE),
            "momentum": ("teacher momentum", BLUE),
            "teacher_temp": ("teacher temperature", BLUE),
        },
    ),
)
BY_PART = {  # prefix of column names → title, caption and colour of the group of all such columns
    "grad_norm_": (
        "Gradients by part",
        "Gradient norms before clipping. A spike that begins in the patch embedding and reaches the last layer some steps "
        "later is the instability that MoCo v3 describes.",
        VIOLET,
    ),
    "update_ratio_": (
        "Updates by part",
        "The norm of a step's update of each part's largest matrix, divided by the norm of the matrix. About 1e-3 is usual; a "
        "part far from the others learns too fast or not at all.",
        BLUE,
    ),
}
FROM_ZERO = {
    "images_per_s",
    "data_wait_s",
    "mfu",
    "step_s",
    "save_s",
    "mirror_lag_steps",
    "peak_memory_gib",
    "skipped_steps",
    "feature_std",
    "rank_me",
    "knn_top1",
}
PLANNED = {
    "lr",
    "wd",
    "momentum",
    "teacher_temp",
    "skipped_steps",
    "bad_samples",
}  # curves that are drawn without smoothing
SAME_SCALE = ({"loss", "loss_view", "loss_region"}, {"teacher_entropy_view", "teacher_entropy_region"})


def groups(runs: Sequence[RunFiles], names: Sequence[str], missing: list[str]) -> list[dict[str, Any]]:
    """Return the groups of figures for the template: title, caption and figures, without groups that no run logged.

    A column that is in no group is drawn under "Other". A column of EXPECTED that no run logged is noted in `missing`.

    Args:
        names: the runs' names on the page, in the order of `runs`.
    """
    logged = {name: None for run in runs for name, values in run.columns.items() if np.isfinite(values).any()}
    by_part = [_group_of_parts(prefix, *words, logged) for prefix, words in BY_PART.items()]
    known = {column for group in (*GROUPS, *by_part) for column in group.columns}
    others = sorted(logged.keys() - known - set(NOT_DRAWN))
    all_groups = [
        *GROUPS[:5],
        *by_part,
        *GROUPS[5:],
        Group("Other", "More columns of metrics.jsonl, by their names there.", {o: (o, GREY) for o in others}),
    ]
    shown = []
    for group in all_groups:
        there = {column: title for column, title in group.columns.items() if column in logged}
        in_a_row = 4 if len(there) == 4 else 3
        figures = [
            {
                "title": title,
                "column": column,
                "image": _figure(runs, names, column, colour, in_a_row),
                "alt": f"{title} against the step: {_described(runs, names, column)}",
            }
            for column, (title, colour) in there.items()
        ]
        if figures:
            warning = baselines.different_images(list(zip(names, runs, strict=True))) if "knn_top1" in there else ""
            fields = {"title": group.title, "caption": group.caption, "warning": warning}
            shown.append({**fields, "figures": figures, "in_a_row": in_a_row})
        absent = [t for column, (t, _) in group.columns.items() if column in EXPECTED - logged.keys()]
        if absent and logged:
            missing.append(f"{group.title}: not logged in metrics.jsonl: {', '.join(absent)}")
    return shown


def by_layer(runs: Sequence[RunFiles], names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Draw the instability figure (instability.py) of every run that logged gradient norms by layer.

    Returns:
        The runs' names, figures as data URIs, and texts for readers who cannot see the figures.
    """
    found = []
    for run, name in zip(runs, names, strict=True):
        titles = {part: part_in_words(part) for part in instability.layers(run.columns)}
        if (png := instability.heat_map(run.columns, titles)) is not None:
            found.append((name, sample_images.data_uri(png, "image/png"), instability.in_words(run.columns, titles)))
    return found


def part_in_words(part: str) -> str:
    """Return the title of a part of the network: "stage 3" for "stage3", "view head" for "view_head"."""
    return PARTS.get(part, re.sub(r"(\d+)", r" \1", part.replace("_", " ")))


def _group_of_parts(prefix: str, title: str, caption: str, colour: str, logged: Iterable[str]) -> Group:
    names = sorted(
        (name for name in logged if name.startswith(prefix)), key=lambda n: instability.place(n.removeprefix(prefix))
    )
    parts = {name: part_in_words(name.removeprefix(prefix)) for name in names}
    return Group(title, caption, {name: (words, colour) for name, words in parts.items()})


def colours(runs: Sequence[RunFiles]) -> list[str]:
    """Return one colour per run; colours repeat when there are many runs."""
    return [RUN_COLOURS[i % len(RUN_COLOURS)] for i in range(len(runs))]


def _described(runs: Sequence[RunFiles], names: Sequence[str], column: str) -> str:
    """Return the first, last, smallest and largest values of a curve in words; of several curves, the last values."""
    parts = []
    for run, name in zip(runs, names, strict=True):
        values = run.columns.get(column, np.empty(0))
        there = np.flatnonzero(np.isfinite(values))
        if not len(there):
            continue
        steps = run.columns.get("step", np.arange(1.0, len(values) + 1))
        last = f"{values[there[-1]]:.4g} at step {steps[there[-1]]:,.0f}"
        if len(runs) > 1:
            parts.append(f"{name} {last}")
            continue
        known = values[there]
        parts += [f"{known[0]:.4g} at step {steps[there[0]]:,.0f}", last]
        parts += [f"smallest {known.min():.4g}", f"largest {known.max():.4g}"]
    marks = baselines.marks(runs) if column == "knn_top1" else ()
    return ", ".join([*parts, *(f"{name} {value:.4g}" for name, value in marks)])


def _figure(runs: Sequence[RunFiles], names: Sequence[str], column: str, colour: str, in_a_row: int) -> str:
    by_images = len({run.config.train.global_batch for run in runs if run.config}) > 1
    x = "images_seen" if by_images and all("images_seen" in run.columns for run in runs) else "step"
    run_colours = colours(runs) if len(runs) > 1 else [colour]
    curves = [
        Curve(name, run.columns, run_colour)
        for run, name, run_colour in zip(runs, names, run_colours, strict=True)
        if column in run.columns
    ]
    limits = {run.config.objective.prototypes for run in runs if run.config} if "entropy" in column else set()
    panel = Panel(
        column,
        x,
        from_zero=column in FROM_ZERO,
        noisy=column not in PLANNED,
        limits=_range(runs, column),
        prototypes=min(limits, default=None),
        in_a_row=in_a_row,
        marks=baselines.marks(runs) if column == "knn_top1" else (),
    )
    return sample_images.data_uri(plots.panel(curves, panel), "image/png")


def _range(runs: Sequence[RunFiles], column: str) -> tuple[float, float] | None:
    """Return the limits of a column's y axis, common to the columns of its family in SAME_SCALE; None without one."""
    family = next((f for f in SAME_SCALE if column in f), None)
    if family is None:
        return None
    values = [v[np.isfinite(v)] for run in runs for name, v in run.columns.items() if name in family]
    low, high = min(v.min() for v in values if len(v)), max(v.max() for v in values if len(v))
    reach = 0.04 * (high - low)
    return float(low - reach), float(high + reach)
