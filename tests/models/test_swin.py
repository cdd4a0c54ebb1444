"""The packed trunk against a slow Swin written out here, the official code's numbers, timm, and itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.swin import Block, Swin
from esvit_scale.models.window_attention import Attention, attention_probabilities
from esvit_scale.models.windows import window_plan
from tests.models.rule import by_hash, by_rule, fill

SHAPES = {  # window 3 pads and shifts everywhere; window 14 is clipped in stage 2
    "w3": ({"embed_dim": 8, "depths": (2, 2), "heads": (2, 4), "window": 3, "size": 32}, [(2, 32), (3, 20), (1, 17)]),
    "w4": ({"embed_dim": 8, "depths": (2, 1, 2), "heads": (1, 2, 2), "window": 4, "size": 64}, [(2, 64), (2, 32)]),
    "w14": ({"embed_dim": 4, "depths": (2, 1), "heads": (1, 2), "window": 14, "size": 112}, [(1, 112), (2, 36)]),
    "larger than the map": (
        {"embed_dim": 8, "depths": (2, 2), "heads": (2, 2), "window": 20, "size": 32},
        [(1, 32), (1, 16)],
    ),
}


def make(shape, **kwargs):
    trunk = Swin(**shape, **kwargs).double()
    fill(trunk)
    return trunk


def crops_of(groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, s, s, dtype=torch.float64, generator=generator).to(dtype) for n, s in groups]


@pytest.mark.parametrize("name", SHAPES)
def test_packed_forward_equals_one_pass_per_resolution(name):
    shape, groups = SHAPES[name]
    trunk, crops = make(shape), crops_of(groups)
    ours = trunk(crops)
    slow = [slow_swin(trunk, shape, x) for x in crops]  # [N_g, H, W, C]
    regions = torch.cat([x.flatten(0, 2) for x in slow])
    views = torch.cat([x.mean((1, 2)) for x in slow])
    assert ours.grids == [(x.shape[0], x.shape[1], x.shape[2]) for x in slow]
    torch.testing.assert_close(ours.regions, regions, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.view, views, rtol=0, atol=1e-11)
    names, parameters = zip(*trunk.named_parameters(), strict=True)
    weigh = lambda view, region: (view * by_rule("v", view.shape)).sum() + (region * by_rule("r", region.shape)).sum()  # noqa: E731
    expected = torch.autograd.grad(weigh(views, regions), parameters)
    got = torch.autograd.grad(weigh(ours.view, ours.regions), parameters)
    for parameter, a, b in zip(names, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, p=parameter: f"{p}: {m}")


def slow_swin(trunk, shape, x):
    """One resolution, plain: pad, roll, loop over windows and heads. Returns [N, H, W, C] after the final norm."""
    p = dict(trunk.named_parameters())
    norm = lambda t, name: F.layer_norm(t, t.shape[-1:], p[name + ".weight"], p[name + ".bias"], 1e-6)  # noqa: E731
    x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for s, (depth, heads) in enumerate(zip(shape["depths"], shape["heads"], strict=True)):
        resolution = shape["size"] // 4 // 2**s
        window = min(shape["window"], resolution)
        for i in range(depth):
            shift = shape["window"] // 2 if i % 2 and resolution > shape["window"] else 0
            name = f"layers.{s}.blocks.{i}"
            x = x + slow_attention(p, f"{name}.attn", norm(x, f"{name}.norm1"), heads, window, shift)
            h = F.linear(norm(x, f"{name}.norm2"), p[f"{name}.mlp.fc1.weight"], p[f"{name}.mlp.fc1.bias"])
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
            x = x + F.linear(h, p[f"{name}.mlp.fc2.weight"], p[f"{name}.mlp.fc2.bias"])
        if s < len(shape["depths"]) - 1:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = F.linear(norm(x, f"layers.{s}.downsample.norm"), p[f"layers.{s}.downsample.reduction.weight"])
    return norm(x, "norm")


def slow_attention(p, name, x, heads, window, shift):
    _, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))  # before the roll, and not masked
    hp, wp = x.shape[1:3]
    x = x.roll((-shift, -shift), (1, 2))
    label = torch.zeros(hp, wp)
    if shift:
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            for j, cols in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                label[rows, cols] = 3 * i + j
    out = torch.zeros_like(x)
    yx = [(a, b) for a in range(window) for b in range(window)]
    row = torch.tensor([[(a - e + window - 1) * (2 * window - 1) + b - f + window - 1 for e, f in yx] for a, b in yx])
    bias = p[f"{name}.relative_position_bias_table"][row]  # [L, L, heads]
    for y in range(0, hp, window):
        for z in range(0, wp, window):
            tokens = x[:, y : y + window, z : z + window].flatten(1, 2)
            q, k, v = F.linear(tokens, p[f"{name}.qkv.weight"], p[f"{name}.qkv.bias"]).chunk(3, -1)
            region = label[y : y + window, z : z + window].flatten()
            mask = torch.where(region[:, None] == region[None, :], 0.0, -100.0)
            mixed = []
            for head in range(heads):
                part = slice(head * c // heads, (head + 1) * c // heads)
                scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(c // heads)
                mixed.append((scores + bias[..., head] + mask).softmax(-1) @ v[..., part])
            joined = F.linear(torch.cat(mixed, -1), p[f"{name}.proj.weight"], p[f"{name}.proj.bias"])
            out[:, y : y + window, z : z + window] = joined.unflatten(1, (window, window))
    return out.roll((shift, shift), (1, 2))[:, :h, :w]


OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "official_swin.json").read_text())


def official_case(case, rule, dtype):
    trunk = Swin(**{k: case[k] for k in ("embed_dim", "depths", "heads", "window", "size")})
    fill(trunk.double(), rule)
    features = trunk.to(dtype)([rule(f"crop{s}", (n, 3, s, s), 1.5).to(dtype) for n, s in case["crops"]])
    return trunk, features


@pytest.mark.parametrize("case", OFFICIAL, ids=["w7 at 112", "w14", "w7 at 224"])
def test_outputs_match_official_code(case):
    """Outputs and gradients of the official EsViT module in float64, weights and inputs by rule."""
    rule = by_hash if case is OFFICIAL[2] else by_rule
    trunk, ours = official_case(case, rule, torch.float64)
    torch.testing.assert_close(ours.view.flatten(), torch.tensor(case["view"]).double(), rtol=1e-5, atol=1e-7)
    rows = ours.regions[:: case["region_step"]].flatten()
    torch.testing.assert_close(rows, torch.tensor(case["region_rows"], dtype=torch.float64), rtol=1e-9, atol=1e-9)
    loss = (ours.view * by_rule("gv", ours.view.shape)).sum() + (ours.regions * by_rule("gr", ours.regions.shape)).sum()
    loss.backward()
    for name, p in trunk.named_parameters():
        norm, projection = case["gradients"][name]
        assert p.grad.norm().item() == pytest.approx(norm, rel=1e-9), name
        assert (p.grad * by_rule(name + "g", p.shape)).sum().item() == pytest.approx(projection, rel=1e-6, abs=1e-7)


def test_fp32_outputs_match_official_code():
    case = OFFICIAL[2]  # by_hash: the other cases' regular weights amplify rounding, in the official code as well
    trunk, ours = official_case(case, by_hash, torch.float32)
    for found, expected in ((ours.view, case["view"]), (ours.regions[:: case["region_step"]], case["region_rows"])):
        expected = torch.tensor(expected)
        assert (found.detach().flatten() - expected).norm() < 1e-5 * expected.norm()
    loss = (ours.view * by_rule("gv", ours.view.shape)).sum() + (ours.regions * by_rule("gr", ours.regions.shape)).sum()
    loss.backward()
    for name, p in trunk.named_parameters():
        assert p.grad.norm().item() == pytest.approx(case["gradients"][name][0], rel=1e-5), name


def test_outputs_match_timm_at_224():
    """timm rolls before it pads, which is the same where the window divides every map."""
    timm_swin = pytest.importorskip("timm.models.swin_transformer")
    trunk = Swin(16, (2, 2, 2, 1), (1, 2, 4, 8), window=7, size=224)
    fill(trunk)
    theirs = timm_swin.SwinTransformer(
        embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8), num_classes=0, drop_path_rate=0.0
    ).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
    state = {}
    for name, value in trunk.state_dict().items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) + 1)
        state[".".join(parts)] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("index" in name or "mask" in name for name in missing)
    image = crops_of([(2, 224)], torch.float32)
    with torch.no_grad():
        expected = theirs.forward_features(image[0]).flatten(0, 2)
        torch.testing.assert_close(trunk(image).regions, expected, rtol=0, atol=2e-5)


def test_packed_forward_equals_separate_forwards():
    shape, groups = SHAPES["w3"]
    trunk, crops = make(shape), crops_of(groups)
    together, alone = trunk(crops), [trunk([x]) for x in crops]
    torch.testing.assert_close(together.view, torch.cat([f.view for f in alone]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.regions, torch.cat([f.regions for f in alone]), rtol=0, atol=1e-12)
    assert together.grids == [g for f in alone for g in f.grids]


def test_last_blocks_are_row_major_and_only_the_last_stage_is_normed():
    shape, groups = SHAPES["w4"]
    trunk, crops = make(shape), crops_of(groups)
    maps = trunk.last_blocks(crops, 3)
    assert [m.tokens.shape[1] for m in maps] == [16, 32, 32]
    assert maps[0].grids == [(2, 8, 8), (2, 4, 4)]
    torch.testing.assert_close(maps[-1].tokens, trunk(crops).regions)
    # the block before: what slow patch merging and the last stage make of it is the final map
    single = Swin(**{**shape, "depths": (2, 1)} | {"heads": (1, 2)}).double()
    single.load_state_dict({k: v for k, v in trunk.state_dict().items() if k in single.state_dict()} | _norm_of(single))
    slow = slow_swin(single, {**shape, "depths": (2, 1), "heads": (1, 2)}, crops[0])
    ours = F.layer_norm(maps[0].tokens[: 2 * 64], (16,), eps=1e-6)
    torch.testing.assert_close(ours, slow.flatten(0, 2), rtol=0, atol=1e-11)


def _norm_of(trunk):
    return {"norm.weight": torch.ones_like(trunk.norm.weight), "norm.bias": torch.zeros_like(trunk.norm.bias)}


def test_attention_gradients_pass_gradcheck():
    windows, length, heads, depth = 4, 4, 2, 3
    qkv = torch.randn(windows * length, 3 * heads * depth, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(heads, length, length, dtype=torch.float64, requires_grad=True)
    mask = torch.where(torch.eye(length) > 0, 0.0, -2.0)
    assert torch.autograd.gradcheck(lambda a, b: Attention.apply(a, b, ((1, 3, mask),)), (qkv, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_probabilities_are_zero_and_not_subnormal(dtype):
    plan = window_plan(((2, 8, 8),), 4, 2, torch.device("cpu"))
    qkv, bias = torch.randn(len(plan.slots.tokens), 3 * 8).to(dtype), torch.randn(2, 16, 16).to(dtype)
    _, probabilities = attention_probabilities(qkv, bias, plan.masks)  # [windows, heads, L, L]
    apart = 0
    for first, end, mask in plan.masks:
        hidden = probabilities[first:end].masked_select(mask < 0)
        assert (hidden == 0).all()
        apart += len(hidden)
    assert apart > 100
    torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]), rtol=0, atol=0.02)


def test_attention_gradients_are_those_of_the_formula_when_the_bias_is_far_from_zero():
    """A constant in the bias changes nothing, and must not cost the precision of the scores either (Swin V2: about 8)."""
    windows, length, heads, depth = 6, 49, 2, 32
    qkv = torch.randn(windows * length, 3 * heads * depth).bfloat16().requires_grad_()
    small = torch.randn(heads, length, length).bfloat16().float()
    grad = torch.randn(windows * length, heads * depth).bfloat16()
    errors = []
    for constant in (0.0, 64.0):
        bias = (small + constant).requires_grad_()
        wide = [x.detach().double().requires_grad_() for x in (qkv, bias)]
        exact = torch.autograd.grad(Attention.apply(*wide, ()), wide, grad.double())
        found = torch.autograd.grad(Attention.apply(qkv, bias, ()), (qkv, bias), grad)
        errors += [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    assert max(errors) < 0.01  # a few roundings to bf16, each of 2⁻⁹


def test_bf16_follows_fp32():
    shape, groups = SHAPES["w4"]
    trunk, crops = make(shape), crops_of(groups, torch.float32)
    exact = trunk.float()(crops)
    half = trunk.bfloat16()(crops)
    assert half.view.dtype == torch.bfloat16
    half.view.float().square().sum().backward()
    assert (half.regions.float() - exact.regions).abs().mean() < 0.05  # of values around 1
    assert all(p.grad.isfinite().all() for p in trunk.parameters() if p.grad is not None)


def test_activation_checkpointing_changes_nothing():
    shape, groups = SHAPES["w3"]
    crops, keys, gradients = crops_of(groups), drop_keys(0, 1, torch.arange(1), 6), []
    for wrapped in (False, True):
        trunk = make(shape, drop_path=0.5)
        if wrapped:
            trunk.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
        trunk(crops, keys).view.square().sum().backward()
        gradients.append([p.grad for p in trunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_plans_made_in_inference_mode_work_in_training():
    trunk, crops = make(SHAPES["w3"][0]), crops_of([(2, 28)])  # a layout no other test uses
    with torch.inference_mode():
        trunk(crops)
    trunk(crops).view.sum().backward()


class TestStochasticDepth:
    shape, groups = SHAPES["w4"]

    def test_a_crop_is_dropped_the_same_in_any_batch(self):
        trunk = make(self.shape, drop_path=0.6)
        crops = crops_of([(6, 64)])[0]
        keys = drop_keys(3, 5, torch.tensor([4, 9, 2]), 2)
        together = trunk([crops], keys).view
        order = torch.tensor([5, 0, 3])
        torch.testing.assert_close(trunk([crops[order]], keys[order]).view, together[order], rtol=0, atol=1e-12)
        assert not torch.allclose(together, trunk([crops]).view)

    def test_equal_crops_with_different_keys_differ(self):
        trunk = make(self.shape, drop_path=0.6)
        crop = crops_of([(1, 64)])[0]
        views = trunk([crop.expand(8, -1, -1, -1).contiguous()], drop_keys(0, 0, torch.arange(4), 2)).view
        assert len({tuple(v.tolist()) for v in views}) > 4

    def test_a_fully_dropped_branch_is_masked_not_skipped(self):
        """Under ZeRO-3 a module that did not run would get its old gradient again."""
        trunk = make(self.shape, drop_path=1.0)
        calls = []
        for block in trunk.blocks:
            block.attn.register_forward_hook(lambda *_: calls.append("attn"))
            block.mlp.register_forward_hook(lambda *_: calls.append("mlp"))
        crops = crops_of(self.groups)
        trunk(crops, drop_keys(0, 0, torch.arange(2), 2)).view.sum().backward()
        assert len(calls) == 2 * len(trunk.blocks)
        last = trunk.blocks[-1]
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in last.parameters())

    def test_rates_grow_linearly_over_all_blocks(self):
        assert Swin(8, (2, 1, 2), (1, 2, 2), drop_path=0.2).drop_rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])

    def test_no_keys_keeps_everything(self):
        crops = crops_of(self.groups)
        kept, plain = make(self.shape, drop_path=0.9), make(self.shape)
        assert torch.equal(kept(crops).view, plain(crops).view)


def test_each_block_is_called_once_for_all_crops():
    trunk, calls = make(SHAPES["w4"][0]), []
    trunk.run_block = lambda block, *args: calls.append(block) or block(*args)
    trunk(crops_of(SHAPES["w4"][1]))
    assert calls == trunk.blocks
    assert all(isinstance(b, Block) for b in calls)


def test_trunk_has_no_buffers():
    """Index tensors are cached by layout, outside the module: nothing for an engine to cast, move or save."""
    trunk = Swin(8, (1, 1), (1, 1))
    assert not list(trunk.buffers())
    initialize(trunk, 0)
