"""ViL against the official code's numbers, its window attention against one over the whole map with a mask, and packed
against one pass per image."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models import vil
from esvit_scale.models.drop_path import draw_of, drop_keys
from esvit_scale.models.initialize import initial_values, initialize
from esvit_scale.models.pyramid import Pyramid
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.vil import ViL
from esvit_scale.models.vil_attention import LongAttention
from tests.models.rule import by_hash, fill

SHAPE = ((8, 16, 24, 32), (1, 2, 1, 1), (1, 2, 3, 4))
GROUPS = [(3, 64), (4, 32), (2, 45)]  # with a window of 3: maps 16, 8 and 11, 5, with pads
OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "official_vil.json").read_text())


def make(**kwargs: float) -> ViL:
    trunk = ViL(*SHAPE, **{"window": 3, "size": 64, **kwargs}).double()
    fill(trunk, by_hash)
    return trunk


def crops_of(groups: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, 3, size, size, dtype=dtype) for n, size in groups]


@pytest.mark.parametrize(
    ("case", "dtype"), [(OFFICIAL[0], torch.float64), (OFFICIAL[1], torch.float64), (OFFICIAL[2], torch.float32)]
)
def test_outputs_match_official_code(case: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs at 224, 96 and 100 pixels and gradients of the official module in float64, weights and inputs by rule:
    a narrow model with all nine windows and with one neighbour, and the full one in fp32."""
    named = {"widths": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)}
    trunk = ViL(**{k: case.get(k, v) for k, v in named.items()}).to(dtype)
    fill(trunk, by_hash)
    crops = [by_hash(f"crop{s}", (n, 3, s, s), 1.5).to(dtype) for n, s in case["crops"]]
    keys = None
    if case["neighbour"] is not None:  # the official draw is of the whole batch
        keys = torch.zeros(sum(map(len, crops)), dtype=torch.int64)
        monkeypatch.setattr(vil, "sampled_neighbours", lambda keys, _: torch.full_like(keys, case["neighbour"]))
    view, regions, *_ = trunk(crops, keys)
    gradients = (by_hash(name, tuple(x.shape)).to(dtype) for name, x in (("gv", view), ("gr", regions)))
    sum((x * g).sum() for x, g in zip((view, regions), gradients, strict=True)).backward()
    near = 1e-8 if dtype == torch.float64 else 1e-5
    for found, name in ((view.flatten()[:: case["step"]], "view"), (regions.flatten()[:: case["step"] * 7], "regions")):
        expected = torch.tensor(case[name], dtype=torch.float64)
        assert (found.detach() - expected).norm() < near * expected.norm(), name
    parameters = dict(trunk.named_parameters())
    for name, (norm, projection) in case["gradients"].items():
        grad = parameters[name].grad.double()
        assert grad.norm().item() == pytest.approx(norm, rel=10 * near), name
        assert (grad * by_hash(name + "g", grad.shape)).sum().item() == pytest.approx(projection, abs=10 * near * norm)


