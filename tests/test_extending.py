"""docs/extending.md: its two examples, run as they stand there, in the training that everyone uses."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from esvit_scale import cli
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.checkpoint.convert import convert
from esvit_scale.errors import UserError
from esvit_scale.models.registry import TRUNKS
from esvit_scale.objective.registry import OBJECTIVES
from esvit_scale.train import pretraining
from tests import tiny

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
EXAMPLES = re.findall(r"```python\n(# (\S+)\n.*?)```", PAGE.read_text(), re.DOTALL)
MOST_LINES = 60  # of an example, without imports and blank lines


def loaded(file: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    [code] = [code for code, name in EXAMPLES if name == file]
    module = types.ModuleType(file.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, f"{PAGE.name}: {file}", "exec"), module.__dict__)
    return module


def trained(tmp_path: Path, run: str, **changes: Any) -> list[dict[str, Any]]:
    data = tmp_path / "shards"
    config = tiny.config(tmp_path / run, data if data.exists() else tiny.shards(data), train__steps=4, **changes)
    assert pretraining.pretrain(config) == 0
    return tiny.rows(tmp_path / run)


def check_plan(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`plan` counts it by running it, without another file that knows it."""
    capsys.readouterr()
    arguments = ["plan", str(run / "config.yaml"), "--gpus", "1", "--gpu-memory", "8G", "--tflops", "100", "--json"]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["counted"] == "traced on the meta device"


def check_exports(run: Path, tmp_path: Path) -> None:
    """Its card says what it is, its weights come back, and what other libraries do not have is refused in one line."""
    convert(run, tmp_path / "folder", "esvit-scale", "safetensors")
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "A poolformer (features of width 16, 3 blocks) backbone" in card
    assert "- poolformer" in card
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_backbone(tmp_path / "folder")(x), load_backbone(run)(x))
    trunk = load_backbone(run).trunk
    with torch.no_grad():
        view, regions = trunk.plain(32)(x)
    assert (view.shape, regions.shape) == ((2, 16), (2, 16, 16))
    with pytest.raises(UserError, match="timm has no poolformer; use --to safetensors or onnx"):
        convert(run, tmp_path / "timm", "esvit-scale", "timm")
    with pytest.raises(UserError, match="no form of poolformer is written for transformers"):
        convert(run, tmp_path / "huggingface", "esvit-scale", "huggingface")
    with pytest.raises(UserError, match="poolformer has none"):
        trunk.attention_maps(x[0])


def test_example_trunk_trains_the_same_at_every_zero_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TRUNKS, "poolformer", loaded("esvit_scale/models/poolformer.py", monkeypatch).build)
    model: dict[str, Any] = {"trunk": "poolformer", "embed_dim": 16, "depths": [3], "drop_path": 0.3}
    rows = trained(tmp_path, "plain", model=model)
    other = trained(
        tmp_path, "sharded", model=model, train__ds_config="zero3", train__activation_checkpointing="deepspeed"
    )
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in rows], abs=1e-5)
    assert {"grad_norm_embed", "grad_norm_mixers", "loss_region"} <= rows[0].keys()
    check_plan(tmp_path / "plain", capsys)
    check_exports(tmp_path / "plain", tmp_path)
    backbone = load_backbone(tmp_path / "plain")
    assert [m.shape for m in backbone.pyramid(torch.randn(2, 3, 32, 40))] == [(2, 16, 4, 5)]


def test_example_objective_trains_the_same_at_every_zero_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = loaded("esvit_scale/objective/barlow_twins.py", monkeypatch)
    monkeypatch.setitem(OBJECTIVES, "barlow_twins", module.BarlowTwins)
    changes = {
        "objective__name": "barlow_twins",
        "objective__ema_momentum": 0.0,
        "objective__ema_momentum_end": 0.0,
        "data__local_crops": [],
    }
    rows = trained(tmp_path, "plain", **changes)
    other = trained(tmp_path, "sharded", train__ds_config="zero3", **changes)
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert all(-1 <= row["correlation"] <= 1 for row in rows)
    check_plan(tmp_path / "plain", capsys)


@pytest.mark.parametrize(("code", "file"), EXAMPLES)
def test_examples_are_short(code: str, file: str) -> None:
    lines = [line for line in code.splitlines() if line and not line.startswith(("import ", "from ", "#"))]
    assert len(lines) <= MOST_LINES, f"{file}: {len(lines)} lines"


def test_page_has_both_examples() -> None:
    assert {file for _, file in EXAMPLES} == {
        "esvit_scale/models/poolformer.py",
        "esvit_scale/objective/barlow_twins.py",
    }
