"""Register tokens of plain ViTs: a slow forward, timm's own networks, files with and without them, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import cli
from esvit_scale.checkpoint import libraries, state
from esvit_scale.checkpoint.backbone import load_backbone
from esvit_scale.checkpoint.convert import convert
from esvit_scale.checkpoint.initial_weights import load_initial_weights
from esvit_scale.checkpoint.weights import network_shapes
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initial_value, initial_values
from esvit_scale.models.registry import TRUNKS, build_trunk
from esvit_scale.models.vit import VARIANTS, Block, MoCoViT, ViT
from tests import tiny
from tests.checkpoint.test_export import features, images, step_of, weights_of
from tests.models.rule import by_hash, fill
from tests.test_conformance import SMALL

MODEL: dict[str, Any] = {"trunk": "deit_s", "embed_dim": 32, "depths": [2], "heads": [2], "registers": 4}


def slow_tokens(trunk: ViT, crop: Tensor) -> Tensor:
    """The tokens of one crop [3, S, S] after the final norm: class token, registers, patches."""
    pixels = F.unfold(crop[None], 16, stride=16)[0].T  # [T, 3·16·16]
    h, w = (side // 16 for side in crop.shape[1:])
    patches = pixels @ trunk.patch_embed.proj.weight.flatten(1).T + trunk.patch_embed.proj.bias
    positions = trunk.position(h, w, crop.device)
    assert trunk.reg_token is not None
    x = torch.cat([trunk.cls_token[0] + positions[:1], trunk.reg_token[0], patches + positions[1:]])
    for block in trunk.blocks:
        assert isinstance(block, Block)
        heads, (q, k, v) = block.attn.heads, block.attn.qkv(block.norm1(x)).chunk(3, 1)
        mixed = []
        for a, b, c in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
            mixed.append((a @ b.T / a.shape[1] ** 0.5).softmax(1) @ c)
        x = x + block.attn.proj(torch.cat(mixed, 1))
        x = x + F.linear(F.gelu(block.mlp.fc1(block.norm2(x))), block.mlp.fc2.weight, block.mlp.fc2.bias)
    normed: Tensor = trunk.norm(x)
    return normed


@pytest.mark.parametrize("kind", [ViT, MoCoViT])
def test_features_and_gradients_match_one_crop_at_a_time(kind: type[ViT]) -> None:
    """Registers attend, have no position, and are in no feature."""
    trunk = kind(16, 3, 2, registers=3).double()
    fill(trunk, by_hash)
    crops = [torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randn(3, 3, 32, 32, dtype=torch.float64)]
    found = trunk(crops)
    slow = [slow_tokens(trunk, crop) for group in crops for crop in group]
    view, regions = torch.stack([x[0] for x in slow]), torch.cat([x[1 + 3 :] for x in slow])
    assert found.grids == [(2, 4, 4), (3, 2, 2)]
    torch.testing.assert_close(found.view, view, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.regions, regions, rtol=0, atol=1e-9)
    weigh = lambda v, r: (v * by_hash("v", v.shape)).sum() + (r * by_hash("r", r.shape)).sum()  # noqa: E731
    parameters = dict(trunk.named_parameters())
    ours = torch.autograd.grad(weigh(found.view, found.regions), list(parameters.values()))
    theirs = torch.autograd.grad(weigh(view, regions), list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert name != "reg_token" or a.abs().amin(2).min() > 1e-9
    last = trunk.last_blocks(crops, 1)[0]
    torch.testing.assert_close(last.tokens, regions, rtol=0, atol=1e-9)
    assert torch.equal(trunk.plain(64)(crops[0])[1].flatten(0, 1), trunk([crops[0]]).regions)


def test_registers_change_no_other_initial_value_and_start_as_dinov3s() -> None:
    for name in ("deit_s", "vit_s_moco"):
        without, with_ = (build_trunk(tiny.model_config({**MODEL, "trunk": name, "registers": n}, 64)) for n in (0, 4))
        inits = initial_values(with_)
        values = {n: initial_value(n, inits[n], p.shape, 0) for n, p in with_.named_parameters()}
        for n, p in without.named_parameters():
            assert torch.equal(values[n], initial_value(n, initial_values(without)[n], p.shape, 0)), n
        assert values.keys() - dict(without.named_parameters()).keys() == {"reg_token"}
        assert values["reg_token"].shape == (1, 4, 32)
        assert 0.015 < values["reg_token"].std() < 0.025


@torch.no_grad()
@pytest.mark.parametrize(("trunk", "size"), [("deit_s", 224), ("vit_s_moco", 96)])
def test_timm_export_has_the_same_features(tmp_path: Path, trunk: str, size: int) -> None:
    """As the exported folder says, and in timm's own network with registers, whose LayerScale is left out."""
    timm = pytest.importorskip("timm")
    source = step_of(tmp_path, {**MODEL, "trunk": trunk}, size)
    convert(source, tmp_path / "timm", "esvit-scale", "timm")
    folder = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    shape = {"img_size": size, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.0}
    named = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **shape).eval()
    assert named.num_reg_tokens == folder.num_reg_tokens == 4
    named.load_state_dict(folder.state_dict())
    x = images(2, size)
    view, regions = features(source, x)
    for other in (folder, named):
        torch.testing.assert_close(other(x), view, rtol=1e-6, atol=1e-6 * float(view.abs().max()))
        cells = other.forward_features(x)[:, other.num_prefix_tokens :].flatten(0, 1)
        torch.testing.assert_close(cells, regions, rtol=1e-5, atol=1e-5 * float(regions.abs().max()))


