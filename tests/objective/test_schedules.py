"""Against the official tables, re-derived here with numpy as the official code builds them."""

import math

import numpy as np
import pytest

from esvit_scale.config import validate
from esvit_scale.objective.schedules import Schedules


def table(base, end, epochs, per_epoch, warmup_epochs=0):
    warmup = warmup_epochs * per_epoch
    ramp = np.linspace(0, base, warmup) if warmup_epochs else np.array([])
    n = epochs * per_epoch - warmup
    cosine = np.array([end + 0.5 * (base - end) * (1 + math.cos(math.pi * i / n)) for i in range(n)])
    values = np.concatenate((ramp, cosine))
    assert len(values) == epochs * per_epoch
    return values


def schedules(per_epoch=7, **sections):
    return Schedules(validate(sections, where="test"), per_epoch)


@pytest.mark.parametrize(("epochs", "per_epoch", "warmup"), [(20, 7, 3), (5, 1, 1), (4, 3, 0), (6, 5, 6), (300, 2, 10)])
def test_schedules_equal_the_official_tables(epochs, per_epoch, warmup):
    s = schedules(per_epoch, train={"epochs": epochs, "global_batch": 128}, optim={"warmup_epochs": warmup})
    steps = range(epochs * per_epoch)
    assert s.total_steps == len(steps)
    assert [s.lr(i) for i in steps] == pytest.approx(table(5e-4 / 2, 1e-6, epochs, per_epoch, warmup), rel=1e-14)
    assert [s.weight_decay(i) for i in steps] == pytest.approx(table(0.04, 0.4, epochs, per_epoch), rel=1e-14)
    assert [s.ema_momentum(i) for i in steps] == pytest.approx(table(0.996, 1, epochs, per_epoch), rel=1e-14)


@pytest.mark.parametrize(("warmup", "epochs"), [(30, 40), (1, 3), (0, 3), (2, 2)])
def test_teacher_temperature_changes_once_per_epoch(warmup, epochs):
    s = schedules(train={"epochs": epochs}, objective={"teacher_temp_warmup_epochs": warmup})
    stairs = np.concatenate((np.linspace(0.04, 0.07, warmup), np.ones(epochs - warmup) * 0.07))
    assert [s.teacher_temp(i) for i in range(epochs * 7)] == pytest.approx(np.repeat(stairs, 7), rel=1e-14)


def test_learning_rate_changes_within_an_epoch():
    s = schedules()
    assert s.lr(7) != s.lr(8)
    assert s.teacher_temp(7) == s.teacher_temp(13) != s.teacher_temp(14)


@pytest.mark.parametrize("epochs", [0, 1, 2])
def test_last_layer_is_frozen_for_whole_epochs(epochs):
    s = schedules(optim={"freeze_last_layer_epochs": epochs})
    assert [s.last_layer_frozen(i) for i in range(21)] == [i < 7 * epochs for i in range(21)]


def test_steps_replace_epochs_as_the_length():
    s = schedules(train={"steps": 50, "epochs": 300}, optim={"warmup_epochs": 2})
    assert s.total_steps == 50
    assert s.weight_decay(50) == pytest.approx(0.4)
    assert s.lr(13) == s.config.peak_lr
    assert s.lr(50) == pytest.approx(1e-6)


def test_run_shorter_than_warmup_equals_the_start_of_a_longer_run():
    short, long = schedules(train={"steps": 20}), schedules(train={"epochs": 300})
    assert [short.lr(i) for i in range(20)] == [long.lr(i) for i in range(20)]


def test_schedule_of_one_step_is_valid():
    s = schedules(per_epoch=1, train={"steps": 1}, optim={"warmup_epochs": 0})
    assert (s.lr(0), s.weight_decay(0), s.ema_momentum(0)) == pytest.approx((s.config.peak_lr, 0.04, 0.996))
    assert schedules(per_epoch=1, train={"steps": 1}, optim={"warmup_epochs": 1}).lr(0) == 0


def test_constant_schedules_agree_until_cooldown():
    values = {"optim": {"schedule": "constant", "cooldown": 0.25, "warmup_epochs": 1, "weight_decay_end": 0.1}}
    short, long = (Schedules(validate(values | {"train": {"steps": steps}}, where="test"), 5) for steps in (40, 80))
    for name, end in (("lr", 1e-6), ("weight_decay", 0.1), ("ema_momentum", 1.0)):
        a, b = ([getattr(s, name)(step) for step in range(s.total_steps + 1)] for s in (short, long))
        assert a[:31] == b[:31]
        assert a[5:31] == [a[5]] * 26
        assert a[40] == pytest.approx(end)
        assert a[35] == pytest.approx((a[5] + end) / 2)
        assert b[31:60] == [a[5]] * 29


def test_trunk_warms_up_when_it_is_no_longer_frozen():
    s = schedules(train={"steps": 70}, optim={"warmup_epochs": 2, "freeze_trunk_steps": 20})
    assert [s.trunk_frozen(i) for i in range(70)] == [i < 20 for i in range(70)]
    assert [s.trunk_lr(i) for i in range(20, 30)] == [s.lr(i - 20) for i in range(20, 30)]  # its beginning is the run's
    assert s.lr(29) > s.trunk_lr(29) > 0.6 * s.config.peak_lr
    assert [s.trunk_lr(i) for i in range(34, 70)] == [s.lr(i) for i in range(34, 70)]
    assert all(s.trunk_lr(i) <= s.lr(i) for i in range(70))
    plain = schedules(train={"steps": 70}, optim={"warmup_epochs": 2})
    assert [plain.trunk_lr(i) for i in range(70)] == [plain.lr(i) for i in range(70)]
    assert not plain.trunk_frozen(0)
