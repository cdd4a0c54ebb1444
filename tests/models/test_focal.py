"""The packed Focal Transformer against the published code's numbers, a slow attention written out here, and itself."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from esvit_scale.errors import UserError
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.focal import Focal
from esvit_scale.models.focal_attention import MixWindows, lay_out
from esvit_scale.models.focal_windows import focal_tables
from esvit_scale.models.initialize import initial_value, initial_values
from esvit_scale.models.registry import build_trunk
from tests import tiny
from tests.models.rule import by_hash, by_rule, fill

OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "official_focal.json").read_text())
# Windows that do not divide a map, a ring that wraps around within one window, a last stage without a ring.
SHAPE = {"embed_dim": 8, "depths": (2, 1, 1), "heads": (1, 2, 2), "window": 4, "size": 64}
GROUPS = [(2, 64), (3, 24), (1, 44)]
COUNTS = {"focal_t": 28_111_380, "focal_s": 50_372_940, "focal_b": 88_790_400}  # the published code's, without its head


def make(**more):
    trunk = Focal(**SHAPE, **more).double()
    fill(trunk, by_hash)
    return trunk


def crops_of(groups, dtype=torch.float64):
    return [torch.randn(n, 3, s, s, dtype=dtype) for n, s in groups]


def config_of(trunk, size=224, **model):
    return tiny.model_config({"trunk": trunk} | model, size)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_match_published(name):
    with torch.device("meta"):
        trunk = build_trunk(config_of(name))
    assert sum(p.numel() for p in trunk.parameters()) == COUNTS[name]
    assert trunk.channels[-1] == trunk.dim == (1024 if name == "focal_b" else 768)


@pytest.mark.parametrize("case", OFFICIAL, ids=["window 7 at 224, 96 and 160", "window 4 at 64, 48 and 112"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_match_official_code(case, dtype):
    """Outputs and gradients of the published module, built for the first size, its blocks told of the others."""
    trunk = Focal(**{k: case[k] for k in ("embed_dim", "depths", "heads", "window", "size")}).double()
    fill(trunk, by_hash)
    assert {name for name, _ in trunk.named_parameters()} == set(case["gradients"])
    crops = [by_hash(f"crop{s}", (n, 3, s, s), 1.5).to(dtype) for n, s in case["crops"]]
    ours = trunk.to(dtype)(crops)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-5
    for found, expected in ((ours.view, case["view"]), (ours.regions[:: case["region_step"]], case["region_rows"])):
        expected = torch.tensor(expected, dtype=dtype)
        assert (found.detach().flatten() - expected).norm() < tolerance * expected.norm()
    (
        (ours.view * by_rule("gv", ours.view.shape)).sum() + (ours.regions * by_rule("gr", ours.regions.shape)).sum()
    ).backward()
    for name, p in trunk.named_parameters():
        norm, projection = case["gradients"][name]
        assert p.grad.norm().item() == pytest.approx(norm, rel=10 * tolerance), name
        assert (p.grad * by_rule(name + "g", p.shape)).sum().item() == pytest.approx(
            projection, abs=10 * tolerance * norm
        )


def test_attention_matches_definition():
    """Query by query on a map of 5 × 6 in windows of 4: own tokens, the ring, 3 × 3 pooled windows."""
    attn = Focal(**SHAPE).double().blocks[0].attn
    attn.focal, heads = 3, 2
    h, w, side, expand, focal, width = 5, 6, 4, 3, 3, 4
    rows = torch.randn(1, h * w + 1 + 4, 3 * width, dtype=torch.float64)
    ring = 4 * side**2 - 4 * (side - expand) ** 2
    bias = torch.randn(heads, side**2, side**2 + ring + focal**2, dtype=torch.float64)
    ours = MixWindows.apply(rows, bias, (h, w, side, expand, focal))
    padded = rows[0, h * w].expand(8, 8, -1).clone()
    padded[:h, :w] = rows[0, : h * w].view(h, w, -1)
    pooled = rows[0, h * w + 1 :].view(2, 2, -1)
    for y in range(h):
        for x in range(w):
            top, left = y // side * side, x // side * side
            keys = [padded[top + a, left + b] for a in range(side) for b in range(side)]
            for dy, dx in ((3, 3), (3, -3), (-3, 3), (-3, -3)):
                for a in range(side):
                    for b in range(side):
                        if not (0 <= a + dy < side and 0 <= b + dx < side):
                            keys.append(padded[(top + a + dy) % 8, (left + b + dx) % 8])
            scores_of = bias[:, (y - top) * side + x - left]
            visible = list(range(len(keys)))
            for a in range(focal):
                for b in range(focal):
                    i, j = top // side + a - 1, left // side + b - 1
                    if 0 <= i < 2 and 0 <= j < 2:
                        visible.append(side**2 + ring + a * focal + b)
                        keys.append(pooled[i, j])
            q = rows[0, y * w + x, :width].view(heads, -1)
            k, v = torch.stack(keys)[:, width:].view(-1, 2, heads, width // heads).permute(1, 2, 0, 3)
            scores = (k @ q.unsqueeze(-1)).squeeze(-1) / math.sqrt(width // heads) + scores_of[:, visible]
            expected = (scores.softmax(-1).unsqueeze(1) @ v).flatten()
            torch.testing.assert_close(ours[0, y * w + x], expected, rtol=0, atol=1e-12)


def test_attention_gradients_pass_gradcheck():
    """The backward written out, against autograd's through the same layout (whose meaning the test above has)."""
    layout = (3, 5, 4, 3, 3)
    rows = torch.randn(2, 15 + 1 + 2, 3 * 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 16, 16 + 60 + 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 15, 4, dtype=torch.float64)
    tables = focal_tables(*layout, rows.device)
    q, k, v = lay_out(rows, tables, 2)
    scores = (q @ k.transpose(-2, -1) / math.sqrt(2) + bias).masked_fill(tables.hidden, -torch.inf)
    slow = (scores.softmax(-1) @ v).transpose(2, 3).flatten(3).flatten(1, 2).index_select(1, tables.place)
    ours = MixWindows.apply(rows, bias, layout)
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (rows, bias)) for x in (ours, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_packed_forward_equals_separate_forwards():
    """All crops at once, one pass per resolution, and one per image: the same numbers, gradients too."""
    trunk, crops = make(), crops_of(GROUPS)
    singly = [image[None] for crop in crops for image in crop]
    found = []
    for batches in ([crops], [[x] for x in crops], [[x] for x in singly]):
        outputs = [trunk(batch) for batch in batches]
        view, regions = torch.cat([f.view for f in outputs]), torch.cat([f.regions for f in outputs])
        loss = (view * by_rule("v", view.shape)).sum() + (regions * by_rule("r", regions.shape)).sum()
        found.append([view, regions, *torch.autograd.grad(loss, list(trunk.parameters()))])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert trunk(crops).grids == [(2, 4, 4), (3, 2, 2), (1, 3, 3)]


def test_each_layer_is_called_once():
    trunk, calls = make(), []
    for name, module in trunk.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    trunk(crops_of(GROUPS))
    assert sorted(calls) == sorted(set(calls))
    holders = {name.rpartition(".")[0] for name, _ in trunk.named_parameters()}
    assert {h for h in holders if "table_to_windows" not in h} == set(calls)


def test_last_blocks_and_stage_maps_have_expected_shapes():
    trunk, crops = make(), crops_of(GROUPS)
    maps = trunk.last_blocks(crops, 3)
    assert [m.tokens.shape[1] for m in maps] == [8, 16, 32]
    assert maps[0].grids == [(2, 16, 16), (3, 6, 6), (1, 11, 11)]
    regions = trunk(crops).regions
    torch.testing.assert_close(maps[-1].tokens, regions)
    stages = trunk.stage_maps(crops)
    torch.testing.assert_close(stages[0].tokens, maps[0].tokens)
    torch.testing.assert_close(trunk.norm(stages[-1].tokens), regions)
    assert [(s.grids[0][1], s.tokens.shape[1]) for s in stages] == [(16, 8), (8, 16), (4, 32)]
    assert (trunk.channels, trunk.reductions) == ((8, 16, 32), (4, 8, 16))


def test_stochastic_depth_of_a_crop_does_not_depend_on_the_batch():
    trunk = make(drop_path=0.6)
    crops, keys = crops_of([(6, 24)])[0], drop_keys(3, 5, torch.tensor([4, 9, 2]), 2)
    together, order = trunk([crops], keys).view, torch.tensor([5, 0, 3])
    torch.testing.assert_close(trunk([crops[order]], keys[order]).view, together[order], rtol=0, atol=1e-12)
    assert not torch.allclose(together, trunk([crops]).view)
    assert torch.equal(trunk([crops]).view, make()([crops]).view)


def test_activation_checkpointing_changes_nothing():
    crops, keys, gradients = crops_of(GROUPS), drop_keys(0, 1, torch.arange(1), 6), []
    for wrapped in (False, True):
        trunk, blocks = make(drop_path=0.5), []
        if wrapped:
            trunk.run_block = lambda block, *args, blocks=blocks: (
                blocks.append(block) or checkpoint(block, *args, use_reentrant=False)
            )
        trunk(crops, keys).view.square().sum().backward()
        gradients.append([p.grad for p in trunk.parameters()])
        assert not wrapped or blocks == trunk.blocks
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_follows_fp32():
    trunk, crops = make().float(), crops_of(GROUPS, torch.float32)
    exact, half = trunk(crops), trunk.bfloat16()(crops)
    half.view.float().square().sum().backward()
    assert (half.regions.float() - exact.regions).abs().mean() < 0.05  # of values around 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk.parameters())


def test_initial_values_match_published_code():
    with torch.device("meta"):
        trunk = Focal(16, (1, 1), (1, 2), size=112)
    inits, spread = initial_values(trunk), {}
    for name, p in trunk.named_parameters():
        spread[name.removeprefix("layers.0.")] = initial_value(name, inits[name], p.shape, 0).std(correction=0).item()
    assert spread["blocks.0.attn.relative_position_bias_table"] == 0
    for name in ("table_to_neighbors", "table_to_windows.0"):
        assert spread[f"blocks.0.attn.relative_position_bias_{name}"] == pytest.approx(0.02, rel=0.2)
    assert spread["blocks.0.pool_layers.0.weight"] == pytest.approx(0.02, rel=0.4)  # not 1/49: a later pass fills it
    assert spread["downsample.proj.weight"] == pytest.approx((4 * 16) ** -0.5 / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(
    ("size", "model", "words"),
    [
        (16, {}, ["data.global_crops.size", "16 pixels", "at least 32"]),
        (224, {"window": 2}, ["model.window", "2 is too small", "to 3 or more"]),
        (224, {"embed_dim": 64}, ["model.heads.0", "64 channels"]),
    ],
)
def test_invalid_shapes_are_refused_in_one_line(size, model, words):
    with pytest.raises(UserError) as error:
        build_trunk(config_of("focal_t", size, **model))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.slow  # vil's is among the fast tests
@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="torch.export of torch 2.7 fixes the batch")
def test_exported_graph_accepts_any_batch_size():
    trunk = make().float().eval()
    module = trunk.plain(64).eval()
    batch = {"images": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(module, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=batch).module()
    images = torch.randn(3, 3, 64, 64)
    view, regions = exported(images)
    torch.testing.assert_close(view, trunk([images]).view)
    torch.testing.assert_close(regions.flatten(0, 1), trunk([images]).regions)
    trunk([images])[0].sum().backward()  # tables that the export made serve training