@torch.no_grad()
def test_files_with_registers_are_read_back(tmp_path: Path) -> None:
    """The export for timm as a folder and as a file, which is recognised, and our own format."""
    source = step_of(tmp_path, {**MODEL, "embed_dim": 128})
    x = images()
    view, regions = features(source, x)
    for form in ("safetensors", "timm"):
        convert(source, tmp_path / form, "esvit-scale", form)
    save_file(libraries.timm_tensors(*_trunk_of(source)), tmp_path / "timm.safetensors")
    for path in (tmp_path / "safetensors", tmp_path / "timm", tmp_path / "timm.safetensors"):
        backbone = load_backbone(path)
        assert backbone.config.model.registers == 4
        torch.testing.assert_close(backbone(x), view, rtol=0, atol=1e-5)
        found = backbone.regions(x).permute(0, 2, 3, 1).flatten(0, 2)
        torch.testing.assert_close(found, regions, rtol=0, atol=1e-5)
    assert "4 registers" in (tmp_path / "timm" / "README.md").read_text()


def _trunk_of(source: Path) -> tuple[dict[str, Tensor], Any]:
    trunk, config = state.load_teacher(source)
    return {name: tensor.detach() for name, tensor in trunk.state_dict().items()}, config


def test_runs_start_from_weights_without_registers_and_refuse_another_number(tmp_path: Path) -> None:
    without = step_of(tmp_path / "without", {**MODEL, "registers": 0})
    with_ = step_of(tmp_path / "with", MODEL)

    def started(source: Path, registers: int) -> Any:
        config = weights_of(tmp_path, {**MODEL, "registers": registers, "init_from": str(source)}).config
        return load_initial_weights(config), network_shapes(config)

    for source, registers in ((with_, 4), (without, 4), (without, 0)):
        found, shapes = started(source, registers)
        fresh = {"trunk.reg_token"} if registers and source is without else set()
        assert shapes.keys() - found.values.keys() == fresh
        assert ("registers not in the source: initialised at random" in found.note) == bool(fresh)
    for source, registers, right in ((with_, 0, 4), (with_, 2, 4)):
        with pytest.raises(UserError, match=rf"has 4 registers, but model.registers={registers}; .*={right}$") as error:
            started(source, registers)
        assert "\n" not in str(error.value)


def test_what_has_no_registers_refuses_them_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [*(n for n in TRUNKS if n not in VARIANTS), "timm:test_vit"]:
        config = tiny.model_config({"trunk": name, **SMALL.get(name, {}), "registers": 1}, 64)
        with pytest.raises(
            UserError, match=rf"^model.registers: {name} takes none; .* deit_s, deit_b, vit_s_m"
        ) as error:
            build_trunk(config)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"model.registers: .*64"):
        tiny.model_config({**MODEL, "registers": 65})
    source = step_of(tmp_path, MODEL)
    with pytest.raises(UserError, match="the official code has no registers; use --to safetensors or timm"):
        convert(source, tmp_path / "x.pth", "esvit-scale", "esvit")
    assert not (tmp_path / "x.pth").exists()
    assert cli.main(["config", "deit_s", "model.registers=-1"]) == 2
    assert "model.registers" in capsys.readouterr().err
