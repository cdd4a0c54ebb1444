"""DeiT and MoCo v3's ViT against the official code's numbers, torch's own interpolation, timm, and themselves."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esvit_scale.errors import UserError
from esvit_scale.models import vit
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initial_value, initial_values
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.vit import MoCoViT, ViT
from tests import tiny
from tests.models.rule import by_hash, fill

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "official_vit.json").read_text())
GROUPS = [(2, 64), (3, 32), (1, 50)]  # 4×4 tokens, 2×2, and a size that is padded


def make(kind=ViT, **kwargs):
    trunk = kind(16, 3, 2, **kwargs).double()
    fill(trunk, by_hash)
    return trunk


def crops_of(groups=GROUPS, dtype=torch.float64):
    return [torch.randn(n, 3, s, s, dtype=dtype) for n, s in groups]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("deit_s", 21_665_664),
        ("deit_b", 85_798_656),
        ("vit_s_moco", 21_665_664 - 197 * 384),  # the official count holds the fixed positions
        ("vit_b_moco", 85_798_656 - 197 * 768),
    ],
)
def test_parameter_counts_match_published(name, count):
    with torch.device("meta"):
        trunk = build_trunk(tiny.model_config({"trunk": name}))
    assert sum(p.numel() for p in trunk.parameters()) == count
    assert trunk.depths == (12,)
    assert trunk.blocks[0].attn.heads == {"deit_s": 6}.get(name, 12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_outputs_match_official_code(dtype, tolerance):
    """deit_small at 224, 96 and (padded to whole patches) 100 pixels, run in float64; weights and crops by rule."""
    trunk = ViT(384, 12, 6).double()
    fill(trunk, by_hash)
    trunk = trunk.to(dtype)
    ours = trunk([by_hash(f"crop{s}", (n, 3, s, s), 1.5).to(dtype) for n, s in OFFICIAL["crops"]])
    for key, found, step in (
        ("view", ours.view, OFFICIAL["view_step"]),
        ("regions", ours.regions, OFFICIAL["regions_step"]),
    ):
        expected = torch.tensor(OFFICIAL[key], dtype=torch.float64)
        assert (found.detach().flatten()[::step].double() - expected).norm() < tolerance * expected.norm(), key
    assert ours.regions.double().norm().item() == pytest.approx(OFFICIAL["region_norm"], rel=tolerance)
    weigh = lambda name, t: (t * by_hash(name, t.shape).to(dtype)).sum()  # noqa: E731
    (weigh("gv", ours.view) + weigh("gr", ours.regions)).backward()
    parameters = dict(trunk.named_parameters())
    assert "pos_embed" in OFFICIAL["gradients"]
    for name, (norm, projection) in OFFICIAL["gradients"].items():
        grad = parameters[name].grad.double()
        assert grad.norm().item() == pytest.approx(norm, rel=10 * tolerance), name
        projected = (grad * by_hash(name + "g", grad.shape)).sum().item()
        assert projected == pytest.approx(projection, rel=1e-6, abs=10 * tolerance * grad.numel() ** 0.5 * norm)


@pytest.mark.parametrize(("h", "w"), [(6, 6), (5, 5), (14, 7), (3, 20), (28, 28), (1, 1), (14, 14)])
def test_positions_are_resized_like_torch_interpolate(h, w):
    trunk = make()
    learned = trunk.pos_embed[0, 1:].view(1, 14, 14, -1).permute(0, 3, 1, 2)
    nudge = 1e-9  # so that torch rounds 14 · (h/14) to h
    scale = ((h + nudge) / 14, (w + nudge) / 14)
    expected = F.interpolate(learned, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    found = trunk.position(h, w, torch.device("cpu"))
    assert expected.shape[-2:] == (h, w)
    torch.testing.assert_close(found[1:], expected.flatten(2)[0].T, rtol=0, atol=1e-7)
    assert torch.equal(found[0], trunk.pos_embed[0, 0])


@pytest.mark.parametrize("kind", [ViT, MoCoViT])
def test_packed_forward_equals_separate_passes(kind):
    trunk, crops = make(kind), crops_of()
    together = trunk(crops)
    assert together.grids == [(2, 4, 4), (3, 2, 2), (1, 4, 4)]
    weigh = lambda f: (f.view * by_hash("v", f.view.shape)).sum() + (f.regions * by_hash("r", f.regions.shape)).sum()  # noqa: E731
    expected = torch.autograd.grad(weigh(together), list(trunk.parameters()))
    for parts in ([[x] for x in crops], [[x[i : i + 1]] for x in crops for i in range(len(x))]):
        alone = [trunk(part) for part in parts]
        joined = together._replace(
            view=torch.cat([f.view for f in alone]), regions=torch.cat([f.regions for f in alone])
        )
        torch.testing.assert_close(joined.view, together.view, rtol=0, atol=1e-10)
        torch.testing.assert_close(joined.regions, together.regions, rtol=0, atol=1e-10)
        for a, b in zip(torch.autograd.grad(weigh(joined), list(trunk.parameters())), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_outputs_match_timm():
    """Names and numbers; timm's positions are for the size it is built for, so at 224."""
    timm = pytest.importorskip("timm")
    trunk = ViT(64, 2, 4)
    fill(trunk, by_hash)
    other = timm.models.vision_transformer.VisionTransformer(embed_dim=64, depth=2, num_heads=4, num_classes=0).eval()
    other.load_state_dict(trunk.state_dict())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, ours = other.forward_features(x), trunk([x])
    torch.testing.assert_close(ours.view, expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.regions, expected[:, 1:].flatten(0, 1), rtol=0, atol=1e-5)


