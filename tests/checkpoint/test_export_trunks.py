"""Trunks other than Swin in the hands of timm, onnxruntime and `load_backbone`, with their model cards."""

import re
from pathlib import Path

import pytest
import torch

import esvit_scale
from esvit_scale.checkpoint import libraries
from esvit_scale.checkpoint.convert import convert
from esvit_scale.data import stream
from esvit_scale.errors import UserError
from tests.checkpoint.test_export import features, images, step_of

DEIT = {"trunk": "deit_s", "embed_dim": 32, "depths": [2], "heads": [2]}
RESNET = {"trunk": "resnet50", "depths": [1, 1, 1, 1], "drop_path": 0.0}
ATTO = {"trunk": "timm:convnext_atto"}
TIMM_VIT = {"trunk": "timm:test_vit"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "size"),
    [(DEIT, 224), (DEIT, 160), ({**DEIT, "trunk": "vit_s_moco"}, 96), (RESNET, 96), (ATTO, 96), (TIMM_VIT, 96)],
    ids=["deit", "deit at 160", "moco", "resnet", "convnext", "timm's vit"],
)
def test_timm_export_has_the_same_features(tmp_path: Path, model: dict, size: int) -> None:
    timm = pytest.importorskip("timm")
    source = step_of(tmp_path, model, size)
    convert(source, tmp_path / "timm", "esvit-scale", "timm")
    other = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    x = images(2, size)
    view, regions = features(source, x)
    assert view.abs().max() > 0.5
    torch.testing.assert_close(other(x), view, rtol=1e-6, atol=1e-6 * float(view.abs().max()))
    cells = other.forward_features(x)
    if cells.dim() == 3:
        cells = cells[:, 1:].flatten(0, 1)
    elif model is ATTO:
        cells = other.head.norm(cells).permute(0, 2, 3, 1).flatten(0, 2)
    else:
        cells = cells.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(cells, regions, rtol=1e-5, atol=1e-5 * float(regions.abs().max()))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(other))
    assert f"Resize(size={stream.evaluation_side(size)}," in str(transform)
    assert re.search(rf"CenterCrop\(size=.{size}, {size}", str(transform))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        pytest.param(DEIT, 32, id="deit", marks=pytest.mark.slow),
        pytest.param(RESNET, 32, id="resnet", marks=pytest.mark.slow),
        pytest.param(ATTO, 64, id="timm's convnext", marks=pytest.mark.slow),
    ],
)
def test_onnx_export_has_the_same_features_for_any_batch(tmp_path: Path, model: dict, size: int) -> None:
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed (the extra `export`)")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `export`)")
    source = step_of(tmp_path, model, size)
    convert(source, tmp_path / "onnx", "esvit-scale", "onnx")
    session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    for n in (1, 2, 5):
        x = images(n, size)
        view, regions = session.run(None, {"images": x.numpy()})
        expected = features(source, x)
        for found, wanted in ((view, expected[0]), (regions.reshape(-1, regions.shape[-1]), expected[1])):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model", [DEIT, RESNET, ATTO], ids=["deit", "resnet", "timm's convnext"])
def test_exported_folder_loads_and_has_a_model_card(tmp_path: Path, model: dict) -> None:
    source = step_of(tmp_path, model, 96)
    convert(source, tmp_path / "folder", "esvit-scale", "safetensors")
    x = images(1, 96)
    expected, regions = features(source, x)
    backbone = esvit_scale.load_backbone(tmp_path / "folder")
    torch.testing.assert_close(backbone(x), expected)
    torch.testing.assert_close(backbone.regions(x).permute(0, 2, 3, 1).flatten(0, 2), regions)
    if backbone.channels:
        assert [m.shape[1] for m in backbone.pyramid(x)] == backbone.channels
    else:
        with pytest.raises(UserError, match="needs a trunk with stages"):
            backbone.pyramid(x)
    convert(source, tmp_path / "timm", "esvit-scale", "timm")
    for folder in ("folder", "timm"):
        card = (tmp_path / folder / "README.md").read_text()
        assert f"A {model['trunk']} (features of width {backbone.dim}" in card
        assert f"({sum(p.numel() for p in backbone.parameters()):,} parameters)" in card
        assert "window" not in card.lower()
        assert "- swin" not in card
        assert "pyramid" not in card or backbone.channels
        compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    ("model", "size", "form", "match"),
    [
        (
            DEIT,
            96,
            "huggingface",
            r"no form of deit_s is written for transformers; use --to timm, safetensors or onnx",
        ),
        (DEIT, 100, "timm", r"100 pixels are no multiple of 16; use --to safetensors or onnx"),
        (DEIT, 100, "huggingface", r"deit_s is written for transformers; use --to safetensors or onnx"),
        (
            {**RESNET, "embed_dim": 16},
            96,
            "timm",
            r"resnet50 has 4 stages and a stem of 64 channels; use --to safetensors",
        ),
        (
            ATTO,
            96,
            "huggingface",
            r"timm:convnext_atto is written for transformers; use --to timm, safetensors or onnx",
        ),
    ],
)
def test_trunk_that_a_form_cannot_hold_is_refused(
    tmp_path: Path, model: dict, size: int, form: str, match: str
) -> None:
    from esvit_scale import config as configs

    values = {"model": model, "data": {"global_crops": {"size": size}, "local_crops": []}}
    with pytest.raises(UserError, match=match) as error:
        libraries.check(configs.validate(values, where="test"), form)
    assert "\n" not in str(error.value)
