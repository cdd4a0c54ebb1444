"""`model.attention` in a run: what is refused, chosen, recorded, and kept on resume."""

import importlib
import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from esvit_scale.errors import UserError
from esvit_scale.models import attention_choice, window_attention_implementations
from esvit_scale.models.implementation_choice import Outcome
from esvit_scale.parallel import world as worlds
from esvit_scale.parallel.world import World
from esvit_scale.train import attention, pretraining, recorded_choice
from esvit_scale.train.attention import AttentionChoice
from tests import launcher, tiny

CPU = torch.device("cpu")
WORLD = World(0, 1, 0, CPU)


@pytest.fixture
def gpu(monkeypatch):
    """Let `attention` believe that the CPU is a GPU named A; choices come from `outcomes`."""
    names = {"name": "A"}
    monkeypatch.setattr(recorded_choice, "device_name", lambda device: names["name"])
    monkeypatch.setattr(recorded_choice, "on_cpu", lambda device: False)
    monkeypatch.setattr(attention, "unavailable", lambda name, device: None)
    outcome = Outcome("sdpa", {"sdpa": 1.0, "math": 2.5}, {"flex": "RuntimeError: none"})
    monkeypatch.setattr(attention_choice, "choose", lambda *_: outcome)
    return names


@pytest.mark.parametrize("name", ["flex", "triton"])
def test_gpu_implementations_are_refused_on_a_cpu(name, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = tiny.config(tmp_path / "run", tmp_path, model__attention=name)
    with pytest.raises(UserError) as error:
        AttentionChoice(config, WORLD).check()
    message = str(error.value)
    assert message.startswith(f"model.attention={name}: needs ")
    assert message.endswith("; nearest: math")
    assert "\n" not in message


def test_trunks_without_window_attention_have_no_choice(tmp_path):
    shape = dict.fromkeys(("model__embed_dim", "model__depths", "model__heads"))
    config = tiny.config(tmp_path, tmp_path, model__trunk="deit_s", model__attention="sdpa", **shape)
    with pytest.raises(UserError, match=r"deit_s has no window attention of ours; nearest: auto"):
        AttentionChoice(config, WORLD).check()


def test_auto_on_a_cpu_is_math_without_a_record(tmp_path):
    config = tiny.config(tmp_path, tmp_path)
    assert AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=False) == "math"
    assert not (tmp_path / AttentionChoice.file).exists()


def test_the_choice_is_logged_recorded_and_kept(tmp_path, gpu, monkeypatch, caplog):
    config = tiny.config(tmp_path, tmp_path)
    with caplog.at_level(logging.INFO, "esvit_scale"):
        assert AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=False) == "sdpa"
    [record] = caplog.records
    assert record.message == (
        "window attention: sdpa (of a micro-batch: sdpa 1.0 ms, math 2.5 ms; flex not used: RuntimeError: none)"
    )
    written = json.loads((tmp_path / AttentionChoice.file).read_text())
    assert (written["attention"], written["device"]) == ("sdpa", "A")
    monkeypatch.setattr(attention_choice, "choose", lambda *_: pytest.fail("chosen again"))
    caplog.clear()
    assert AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=True) == "sdpa"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    gpu["name"] = "B"
    assert AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=True) == "sdpa"
    assert "this run was on A and continues on B: its numbers change" in caplog.text


@pytest.mark.parametrize("changed", ["device", "torch"])
@pytest.mark.parametrize(("problem", "expected"), [(None, "flex"), ("its output is off", "sdpa")])
def test_a_recorded_choice_is_checked_again_on_another_machine(changed, problem, expected, tmp_path, gpu, monkeypatch):
    config = tiny.config(tmp_path, tmp_path)
    sizes = AttentionChoice(config, WORLD).sizes
    record = {"attention": "flex", "device": "A", "torch": torch.__version__, "why": "flex 1.0 ms", "sizes": sizes}
    (tmp_path / AttentionChoice.file).write_text(json.dumps(record | {changed: "another"}))
    monkeypatch.setattr(attention_choice, "inaccuracy", lambda *_: problem)
    assert AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=True) == expected
    written = json.loads((tmp_path / AttentionChoice.file).read_text())
    assert written["device"] == "A"
    assert written["attention"] == expected
    assert (written == record) is (problem is None)  # the times by which it was chosen are kept