def test_moco_positions_match_official_code():
    """sin and cos of the row, then of the column, at 10000^(−i/d), written out."""
    found = vit.sine_cosine(3, 5, 16, torch.device("cpu"))
    assert found.shape == (16, 16)
    assert not found[0].any()
    for y in range(3):
        for x in range(5):
            w = [10000 ** (-i / 4) for i in range(4)]
            parts = [f(at * v) for at in (y, x) for f in (math.sin, math.cos) for v in w]
            torch.testing.assert_close(found[1 + 5 * y + x], torch.tensor(parts), rtol=0, atol=1e-6)


def test_moco_initial_values_match_official_code():
    with torch.device("meta"):
        trunk = build_trunk(tiny.model_config({"trunk": "vit_s_moco"}))
    inits = initial_values(trunk)
    shapes = {name: p.shape for name, p in trunk.named_parameters()}
    value = lambda name: initial_value(name, inits[name], shapes[name], 0)  # noqa: E731
    for name, bound in {
        "blocks.3.attn.qkv.weight": math.sqrt(6 / 768),  # Xavier's of 384 → 384, three times
        "blocks.3.attn.proj.weight": math.sqrt(6 / 768),
        "blocks.3.mlp.fc1.weight": math.sqrt(6 / (5 * 384)),
        "patch_embed.proj.weight": math.sqrt(6 / (768 + 384)),
    }.items():
        assert 0.999 * bound < value(name).abs().max() <= bound, name
    assert not value("blocks.3.attn.qkv.bias").any()
    assert not value("patch_embed.proj.bias").any()
    assert 0 < value("cls_token").std() < 2e-6
    deit = ViT(384, 1, 6)
    assert 0.019 < initial_value("pos_embed", initial_values(deit)["pos_embed"], (1, 197, 384), 0).std() < 0.021


def test_last_blocks_have_expected_shapes():
    """All are normed (there is one stage); a probe reads the class token."""
    trunk, crops = make(), crops_of()
    features, maps = trunk(crops), trunk.last_blocks(crops, 2)
    assert len(maps) == 2
    torch.testing.assert_close(maps[-1].tokens, features.regions)
    torch.testing.assert_close(maps[-1].view, features.view)
    shorter = ViT(16, 2, 2).double()
    shorter.load_state_dict({k: v for k, v in trunk.state_dict().items() if "blocks.2" not in k})
    torch.testing.assert_close(maps[0].view, shorter(crops).view)
    [only] = trunk.stage_maps(crops)
    torch.testing.assert_close(trunk.norm(only.tokens), features.regions)


def test_checkpointing_and_stochastic_depth_match_reference():
    crops, keys, gradients = crops_of(), drop_keys(0, 1, torch.arange(1), 6), []
    for wrapped in (False, True):
        trunk = make(drop_path=0.5)
        if wrapped:
            trunk.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
        trunk(crops, keys).view.square().sum().backward()
        gradients.append([p.grad for p in trunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    one = trunk([crops[1][1:2]], keys[3:4]).view
    torch.testing.assert_close(one, trunk(crops, keys).view[3:4], rtol=0, atol=1e-12)
    assert not torch.allclose(trunk(crops, keys).view, trunk(crops).view)


def test_every_parameter_gets_a_gradient_in_bf16_from_the_view_alone():
    for kind in (ViT, MoCoViT):
        trunk = make(kind).bfloat16()
        features = trunk(crops_of(dtype=torch.float32))
        assert features.view.dtype == torch.bfloat16
        features.view.float().square().sum().backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in trunk.parameters() if p is not trunk.norm.bias)
        exact = trunk.float()(crops := crops_of(dtype=torch.float32)).regions
        assert (trunk.bfloat16()(crops).regions.float() - exact).abs().mean() < 0.05


def test_exported_module_accepts_any_batch_size():
    trunk = make()
    for n in (1, 3):
        images = torch.randn(n, 3, 50, 50, dtype=torch.float64)
        view, regions = trunk.plain(50)(images)
        assert view.shape == (n, 16)
        assert regions.shape == (n, 16, 16)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"trunk": "deit_s", "embed_dim": 100, "heads": [6]}, ["model.heads.0", "6 heads", "nearest: 5"]),
        ({"trunk": "deit_s", "depths": [2, 2], "heads": [6, 6]}, ["model.depths", "deit_s has 1 stages"]),
        ({"trunk": "vit_s_moco", "embed_dim": 30, "heads": [3]}, ["model.embed_dim", "multiple of 4", "nearest: 32"]),
        ({"trunk": "deit_x"}, ["model.trunk", "did you mean 'deit_"]),
    ],
)
def test_invalid_models_are_refused_in_one_line(model, words):
    with pytest.raises(UserError) as error:
        build_trunk(tiny.model_config(model))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_overrides_change_the_shape():
    trunk = build_trunk(tiny.model_config({"trunk": "deit_s", "embed_dim": 32, "depths": [2], "heads": [4]}, 64))
    assert (trunk.dim, trunk.depths) == (32, (2,))
    assert trunk([torch.randn(1, 3, 64, 64)]).regions.shape == (16, 32)
