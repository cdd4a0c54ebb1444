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


def test_a_healthy_run_is_silent() -> None:
    assert said(Monitors(K), range(100)) == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"teacher_entropy_region": math.log(K)}, "the teacher's region targets are uniform since step 10"),
        ({"teacher_entropy_view": 0.01}, "the teacher's view targets are single prototypes since step 10"),
        ({"feature_std": 0.01}, "the student's features have collapsed since step 10"),
    ],
)
def test_a_collapse_is_named_once_with_its_beginning_and_its_end(values: dict[str, float], words: str) -> None:
    monitors = Monitors(K)
    assert said(monitors, range(10)) == []
    (sentence,) = said(monitors, range(10, 60), **values)
    assert sentence.startswith(words)
    assert "try " in sentence
    (end,) = said(monitors, range(60, 90))
    assert end.startswith("no longer: ")
    assert end.endswith("(step 60)")


def test_one_bad_row_is_no_collapse() -> None:
    monitors = Monitors(K)
    said(monitors, range(10))
    assert said(monitors, range(10, 13), feature_std=0.0) == []
    assert said(monitors, range(13, 30)) == []


def test_a_gradient_spike_is_named_at_once() -> None:
    monitors = Monitors(K)
    said(monitors, range(20))
    (sentence,) = said(monitors, range(20, 21), grad_norm=50.0)
    assert "gradient spike at step 20: norm 50, 50 times the median" in sentence
    assert said(monitors, range(21, 40)) == []


def test_the_view_loss_alone_has_no_region_state() -> None:
    monitors = Monitors(K)
    for step in range(20):
        assert monitors.observe({"step": step, "grad_norm": 1.0, "teacher_entropy_view": 3.0}) == []
