"""Tests of torch.compile on the trunk's blocks (`train.compile`)."""

import shutil
from pathlib import Path

import pytest
import torch

from esvit_scale.errors import UserError
from esvit_scale.parallel import ds_config
from esvit_scale.train import pretraining
from tests import tiny


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_have_the_losses_of_eager_ones(tmp_path: Path) -> None:
    shards, few = tiny.shards(tmp_path / "shards"), {"train__steps": 5, "model__depths": [1, 2], "model__heads": [1, 2]}
    for name, compiled in (("eager", False), ("compiled", True)):
        assert pretraining.pretrain(tiny.config(tmp_path / name, shards, train__compile=compiled, **few)) == 0
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    for row, expected in zip(tiny.rows(tmp_path / "compiled"), tiny.rows(tmp_path / "eager"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_compile_at_zero_3_is_refused(tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", tmp_path, train__compile=True, train__ds_config="zero3")
    with pytest.raises(UserError, match=r"train\.compile: not possible at ZeRO 3"):
        ds_config.fill(config, 1)