def test_published_model_has_expected_size() -> None:
    with torch.device("meta"):
        trunk = build_trunk(configs.resolve("vil_2262"))
    assert sum(p.numel() for p in trunk.parameters()) == 27_569_352
    assert (trunk.dim, trunk.channels, trunk.reductions) == (768, (96, 192, 384, 768), (4, 8, 16, 32))
    crops = [torch.empty(2, 3, 224, 224, device="meta"), torch.empty(8, 3, 96, 96, device="meta")]
    for keys in (None, torch.empty(10, dtype=torch.int64, device="meta")):
        view, regions, grids, *_ = trunk(crops, keys)
        assert (tuple(view.shape), tuple(regions.shape), grids) == ((10, 768), (170, 768), [(2, 7, 7), (8, 3, 3)])


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (2, 8)])
@pytest.mark.parametrize("drawn", [False, True])
def test_window_attention_equals_masked_attention(size: tuple[int, int], drawn: bool) -> None:
    """Token by token over the whole map: which others it sees, and with which bias."""
    n, (h, w), window, g, heads = 3, size, 3, 1, 2
    attention = LongAttention(4, heads, g, window).double()
    fill(attention, by_hash)
    x = torch.randn(n, g + h * w, 4, dtype=torch.float64)
    draw = torch.tensor([0, 5, 7]) if drawn else None
    ours = attention(x.flatten(0, 1), [(n, h, w)], draw).view(n, g + h * w, 4)
    q, (k, v) = attention.query(x) / 2**0.5, attention.kv(x).chunk(2, -1)
    table = attention.local_relative_position_bias_table.view(11, 11, heads)
    g2l, g2g = attention.g2l_relative_position_bias, attention.g2g_relative_position_bias
    for crop in range(n):
        bias = torch.full((heads, g + h * w, g + h * w), -torch.inf, dtype=torch.float64)
        bias[:, :g, :g], bias[:, :g, g:], bias[:, g:, :g] = g2g, g2l[0, :, :, None], g2l[1, :, None]
        for i in range(h * w):
            for j in range(h * w):
                (y, z), (a, b) = divmod(i, w), divmod(j, w)
                down, right = a // window - y // window, b // window - z // window
                seen = max(abs(down), abs(right)) <= 1
                if draw is not None:
                    seen = seen and 3 * (down + 1) + right + 1 in (4, draw[crop].item())
                if seen:
                    bias[:, g + i, g + j] = table[y - a + 5, z - b + 5]
        mixed = []
        for head in range(heads):
            part = slice(2 * head, 2 * head + 2)
            scores = q[crop, :, part] @ k[crop, :, part].t() + bias[head]
            mixed.append(scores.softmax(-1) @ v[crop, :, part])
        torch.testing.assert_close(ours[crop], attention.proj(torch.cat(mixed, -1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("drawn", [False, True])
def test_packed_forward_equals_one_pass_per_image(drawn: bool) -> None:
    """With the same draws, whatever the batch; gradients too."""
    trunk, crops, found = make(drop_path=0.3), crops_of(GROUPS), []
    keys = drop_keys(1, 2, torch.arange(3), 3) if drawn else None
    images = [(image, None if keys is None else keys[i : i + 1]) for i, image in enumerate(x for c in crops for x in c)]
    for batches in ([(crops, keys)], [([image[None]], key) for image, key in images]):
        features = [trunk(*batch) for batch in batches]
        view, regions = (torch.cat([f[i] for f in features]) for i in (0, 1))
        loss = (view * by_hash("v", view.shape)).sum() + (regions * by_hash("r", regions.shape)).sum()
        found.append((view, regions, *torch.autograd.grad(loss, list(trunk.parameters()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_random_neighbours_are_uniform_and_independent_per_block() -> None:
    keys = drop_keys(0, 3, torch.arange(4000), 2)
    draws = [vil.sampled_neighbours(keys, block) for block in range(4)]
    for drawn in draws:
        share = torch.bincount(drawn, minlength=9) / len(keys)
        assert share[vil.OWN] == 0
        assert (share[[i for i in range(9) if i != vil.OWN]] - 1 / 8).abs().max() < 0.02  # 5.4 σ
    assert all((a == b).float().mean() < 0.15 for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(draw_of(keys, 2, 8)[5:6], draw_of(keys[5:6], 2, 8))


def test_only_the_first_two_stages_draw_neighbours() -> None:
    trunk, given = make(), []

    def run(block: torch.nn.Module, *args: Any) -> Tensor:
        given.append(args[-1])
        return block(*args)

    trunk.run_block = run
    trunk(crops_of([(64, 32)]), drop_keys(0, 3, torch.arange(64), 1))
    assert [x is None for x in given] == [False, False, False, True, True]
    assert all((a == b).float().mean() < 0.4 for i, a in enumerate(given[:3]) for b in given[:i])


def test_all_windows_are_used_without_drop_keys() -> None:
    trunk, crops = make(), crops_of([(2, 64)])
    exact = trunk.train()(crops).view
    assert torch.equal(exact, trunk.eval()(crops).view)
    assert not torch.allclose(exact, trunk(crops, drop_keys(0, 0, torch.arange(1), 2)).view)


def test_overrides_change_the_shape_or_are_refused() -> None:
    overrides = ["model.embed_dim=8", "model.depths=[1,1,1,1]", "model.heads=[1,1,2,2]"]
    trunk = build_trunk(configs.resolve("vil_2262", overrides))
    assert (trunk.dim, trunk.depths, len(trunk.blocks)) == (64, (1, 1, 1, 1), 4)
    with pytest.raises(UserError, match="vil_2262 has 4 stages, got 2"):
        build_trunk(configs.resolve("vil_2262", ["model.depths=[1,1]", "model.heads=[1,1]"]))
    with pytest.raises(UserError, match=r"^data.local_crops.0.size: 24 pixels leave .* stage 4; nearest: 32$"):
        build_trunk(configs.resolve("vil_2262", ["data.local_crops=[{size: 24, count: 8}]"]))


def test_last_blocks_and_stage_maps_have_expected_shapes() -> None:
    trunk, crops = make(), crops_of(GROUPS)
    maps = trunk.last_blocks(crops, 3)
    assert [m.tokens.shape[1] for m in maps] == [16, 24, 32]
    assert [None if m.view is None else tuple(m.view.shape) for m in maps] == [(9, 16), (9, 24), None]
    assert [len(m.tokens) for m in maps] == [sum(n * h * w for n, h, w in m.grids) for m in maps]
    torch.testing.assert_close(maps[-1].tokens, trunk(crops).regions)
    stages = trunk.stage_maps(crops)
    torch.testing.assert_close(trunk.norm(stages[-1].tokens), maps[-1].tokens)
    torch.testing.assert_close(stages[2].view, maps[1].view)
    assert stages[0].grids == [(3, 16, 16), (4, 8, 8), (2, 11, 11)]
    assert [tuple(x.shape[1:]) for x in Pyramid(trunk)(crops[0])] == [(8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)]


def test_view_feature_is_the_global_token() -> None:
    trunk, seen = make(), []
    trunk.layers[2].blocks[0].register_forward_hook(lambda _, inputs, output: seen.append(output))
    crops = crops_of([(2, 64)])
    view = trunk.last_blocks(crops, 2)[0].view
    assert torch.equal(view, seen[0].view(2, 17, -1)[:, 0])


def test_activation_checkpointing_changes_nothing() -> None:
    crops, keys, found = crops_of(GROUPS), drop_keys(0, 1, torch.arange(1), 9), []
    for wrapped in (False, True):
        trunk = make(drop_path=0.5)
        if wrapped:
            trunk.run_block = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
        trunk(crops, keys).view.square().sum().backward()
        found.append([p.grad for p in trunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_plans_made_in_inference_mode_work_in_training() -> None:
    trunk, crops = make(size=96), crops_of([(2, 96)])  # maps that no other test has
    with torch.inference_mode():
        trunk(crops)
    trunk(crops).view.sum().backward()


def test_bf16_follows_fp32() -> None:
    trunk, crops, keys = make().float(), crops_of(GROUPS, torch.float32), drop_keys(0, 1, torch.arange(9), 1)
    exact = trunk(crops, keys)
    half = trunk.bfloat16()(crops, keys)
    assert half.view.dtype == torch.bfloat16
    half.view.float().square().sum().backward()
    assert (half.regions.float() - exact.regions).abs().mean() < 0.05  # of values around 1
    assert all(p.grad.isfinite().all() for p in trunk.parameters())


def test_initial_values_match_official_distributions() -> None:
    trunk = ViL(*SHAPE, window=3, size=64)
    initialize(trunk, 0)
    assert set(initial_values(trunk)) == {name for name, _ in trunk.named_parameters()}
    for name, p in trunk.named_parameters():
        if name.endswith("patch_embed.proj.weight"):  # torch's own
            assert p.abs().max().item() == pytest.approx(p[0].numel() ** -0.5, rel=0.1), name
        elif p.numel() > 200:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
    assert trunk([torch.randn(2, 3, 32, 32)]).view.isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="torch.export of torch 2.7 fixes the batch")
def test_exported_graph_accepts_any_batch_size_without_empty_tables() -> None:
    module = make(size=64).eval().float().plain(52)  # maps that no other test has
    batch = {"images": {0: torch.export.Dim("batch")}}
    graph = torch.export.export(module, (torch.randn(2, 3, 52, 52),), dynamic_shapes=batch).module()
    images = torch.randn(5, 3, 52, 52)
    for a, b in zip(graph(images), module(images), strict=True):
        torch.testing.assert_close(a, b)
        assert type(b.detach()) is torch.Tensor
