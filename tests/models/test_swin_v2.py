"""Swin V2 in the packed trunk against a slow one written out here, timm's with copied weights, and itself."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.swin_v2 import LOGIT_SCALE_MAX, SwinV2, UnitQueriesKeys, relative_distances
from tests import tiny
from tests.models.rule import by_rule, fill

SHAPES = {  # window 3 pads and shifts everywhere; the windows of the others are clipped in the last stage
    "w3": ({"embed_dim": 8, "depths": (2, 2), "heads": (2, 4), "window": 3, "size": 32}, [(2, 32), (3, 20), (1, 17)]),
    "w4, extra norms": (
        {"embed_dim": 4, "depths": (1, 1, 4), "heads": (1, 2, 2), "window": 4, "size": 64, "extra_norm_every": 2},
        [(1, 64), (2, 36)],
    ),
    "w4 after w2": (
        {"embed_dim": 4, "depths": (1, 2), "heads": (1, 2), "window": 4, "size": 32, "pretrained_windows": (2, 3)},
        [(1, 32), (2, 20)],
    ),
    "window of one": ({"embed_dim": 4, "depths": (1, 1), "heads": (1, 2), "window": 1, "size": 16}, [(2, 16)]),
}


def make(shape, dtype=torch.float64, **kwargs):
    trunk = SwinV2(**shape, **kwargs)
    fill(trunk)
    return trunk.to(dtype)


@torch.no_grad()
def settle(trunk):
    """Weights of the size that training has, no branch silent: differences between precisions do not grow with depth."""
    initialize(trunk, 0)
    for name, p in trunk.named_parameters():
        if p.ndim == 1 or name.endswith("logit_scale"):
            p.add_(by_rule(name, p.shape, 0.3))
        elif "cpb_mlp" in name:
            p.mul_(5)
    return trunk


def crops_of(groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, s, s, dtype=torch.float64, generator=generator).to(dtype) for n, s in groups]


@pytest.mark.parametrize("name", SHAPES)
def test_packed_forward_equals_one_pass_per_resolution(name):
    shape, groups = SHAPES[name]
    trunk, crops = make(shape), crops_of(groups)
    ours = trunk(crops)
    slow = [slow_swin_v2(trunk, shape, x) for x in crops]  # [N_g, H, W, C]
    regions, views = torch.cat([x.flatten(0, 2) for x in slow]), torch.cat([x.mean((1, 2)) for x in slow])
    torch.testing.assert_close(ours.regions, regions, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.view, views, rtol=0, atol=1e-11)
    names, parameters = zip(*trunk.named_parameters(), strict=True)
    weigh = lambda view, region: (view * by_rule("v", view.shape)).sum() + (region * by_rule("r", region.shape)).sum()  # noqa: E731
    expected = torch.autograd.grad(weigh(views, regions), parameters)
    got = torch.autograd.grad(weigh(ours.view, ours.regions), parameters)
    for parameter, a, b in zip(names, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, p=parameter: f"{p}: {m}")


def slow_swin_v2(trunk, shape, x):
    """One resolution, plain: pad, roll, loop over windows and heads. Returns [N, H, W, C] after the final norm."""
    p = dict(trunk.named_parameters())
    norm = lambda t, name: F.layer_norm(t, t.shape[-1:], p[name + ".weight"], p[name + ".bias"], 1e-5)  # noqa: E731
    x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    x = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4).permute(0, 2, 3, 1)
    x = norm(x, "patch_embed.norm")
    for s, (depth, heads) in enumerate(zip(shape["depths"], shape["heads"], strict=True)):
        resolution = shape["size"] // 4 // 2**s
        window = min(shape["window"], resolution)
        for i in range(depth):
            shift = shape["window"] // 2 if i % 2 and resolution > shape["window"] else 0
            name = f"layers.{s}.blocks.{i}"
            before = shape.get("pretrained_windows", {s: window})[s]
            x = x + norm(slow_attention(p, f"{name}.attn", x, heads, window, shift, before), f"{name}.norm1")
            h = F.gelu(F.linear(x, p[f"{name}.mlp.fc1.weight"], p[f"{name}.mlp.fc1.bias"]))
            x = x + norm(F.linear(h, p[f"{name}.mlp.fc2.weight"], p[f"{name}.mlp.fc2.bias"]), f"{name}.norm2")
            if s == 2 and "extra_norm_every" in shape and (i + 1) % shape["extra_norm_every"] == 0:
                x = norm(x, f"{name}.extra_norm")
        if s < len(shape["depths"]) - 1:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = norm(F.linear(x, p[f"layers.{s}.downsample.reduction.weight"]), f"layers.{s}.downsample.norm")
    return norm(x, "norm")


def slow_attention(p, name, x, heads, window, shift, before):
    _, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % window, 0, -h % window))  # before the roll, and not masked
    hp, wp = x.shape[1:3]
    x = x.roll((-shift, -shift), (1, 2))
    label = torch.zeros(hp, wp)
    if shift:
        for i, rows in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
            for j, cols in enumerate((slice(0, -window), slice(-window, -shift), slice(-shift, None))):
                label[rows, cols] = 3 * i + j
    bias = slow_bias(p, name, window, before)  # [L, L, heads]
    scale = p[f"{name}.logit_scale"].clamp(max=math.log(100)).exp().flatten()
    qkv_bias = torch.cat([p[f"{name}.q_bias"], torch.zeros(c), p[f"{name}.v_bias"]])
    out = torch.zeros_like(x)
    for y in range(0, hp, window):
        for z in range(0, wp, window):
            tokens = x[:, y : y + window, z : z + window].flatten(1, 2)
            q, k, v = F.linear(tokens, p[f"{name}.qkv.weight"], qkv_bias).chunk(3, -1)
            region = label[y : y + window, z : z + window].flatten()
            mask = torch.where(region[:, None] == region[None, :], 0.0, -100.0)
            mixed = []
            for head in range(heads):
                part = slice(head * c // heads, (head + 1) * c // heads)
                scores = scale[head] * F.normalize(q[..., part], dim=-1) @ F.normalize(k[..., part], dim=-1).mT
                mixed.append((scores + bias[..., head] + mask).softmax(-1) @ v[..., part])
            joined = F.linear(torch.cat(mixed, -1), p[f"{name}.proj.weight"], p[f"{name}.proj.bias"])
            out[:, y : y + window, z : z + window] = joined.unflatten(1, (window, window))
    return out.roll((shift, shift), (1, 2))[:, :h, :w]


def slow_bias(p, name, window, before):
    spaced = lambda d: math.copysign(math.log2(abs(d) * 8 / max(before - 1, 1) + 1) / 3, d)  # noqa: E731
    yx = [(a, b) for a in range(window) for b in range(window)]
    delta = torch.tensor([[(spaced(a - e), spaced(b - f)) for e, f in yx] for a, b in yx], dtype=torch.float64)
    hidden = F.linear(delta, p[f"{name}.cpb_mlp.0.weight"], p[f"{name}.cpb_mlp.0.bias"]).relu()
    return 16 * F.linear(hidden, p[f"{name}.cpb_mlp.2.weight"]).sigmoid()


@pytest.mark.parametrize(
    ("ours", "theirs", "window"),
    [
        ("swinv2_t", "swinv2_tiny_window8_256", 8),
        pytest.param("swinv2_t", "swinv2_tiny_window16_256", 16, marks=pytest.mark.slow),
        pytest.param("swinv2_s", "swinv2_small_window8_256", 8, marks=pytest.mark.slow),
        pytest.param("swinv2_b", "swinv2_base_window8_256", 8, marks=pytest.mark.slow),
    ],
)
def test_outputs_match_timm_with_copied_weights(ours, theirs, window):
    """At the size that a trunk is built for no map is padded, and the order of padding and rolling makes no difference.

    fp64: outputs of up to 6 within 5e-8, every parameter's gradient within 2e-6 of its largest element; the difference
    is the rounding of timm's distances, which it computes in fp32.
    """
    timm = pytest.importorskip("timm")
    model = {"trunk": ours, "window": window}
    trunk = settle(build_trunk(tiny.model_config(model, 256))).double()
    other = timm.create_model(theirs, num_classes=0, drop_path_rate=0.0).double()
    missing, unexpected = other.load_state_dict({timms(k): v for k, v in trunk.state_dict().items()}, strict=True)
    assert not missing
    assert not unexpected
    image = crops_of([(1, 256)])
    mine, expected = trunk(image).regions, other.forward_features(image[0]).flatten(0, 2)
    torch.testing.assert_close(mine, expected, rtol=0, atol=5e-8)
    weight = by_rule("weight", mine.shape)
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, p in trunk.named_parameters():
        theirs_ = gradients[timms(name)]
        assert (p.grad - theirs_).abs().max() <= 2e-6 * theirs_.abs().max(), name


def test_outputs_match_timm_in_windows_twice_as_large():
    """As in the published code for fine-tuning at another window, for which timm has `pretrained_window_sizes`."""
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 16, "depths": [1, 2], "heads": [1, 2], "window": 8}
    trunk = settle(build_trunk(tiny.model_config({"trunk": "swinv2_t", **sizes, "pretrained_windows": [4, 3]}, 128)))
    arguments = {"window_size": 8, "pretrained_window_sizes": (4, 3), "embed_dim": 16, "depths": (1, 2)}
    other = timm.models.SwinTransformerV2(img_size=128, num_classes=0, num_heads=(1, 2), **arguments).double()
    other.load_state_dict({timms(k): v for k, v in trunk.double().state_dict().items()})
    image = crops_of([(1, 128)])
    expected = other.eval().forward_features(image[0]).flatten(0, 2)
    torch.testing.assert_close(trunk(image).regions, expected, rtol=0, atol=5e-8)


def timms(name):
    """timm keeps the merging at the beginning of the next stage."""
    parts = name.split(".")
    if "downsample" in parts:
        parts[1] = str(int(parts[1]) + 1)
    return ".".join(parts)


def test_cosine_attention_gradients_pass_gradcheck():
    qkv = torch.randn(5, 3 * 2 * 3, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.5, 20.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(UnitQueriesKeys.apply, (qkv, scale))
    unit = UnitQueriesKeys.apply(qkv, scale).view(5, 3, 2, 3)
    torch.testing.assert_close(unit[:, 0].norm(dim=-1), scale.expand(5, 2) * 3**0.5)
    torch.testing.assert_close(unit[:, 1].norm(dim=-1), torch.ones(5, 2).double())
    assert torch.equal(unit[:, 2], qkv.view(5, 3, 2, 3)[:, 2])


def test_query_of_length_zero_gives_zero_gradient():
    """Pads before there is a bias: dividing by their length would give infinities that a sum could not lose."""
    qkv = torch.zeros(2, 6, requires_grad=True)
    UnitQueriesKeys.apply(qkv, torch.ones(1)).sum().backward()
    assert qkv.grad.tolist() == [[0, 0, 0, 0, 1, 1]] * 2


def test_attention_temperature_is_bounded():
    shape, groups = SHAPES["w3"]
    trunk, crops = make(shape), crops_of(groups)
    scale = trunk.blocks[0].attn.logit_scale
    with torch.no_grad():
        scale.fill_(LOGIT_SCALE_MAX)
        at_bound = trunk(crops).view
        scale.fill_(LOGIT_SCALE_MAX + 3)
    beyond = trunk(crops).view
    assert torch.equal(beyond, at_bound)
    beyond.sum().backward()
    assert (scale.grad == 0).all()


def test_distances_are_log_spaced_over_the_window():
    table = relative_distances(8, 8, torch.device("cpu"))
    assert table.shape == (15**2, 2)
    assert table[0].tolist() == pytest.approx([-math.log2(9) / 3] * 2)
    assert table[15 * 7 + 7].tolist() == [0, 0]
    assert table[15 * 7 + 8].tolist() == pytest.approx([0, math.log2(8 / 7 + 1) / 3])
    assert relative_distances(1, 1, torch.device("cpu")).tolist() == [[0, 0]]


def test_pretrained_window_keeps_the_bias_of_two_tokens():
    """After a training at windows of 8, tokens that are (dy, dx) apart in windows of 16 have the bias that they had."""
    before, after = (relative_distances(window, 8, torch.device("cpu")) for window in (8, 16))
    inner = after.view(31, 31, 2)[8:-8, 8:-8]
    assert torch.equal(before.view(15, 15, 2), inner)


def test_bf16_follows_fp32_and_computes_scores_in_fp32():
    shape, groups = SHAPES["w4, extra norms"]
    trunk, crops = settle(SwinV2(**shape)), crops_of(groups, torch.float32)
    exact = trunk(crops)
    trunk.bfloat16()
    half = trunk([x.bfloat16() for x in crops])
    assert half.view.dtype == torch.bfloat16
    assert (half.regions.float() - exact.regions).abs().mean() < 0.05  # of values around 1
    half.view.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in trunk.parameters())
    attention = trunk.blocks[0].attn
    assert attention.scale().dtype == attention.position_bias(torch.device("cpu")).dtype == torch.float32


def test_block_starts_as_identity_and_gets_gradients():
    """Norms at the end of branches start at 0: the first step moves them alone, the second everything."""
    shape, groups = SHAPES["w4, extra norms"]
    trunk, crops = SwinV2(**shape), crops_of(groups, torch.float32)
    initialize(trunk, 0)
    weigh = lambda features: (features.regions * by_rule("r", features.regions.shape).float()).sum()  # noqa: E731
    weigh(trunk(crops)).backward()
    moved = {name for name, p in trunk.named_parameters() if p.grad.abs().max() > 0}
    assert {name for name in moved if ".blocks." in name and "extra_norm" not in name} == {
        f"layers.{s}.blocks.{i}.norm{n}.{part}"
        for s, depth in enumerate(shape["depths"])
        for i in range(depth)
        for n in (1, 2)
        for part in ("weight", "bias")
    }
    assert trunk.blocks[0].attn.logit_scale.flatten().tolist() == pytest.approx([math.log(10)])
    torch.optim.SGD(trunk.parameters(), lr=0.1).step()
    trunk.zero_grad()
    weigh(trunk(crops)).backward()
    still = [name for name, p in trunk.named_parameters() if not p.grad.abs().max() > 0]
    assert still == []


def test_checkpointing_gives_equal_gradients():
    shape, groups = SHAPES["w4, extra norms"]
    plain, recomputing, crops = make(shape), make(shape), crops_of(groups)
    recomputing.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    for trunk in (plain, recomputing):
        trunk(crops).view.square().sum().backward()
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_extra_norms_are_every_sixth_of_the_third_stage():
    with torch.device("meta"):
        trunk = build_trunk(tiny.model_config({"trunk": "swinv2_g"}))
    found = [name.removesuffix(".extra_norm.weight") for name, _ in trunk.named_parameters() if "extra_norm.w" in name]
    assert found == [f"layers.2.blocks.{i}" for i in range(5, 42, 6)]