@pytest.mark.parametrize(("key", "value"), [("model__window", 6), ("data__global_crops__size", 128)])
def test_a_training_stage_with_other_sizes_chooses_again_and_keeps_that(key, value, tmp_path, gpu, monkeypatch):
    record = {"attention": "flex", "device": "A", "torch": torch.__version__, "why": "flex 1.0 ms"}
    record["sizes"] = AttentionChoice(tiny.config(tmp_path, tmp_path), WORLD).sizes
    (tmp_path / AttentionChoice.file).write_text(json.dumps(record))
    later = AttentionChoice(tiny.config(tmp_path, tmp_path, **{key: value}), WORLD)
    assert later.choose_for_run(tmp_path, resumed=True) == "sdpa"
    monkeypatch.setattr(attention_choice, "choose", lambda *_: pytest.fail("chosen again"))
    assert later.choose_for_run(tmp_path, resumed=True) == "sdpa"


def test_step_of_the_benchmarks_uses_the_implementation_of_its_config(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(launcher.REPOSITORY / "benchmarks")
    step, calls, sdpa = importlib.import_module("step"), [], window_attention_implementations.attend_sdpa
    spy = lambda *inputs: calls.append(inputs) or sdpa(*inputs)  # noqa: E731
    monkeypatch.setattr(window_attention_implementations, "attend_sdpa", spy)
    monkeypatch.setattr(attention_choice, "inaccuracy", lambda *_: None)
    config = tiny.config(tmp_path, tmp_path, model__attention="sdpa")
    world = worlds.start()
    step.our_step(config, world, step.random_crops(config, 8, world.device))()
    assert len(calls) == 2 * 4  # four blocks, of teacher and student


def test_a_run_from_before_the_record_keeps_math(tmp_path, gpu):
    config = tiny.config(tmp_path, tmp_path)
    assert AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=True) == "math"


def test_a_damaged_record_is_chosen_again(tmp_path, gpu, caplog):
    (tmp_path / AttentionChoice.file).write_text('{"attention": "fast"}')
    config = tiny.config(tmp_path, tmp_path)
    assert AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=False) == "sdpa"
    assert "cannot be read; window attention is chosen again" in caplog.text


def test_a_named_implementation_that_is_wrong_is_refused(tmp_path, gpu, monkeypatch):
    config = tiny.config(tmp_path, tmp_path, model__attention="sdpa")
    monkeypatch.setattr(attention_choice, "inaccuracy", lambda *_: "its output is off by 1.0e+00")
    with pytest.raises(
        UserError, match=r"model\.attention=sdpa: cannot be used here: its output is off.*nearest: auto"
    ):
        AttentionChoice(config, WORLD).choose_for_run(tmp_path, resumed=False)


@pytest.mark.slow
def test_a_run_with_sdpa_has_the_losses_of_math(tmp_path):
    shards = tiny.shards(tmp_path / "shards")
    for name in ("auto", "sdpa"):
        values = {"model__attention": name, "model__drop_path": 0.2, "train__steps": 4, "train__ds_config": "zero3"}
        config = tiny.config(tmp_path / name, shards, train__activation_checkpointing="torch", **values)
        assert pretraining.pretrain(config) == 0
    for row, expected in zip(tiny.rows(tmp_path / "sdpa"), tiny.rows(tmp_path / "auto"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert json.loads((tmp_path / "sdpa" / AttentionChoice.file).read_text())["attention"] == "sdpa"


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize("trunk", ["swin_t", pytest.param("swinv2_t", marks=pytest.mark.long)])
def test_a_run_with_interpreted_kernels_has_the_losses_of_math(trunk, tmp_path):
    """At ZeRO 3, with activation checkpointing and stochastic depth: the whole way of the kernels into a run."""
    shards = tiny.shards(tmp_path / "shards")
    small = {"train__steps": 2, "train__global_batch": 2, "model__depths": [1, 2], "model__heads": [1, 2]}
    for name in ("math", "triton"):
        values = {**small, "model__attention": name, "model__trunk": trunk, "model__drop_path": 0.2}
        values["train__activation_checkpointing"] = "torch"
        config = tiny.config(tmp_path / name, shards, train__ds_config="zero3", **values)
        if name == "math":
            assert pretraining.pretrain(config) == 0
            continue
        path = tiny.write_config(tmp_path / "triton.yaml", config)
        command = [sys.executable, "-m", "esvit_scale", "pretrain", str(path)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}  # which Triton reads when it is imported
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=launcher.REPOSITORY)
        assert ran.returncode == 0, ran.stderr[-3000:]
    for row, expected in zip(tiny.rows(tmp_path / "triton"), tiny.rows(tmp_path / "math"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
