import math

import pytest

from esvit_scale.train.monitors import Monitors

K = 1000


def row(step: int, **values: float) -> dict[str, float]:
    return {
        "step": step,
        "grad_norm": 1.0,
        "teacher_entropy_view": 3.0,
        "teacher_entropy_region": 3.0,
        "feature_std": 0.5,
    } | values


def said(monitors: Monitors, steps: range, **values: float) -> list[str]:
    return [sentence for step in steps for sentence in monitors.observe(row(step, **values))]


def test_healthy_run_gives_no_warning() -> None:
    assert said(Monitors(K, 8), range(100)) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_entropy_region": math.log(K)}, "the teacher's region targets are uniform since step 10"),
        ({"teacher_entropy_view": 0.01}, "the teacher's view targets are single prototypes since step 10"),
        ({"feature_std": 0.01}, "the student's features have collapsed since step 10"),
        ({"prototypes_used_view": 1.2}, "the teacher's view targets share a few prototypes since step 10"),
        ({"rank_me": 1.1}, "the student's features lie on a line since step 10"),
    ],
)
def test_collapse_is_reported_once_at_its_start_and_end(values: dict[str, float], words: str) -> None:
    monitors = Monitors(K, 8)
    assert said(monitors, range(10)) == []
    (sentence,) = said(monitors, range(10, 60), **values)
    assert sentence.startswith(words)
    assert "try " in sentence
    (end,) = said(monitors, range(60, 90))
    assert end.startswith("no longer: ")
    assert end.endswith("(step 60)")


def test_one_bad_row_gives_no_warning() -> None:
    monitors = Monitors(K, 8)
    said(monitors, range(10))
    assert said(monitors, range(10, 13), feature_std=0.0) == []
    assert said(monitors, range(13, 30)) == []


def test_gradient_spike_is_reported_at_once() -> None:
    monitors = Monitors(K, 8)
    said(monitors, range(20))
    (sentence,) = said(monitors, range(20, 21), grad_norm=50.0)
    assert "gradient spike at step 20: norm 50, 50 times the median" in sentence
    assert said(monitors, range(21, 40)) == []


def test_view_loss_alone_gives_no_region_warning() -> None:
    monitors = Monitors(K, 8)
    for step in range(20):
        assert monitors.observe({"step": step, "grad_norm": 1.0, "teacher_entropy_view": 3.0}) == []


def test_small_micro_batches_may_share_targets() -> None:
    assert said(Monitors(K, 2), range(60), prototypes_used_view=1.2) == []


def test_spike_warning_names_the_part_of_the_network() -> None:
    monitors = Monitors(K, 8)
    said(monitors, range(20))
    (sentence,) = said(monitors, range(20, 21), grad_norm=50.0, grad_norm_patch_embed=49.0, grad_norm_stage1=3.0)
    assert "most of it in patch_embed" in sentence
    assert "model.freeze_patch_embed=true" in sentence
    frozen = Monitors(K, 8, frozen=True)
    said(frozen, range(20))
    (sentence,) = said(frozen, range(20, 21), grad_norm=50.0)
    assert "freeze" not in sentence  # it is


def test_accuracy_dip_is_reported() -> None:
    monitors = Monitors(K, 8)
    assert [said(monitors, range(i, i + 1), knn_top1=top1) for i, top1 in enumerate([0.2, 0.4, 0.36])] == [[], [], []]
    (sentence,) = said(monitors, range(3, 4), knn_top1=0.25)
    assert "fell to 25.0 % at step 3, from 40.0 %" in sentence
    assert said(monitors, range(4, 5), knn_top1=0.2) == []  # said already
    assert said(monitors, range(5, 6), knn_top1=0.38) == []  # over
    assert len(said(monitors, range(6, 7), knn_top1=0.3)) == 1
