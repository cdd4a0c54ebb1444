"""CvT against the official code's numbers, and packed against one pass per resolution and per image."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.cvt import CvT
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initial_values, initialize
from esvit_scale.models.pyramid import Pyramid
from esvit_scale.models.recomputation import recomputing
from esvit_scale.models.registry import build_trunk
from tests.models.rule import by_hash, fill

SHAPE = ((8, 16, 24, 32), (1, 2, 1, 1), (1, 2, 3, 4))
GROUPS = [(3, 64), (4, 32), (2, 41)]  # maps 16, 8, 4, 2 and 10, 5, 3, 2: with pads and without
OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "official_cvt.json").read_text())


def make(**kwargs: float) -> CvT:
    trunk = CvT(*SHAPE, **kwargs).double()
    fill(trunk, by_hash)
    return trunk


def crops_of(groups: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n, 3, size, size, dtype=dtype) for n, size in groups]


def official_case(case: dict, dtype: torch.dtype) -> tuple[CvT, list[Tensor], Tensor, Tensor]:
    named = {"widths": (64, 192, 384, 768), "depths": (2, 2, 6, 2), "heads": (1, 3, 6, 12)}
    trunk = CvT(**{k: case.get(k, v) for k, v in named.items()}).to(dtype)
    fill(trunk, by_hash)
    crops = [by_hash(f"crop{s}", (n, 3, s, s), 1.5).to(dtype) for n, s in case["crops"]]
    view, regions, *_ = trunk(crops)
    gradients = (by_hash(name, tuple(x.shape)).to(dtype) for name, x in (("gv", view), ("gr", regions)))
    sum((x * g).sum() for x, g in zip((view, regions), gradients, strict=True)).backward()
    return trunk, crops, view, regions


@pytest.mark.parametrize(("case", "dtype"), [(OFFICIAL[0], torch.float64), (OFFICIAL[1], torch.float32)])
def test_outputs_match_official_code(case: dict, dtype: torch.dtype) -> None:
    """Outputs at 224, 96 and 100 pixels and gradients of the official module in float64, weights and inputs by rule:
    a narrow model, and the full one in fp32."""
    trunk, crops, view, regions = official_case(case, dtype)
    near = 1e-8 if dtype == torch.float64 else 1e-5
    rows = {"view": view.flatten()[:: case["step"]], "regions": regions.flatten()[:: case["step"] * 7]}
    trunk.eval()
    with torch.no_grad():  # with the running statistics that the pass above left
        rows["evaluated"] = trunk(crops).view.flatten()[:: case["step"]]
    buffers = dict(trunk.named_buffers())
    for name, found in rows.items():
        expected = torch.tensor(case[name], dtype=torch.float64)
        assert (found.detach() - expected).norm() < near * expected.norm(), name
    for name, values in case.get("running", {}).items():
        torch.testing.assert_close(buffers[name], torch.tensor(values).to(dtype), rtol=1e-6, atol=1e-6)
    parameters = dict(trunk.named_parameters())
    for name, (norm, projection) in case["gradients"].items():
        grad = parameters[name].grad.double()
        assert grad.norm().item() == pytest.approx(norm, rel=10 * near, abs=1e-9), name
        assert (grad * by_hash(name + "g", grad.shape)).sum().item() == pytest.approx(projection, abs=10 * near * norm)


def test_published_model_has_expected_size() -> None:
    with torch.device("meta"):
        trunk = build_trunk(configs.resolve("cvt_s1"))
    assert sum(p.numel() for p in trunk.parameters()) == 29_303_616
    assert (trunk.dim, trunk.channels, trunk.reductions) == (768, (64, 192, 384, 768), (4, 8, 16, 32))
    view, regions, grids, *_ = trunk(
        [torch.empty(2, 3, 224, 224, device="meta"), torch.empty(8, 3, 96, 96, device="meta")]
    )
    assert (tuple(view.shape), tuple(regions.shape), grids) == ((10, 768), (170, 768), [(2, 7, 7), (8, 3, 3)])


@pytest.mark.parametrize("training", [True, False])
def test_packed_forward_equals_one_pass_per_resolution(training: bool) -> None:
    """In evaluation mode one per image as well; gradients too."""
    trunk, crops = make().train(training), crops_of(GROUPS)
    alone = [[x] for x in crops] if training else [[image] for x in crops for image in x.split(1)]
    found = []
    for batches in ([crops], alone):
        features = [trunk(batch) for batch in batches]
        view, regions = (torch.cat([f[i] for f in features]) for i in (0, 1))
        loss = (view * by_hash("v", view.shape)).sum() + (regions * by_hash("r", regions.shape)).sum()
        found.append((view, regions, *torch.autograd.grad(loss, list(trunk.parameters()))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_padding_enters_convolutions_and_statistics() -> None:
    """A map of 5 × 5 tokens and windows of 4: BatchNorm sees 8 × 8."""
    seen = []
    trunk = CvT(*SHAPE, window=4)
    trunk.blocks[0][0].fn.qkv.bn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    trunk([torch.randn(2, 3, 20, 20)])
    assert seen == [(2, 8, 8, 8)]


def test_overrides_change_the_shape() -> None:
    overrides = ["model.embed_dim=8", "model.depths=[1,1,1,1]", "model.heads=[1,1,2,2]"]
    trunk = build_trunk(configs.resolve("cvt_s1", overrides))
    assert (trunk.dim, trunk.depths, len(trunk.blocks)) == (96, (1, 1, 1, 1), 4)
    with pytest.raises(UserError, match="cvt_s1 has 4 stages, got 2"):
        build_trunk(configs.resolve("cvt_s1", ["model.depths=[1,1]", "model.heads=[1,1]"]))


def test_last_blocks_and_stage_maps_have_expected_shapes() -> None:
    trunk, crops = make().eval(), crops_of(GROUPS)
    maps = trunk.last_blocks(crops, 3)
    assert [m.tokens.shape[1] for m in maps] == [16, 24, 32]
    assert all(m.view is None for m in maps)
    torch.testing.assert_close(maps[-1].tokens, trunk(crops).regions)
    stages = trunk.stage_maps(crops)
    assert [m.tokens.shape[1] for m in stages] == list(trunk.channels)
    torch.testing.assert_close(trunk.norm(stages[-1].tokens), maps[-1].tokens)
    torch.testing.assert_close(stages[1].tokens, maps[0].tokens)
    assert stages[0].grids == [(3, 16, 16), (4, 8, 8), (2, 10, 10)]
    assert [tuple(x.shape[1:]) for x in Pyramid(trunk)(crops[0])] == [(8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)]


def test_activation_checkpointing_changes_nothing() -> None:
    crops, keys, found = crops_of(GROUPS), drop_keys(0, 1, torch.arange(1), 9), []
    for wrapped in (False, True):
        trunk = make(drop_path=0.5)
        if wrapped:

            def run(block: torch.nn.Module, *args: object) -> Tensor:
                contexts = lambda: (torch.enable_grad(), recomputing())  # noqa: E731
                return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

            trunk.run_block = run
        trunk(crops, keys).view.square().sum().backward()
        found.append([*(p.grad for p in trunk.parameters()), *trunk.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_stochastic_depth_of_a_crop_does_not_depend_on_the_batch() -> None:
    trunk, crops = make(drop_path=0.6).eval(), crops_of([(6, 64)])[0]
    keys = drop_keys(3, 5, torch.tensor([4, 9, 2]), 2)
    together = trunk([crops], keys).view
    order = torch.tensor([5, 0, 3])
    torch.testing.assert_close(trunk([crops[order]], keys[order]).view, together[order], rtol=0, atol=1e-12)
    assert not torch.allclose(together, trunk([crops]).view)


def test_bf16_follows_fp32() -> None:
    trunk, crops = make().float(), crops_of(GROUPS, torch.float32)
    exact = trunk(crops)
    for p in trunk.parameters():
        p.data = p.data.bfloat16()  # as an engine does: running statistics stay fp32
    half = trunk(crops)
    assert half.view.dtype == torch.bfloat16
    half.view.float().square().sum().backward()
    assert (half.regions.float() - exact.regions).abs().mean() < 0.05  # of values around 1
    assert all(p.grad.isfinite().all() for p in trunk.parameters())


def test_initial_values_match_official_distributions() -> None:
    trunk = CvT(*SHAPE)
    initialize(trunk, 0)
    assert set(initial_values(trunk)) == {name for name, _ in trunk.named_parameters()}
    for name, p in trunk.named_parameters():
        if p.ndim > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
        else:
            assert torch.equal(p, torch.full_like(p, 1.0 if name.endswith("weight") else 0.0)), name
    assert trunk([torch.randn(2, 3, 32, 32)]).view.isfinite().all()


@pytest.mark.slow  # vil's is among the fast tests
@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="torch.export of torch 2.7 fixes the batch")
def test_exported_graph_accepts_any_batch_size() -> None:
    trunk = make().eval().float()
    module = trunk.plain(40)
    batch = {"images": {0: torch.export.Dim("batch")}}
    graph = torch.export.export(module, (torch.randn(2, 3, 40, 40),), dynamic_shapes=batch).module()
    images = torch.randn(5, 3, 40, 40)
    for a, b in zip(graph(images), module(images), strict=True):
        torch.testing.assert_close(a, b)
