"""`objective.prototype_loss` in a run: what is refused, chosen and recorded. tests/train/test_attention.py has the rest."""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from esvit_scale.errors import UserError
from esvit_scale.models.implementation_choice import Outcome
from esvit_scale.objective import prototype_choice
from esvit_scale.parallel.world import World
from esvit_scale.train import implementations, pretraining, prototype_loss, recorded_choice
from esvit_scale.train.implementations import PLAIN
from esvit_scale.train.prototype_loss import PrototypeLossChoice
from tests import launcher, tiny

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def timed(monkeypatch):
    """Let the choice believe that the CPU is a GPU; what it would time stands in the list that is returned."""
    monkeypatch.setattr(recorded_choice, "device_name", lambda device: "A")
    monkeypatch.setattr(recorded_choice, "on_cpu", lambda device: False)
    monkeypatch.setattr(prototype_loss, "unavailable", lambda *_: None)
    calls = []

    def choose(names, shapes, dtype, device):
        calls.append((names, shapes, dtype))
        return Outcome("triton", {"triton": 1.0, "tiles": 9.0}, {})

    monkeypatch.setattr(prototype_choice, "choose", choose)
    return calls


def test_triton_is_refused_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = tiny.config(tmp_path / "run", tmp_path, objective__prototype_loss="triton")
    with pytest.raises(UserError, match=r"^objective\.prototype_loss=triton: needs .*; nearest: tiles$"):
        implementations.check(config, WORLD)


def test_objectives_without_prototypes_have_no_choice(tmp_path, timed):
    values = {"objective__name": "simsiam", "objective__regions": False, "data__local_crops": []}
    values |= {"objective__ema_momentum": 0.0, "objective__ema_momentum_end": 0.0}
    config = tiny.config(tmp_path, tmp_path, objective__prototype_loss="triton", **values)
    with pytest.raises(UserError, match=r"simsiam has no loss over prototypes; nearest: auto"):
        implementations.check(config, WORLD)


def test_auto_on_a_cpu_is_plain_without_records(tmp_path):
    config = tiny.config(tmp_path, tmp_path)
    assert implementations.choose_for_run(config, WORLD, tmp_path, resumed=False) == PLAIN
    assert implementations.choose(config, WORLD) == PLAIN
    assert not list(tmp_path.iterdir())


def test_the_choice_is_timed_on_the_tokens_of_a_micro_batch_and_recorded(tmp_path, timed, caplog):
    config = tiny.config(tmp_path, tmp_path, train__precision="bf16")
    with caplog.at_level(logging.INFO, "esvit_scale"):
        assert PrototypeLossChoice(config, WORLD).choose_for_run(tmp_path, resumed=False) == "triton"
    assert caplog.messages == ["prototype loss: triton (of a micro-batch: triton 1.0 ms, tiles 9.0 ms)"]
    record = json.loads((tmp_path / "prototype_loss.json").read_text())
    assert (record["prototype_loss"], record["device"]) == ("triton", "A")
    [(names, (view, region), dtype)] = timed
    assert names == ["tiles", "triton"]
    assert dtype == torch.bfloat16
    images, crops = config.train.global_batch // config.train.grad_accum, len(config.crop_sizes)
    assert (view.students, view.teachers) == (crops * images, 2 * images)
    assert (view.prototypes, view.bottleneck) == (config.objective.prototypes, config.objective.bottleneck)
    assert region.students > region.teachers > view.teachers
    assert PrototypeLossChoice(config, WORLD).choose_for_run(tmp_path, resumed=True) == "triton"
    assert len(timed) == 1


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
def test_a_run_with_interpreted_kernels_has_the_losses_of_tiles(tmp_path):
    """With Sinkhorn's passes, which use the kernels too; few prototypes and tokens, as each tile takes milliseconds."""
    shards = tiny.shards(tmp_path / "shards")
    small = {"train__steps": 2, "train__global_batch": 2, "model__depths": [1, 1], "model__heads": [1, 2]}
    small |= {"objective__prototypes": 40, "objective__centering": "sinkhorn"}
    for name in ("tiles", "triton"):
        config = tiny.config(tmp_path / name, shards, **small, objective__prototype_loss=name)
        if name == "tiles":
            assert pretraining.pretrain(config) == 0
            continue
        path = tiny.write_config(tmp_path / "triton.yaml", config)
        command = [sys.executable, "-m", "esvit_scale", "pretrain", str(path)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}  # which Triton reads when it is imported
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=launcher.REPOSITORY)
        assert ran.returncode == 0, ran.stderr[-3000:]
    for row, expected in zip(tiny.rows(tmp_path / "triton"), tiny.rows(tmp_path / "tiles"), strict=True):
        for key in ("loss", "teacher_entropy_region", "student_entropy_view", "prototypes_used_region"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
