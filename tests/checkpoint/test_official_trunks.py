"""Official checkpoints of CvT, ViL, DeiT and ResNet, by names and shapes of the official code's own state dicts: every
tensor arrives under its name, and goes back under it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esvit_scale.checkpoint import official, official_trunks
from esvit_scale.checkpoint.convert import convert
from esvit_scale.checkpoint.state import load_teacher
from esvit_scale.errors import UserError
from esvit_scale.models.registry import TRUNKS
from tests.models.rule import by_hash

NAMES = json.loads((Path(__file__).parent / "fixtures" / "official_trunk_names.json").read_text())
HERE = [trunk for trunk in NAMES if trunk in TRUNKS]


def content(trunk: str) -> dict[str, Any]:
    names, prefix = NAMES[trunk]["student"], NAMES[trunk]["teacher_prefix"]
    networks = {
        n: {name: value(n, name, shape, names) for name, shape in names.items()} for n in ("student", "teacher")
    }
    networks["teacher"] = {prefix + name.removeprefix("module."): t for name, t in networks["teacher"].items()}
    return networks | {"dino_loss": {name: by_hash(name, (1, 12)).float() for name in ("center", "center_grid")}}


def value(network: str, name: str, shape: list[int], names: dict[str, list[int]]) -> Tensor:
    if name.endswith("relative_position_index"):
        around = shape[1] // shape[0]  # nine windows, or the map alone
        side = round(shape[0] ** 0.5)
        yx = [divmod(i, side) for i in range(side * side)]
        offsets = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)] if around == 9 else [(0, 0)]
        reach = 2 * side - 1 if around == 9 else side - 1
        rows = [
            [
                (y - a - down * side + reach) * (2 * reach + 1) + x - b - right * side + reach
                for down, right in offsets
                for a, b in yx
            ]
            for y, x in yx
        ]
        return torch.tensor(rows)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    return by_hash(network + name.replace("_global.", "."), tuple(shape)).float()  # shared layers are saved twice


def save(path: Path, values: dict[str, Any]) -> Path:
    torch.save(values, path)
    return path


@pytest.mark.parametrize("trunk", HERE)
def test_round_trip_keeps_every_tensor_and_name(trunk: str, tmp_path: Path) -> None:
    theirs = content(trunk)
    pth = save(tmp_path / "c.pth", theirs)
    weights = official.read(pth)
    assert weights.config.model.trunk == trunk
    names = [name for name in theirs["student"] if "_index" not in name and "num_batches" not in name]
    assert len(weights.networks["student"]) == len([name for name in names if "_global." not in name])
    convert(pth, tmp_path / "ours", "esvit", "esvit-scale")
    convert(tmp_path / "ours", tmp_path / "back.pth", "esvit-scale", "esvit")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    for part in ("student", "teacher", "dino_loss"):
        assert set(back[part]) == set(theirs[part])
        for name, tensor in theirs[part].items():
            assert back[part][name].dtype == tensor.dtype, name
            assert torch.equal(back[part][name], tensor), name


@pytest.mark.parametrize("trunk", HERE)
def test_converted_trunk_runs(trunk: str, tmp_path: Path) -> None:
    convert(save(tmp_path / "c.pth", content(trunk)), tmp_path / "t.safetensors", "esvit", "safetensors")
    loaded, _ = load_teacher(tmp_path / "t.safetensors")
    if trunk in ("cvt_s1", "resnet50"):  # whose variances the rule made negative
        buffers = {name: buffer for name, buffer in loaded.named_buffers() if name.endswith("running_var")}
        assert buffers
        for name, buffer in buffers.items():
            key = NAMES[trunk]["teacher_prefix"] + ("backbone.backbone." if trunk == "resnet50" else "") + name
            assert torch.equal(buffer, content(trunk)["teacher"][key]), name
            buffer.abs_()
    with torch.no_grad():
        assert loaded.eval()([torch.randn(2, 3, 64, 64)]).view.isfinite().all()


def test_architecture_is_inferred_from_the_shapes() -> None:
    shapes = {
        "vil_2262": {"embed_dim": 8, "depths": [1, 2, 1, 1], "heads": [1, 1, 2, 4], "window": 3},
        "cvt_s1": {"embed_dim": 4, "depths": [1, 2, 1, 1]},
        "deit_s": {"embed_dim": 64, "depths": [2], "heads": [1]},
        "resnet50": {"embed_dim": 8, "depths": [1, 2, 1, 1]},
    }
    for trunk, wanted in shapes.items():
        named, _ = official.to_our_names(content(trunk)["student"])
        values = official_trunks.config_values(Path("c.pth"), *official_trunks.identify(Path("c.pth"), named))
        assert values["model"] == {"trunk": trunk, **wanted}
        if trunk == "vil_2262":
            assert values["data"] == {"global_crops": {"size": 64}}


@pytest.mark.parametrize(
    ("width", "depth", "model"),
    [
        (384, 12, {"trunk": "deit_s"}),
        (768, 12, {"trunk": "deit_b"}),
        (192, 12, {"trunk": "deit_s", "embed_dim": 192, "depths": [12], "heads": [3]}),
    ],
)
def test_published_deit_gets_its_name(width: int, depth: int, model: dict[str, Any]) -> None:
    tensors = {f"blocks.{i}.attn.qkv.weight": torch.empty(1) for i in range(depth)}
    assert official_trunks.deit_config({"pos_embed": torch.empty(1, 197, width), **tensors})["model"] == model


def refused(values: dict[str, Any], tmp_path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        convert(save(tmp_path / "bad.pth", values), tmp_path / "out", "esvit", "esvit-scale")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_separate_layers_for_global_tokens_are_refused(tmp_path: Path) -> None:
    values = content("vil_2262")
    values["teacher"]["layer1.1.attn.kv_global.weight"] += 1
    refused(values, tmp_path, r"layers.0.blocks.0.attn.kv_global.weight: \[16, 8\] in the checkpoint, absent in")


def test_unsupported_checkpoints_are_refused(tmp_path: Path) -> None:
    values = content("cvt_s1")
    del values["teacher"]["module.stage0.0.proj.weight"]
    refused(values, tmp_path, r"a CvT of the official code, but it lacks stage0.0.proj.weight$")
    values = content("cvt_s1")
    del values["student"]["module.stage1.1.layers.1.0.fn.qkv.bn.running_mean"]
    refused(values, tmp_path, r"student: .*qkv.bn.running_mean: absent in the checkpoint, \[12\] in the model$")
    values = content("vil_2262")
    values["student"] = {name.replace("layer", "level"): t for name, t in values["student"].items()}
    refused(values, tmp_path, r"nearest: ViL, but it lacks layer1.1.attn.local_relative_position_bias_table; it has ")
