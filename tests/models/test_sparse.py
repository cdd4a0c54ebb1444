"""Sparse trunks: masks in training and dropping at inference agree, gradients, costs, and nothing breaks at low ratios."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from esvit_scale import config as configs
from esvit_scale.checkpoint import export
from esvit_scale.checkpoint.weights import TRUNK, Weights
from esvit_scale.config import Config
from esvit_scale.errors import UserError
from esvit_scale.models import sparse_parts, sparse_swin, sparse_vit
from esvit_scale.models import traced as models_traced
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.trunk import Features, Trunk

VIT = {"trunk": "sparse:deit_s", "embed_dim": 32, "heads": [4], "depths": [4], "registers": 2, "keep": 0.6}
SWIN = {"trunk": "sparse:swin_t", "embed_dim": 8, "depths": [1, 1, 4], "heads": [1, 2, 4], "window": 4}


def config_of(model: dict[str, Any], size: int = 64) -> Config:
    values = {"model": {"drop_path": 0.0} | model, "data": {"global_crops": {"size": size}, "local_crops": []}}
    return configs.validate(values, where="test")


def trunk_of(model: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64, size: int = 64) -> Trunk:
    """A trunk with weights so large that attention and scores differ much between tokens."""
    trunk = build_trunk(config_of(model, size))
    initialize(trunk, seed)
    with torch.no_grad():
        for name, p in trunk.named_parameters():
            if p.ndim == 2:
                p.mul_(3 if "predictors" in name else 2)
    return trunk.to(dtype)


def crops_of(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, side, side, generator=generator, dtype=dtype) for n, side in ((3, 64), (2, 48))]


def keys_of(crops: list[Tensor]) -> Tensor:
    return drop_keys(3, 5, torch.arange(sum(map(len, crops))), 1)


def masks_of(features: Features) -> list[Tensor]:
    assert features.kept is not None
    return features.kept.masks


# --- training and inference ------------------------------------------------------------------------------------------


def test_masked_attention_gives_the_kept_tokens_the_features_of_real_dropping(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, crops = trunk_of(VIT), crops_of()
    dropped = trunk(crops)
    chosen = masks_of(dropped)
    monkeypatch.setattr(sparse_vit, "draw_kept", lambda scores, keys, stage, grids: chosen[stage])
    masked = trunk(crops, keys_of(crops))
    assert [mask.sum() for mask in masks_of(masked)] == [3 * 9 + 2 * 5, 3 * 5 + 2 * 3, 3 * 3 + 2 * 1]  # ⌊0.6ˢ · T⌋
    kept = chosen[-1].bool()
    torch.testing.assert_close(masked.view, dropped.view, rtol=0, atol=1e-9)
    torch.testing.assert_close(masked.regions[kept], dropped.regions[kept], rtol=0, atol=1e-9)
    assert not torch.allclose(masked.regions[~kept], dropped.regions[~kept], atol=1e-3)  # they are computed on


def test_both_mlps_of_a_sparse_swin_are_those_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, crops = trunk_of(SWIN), crops_of()
    chosen: list[Tensor] = []
    original = sparse_swin._Pruning._choose

    def noting(self: Any, scores: Tensor, grids: Any, ratio: float) -> None:
        original(self, scores, grids, ratio)
        chosen.append(self.masks[-1])

    monkeypatch.setattr(sparse_swin._Pruning, "_choose", noting)
    dropped = trunk(crops)
    monkeypatch.setattr(sparse_swin, "draw_kept", lambda scores, keys, stage, grids: chosen[stage])
    masked = trunk(crops, keys_of(crops))
    torch.testing.assert_close(masked.regions, dropped.regions, rtol=0, atol=1e-9)
    for ours, theirs in zip(masks_of(masked), masks_of(dropped), strict=True):
        assert torch.equal(ours, theirs)
    counts = [3 * math.floor(ratio * 16) + 2 * math.floor(ratio * 9) for ratio in (0.7, 0.5, 0.3)]
    assert [int(mask.sum()) for mask in masks_of(dropped)] == counts


@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_keeping_every_token_is_the_dense_trunk(model: dict[str, Any]) -> None:
    sparse = trunk_of(model | {"keep": 1.0})
    if "swin" in model["trunk"]:
        sparse.ratios = (1.0, 1.0, 1.0)  # type: ignore[assignment]
    dense = trunk_of(
        {key: value for key, value in model.items() if key != "keep"} | {"trunk": model["trunk"].partition(":")[2]}
    )
    own = dense.state_dict()
    dense.load_state_dict({name: value for name, value in sparse.state_dict().items() if name in own})
    assert {name for name in sparse.state_dict() if name not in own} == {
        name for name in sparse.state_dict() if name.startswith(sparse.added)
    }
    ours, theirs = sparse(crops_of()), dense(crops_of())
    torch.testing.assert_close(ours.view, theirs.view, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.regions, theirs.regions, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_draws_of_a_crop_do_not_depend_on_the_batch(model: dict[str, Any]) -> None:
    trunk, crops = trunk_of(model), crops_of()
    keys = keys_of(crops)
    together = trunk(crops, keys)
    alone = [trunk([crops[0][i : i + 1]], keys[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(torch.cat([a.view for a in alone]), together.view[:3], rtol=0, atol=1e-10)
    for stage, mask in enumerate(masks_of(together)):
        of_each = torch.cat([masks_of(a)[stage] for a in alone])
        assert torch.equal(of_each, mask[: len(of_each)])
        assert set(mask.unique().tolist()) == {0.0, 1.0}


# --- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [-2.0, 0.0, 1.5])
def test_a_token_is_kept_with_the_probability_of_its_score(score: float) -> None:
    keys, grids = drop_keys(0, 1, torch.arange(200), 1), [(200, 10, 10)]
    drawn = sparse_parts.draw_kept(torch.full((20_000,), score), keys, 1, grids)
    p = torch.tensor(score).sigmoid().item()
    assert abs(drawn.mean().item() - p) < 5 * math.sqrt(p * (1 - p) / 20_000)  # five standard errors
    assert not torch.equal(drawn, sparse_parts.draw_kept(torch.full((20_000,), score), keys, 2, grids))


def test_noise_is_finite_at_the_ends_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([[0, sparse_parts._CHOICES - 1]])
    monkeypatch.setattr(sparse_parts, "draw_of", lambda *_: ends)
    noise = sparse_parts.logistic_noise(torch.zeros(1, dtype=torch.int64), 0, [(1, 1, 2)])
    assert noise.isfinite().all()
    assert noise[0] < -16
    assert noise[1] > 16


def test_of_equal_scores_the_first_are_kept() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 3.0], [0.0] * 6]).bfloat16()
    assert sparse_parts.highest(scores, 4).tolist() == [[0, 1, 3, 5], [0, 1, 2, 3]]
    assert [sparse_parts.count_kept(r, t) for r, t in ((0.7, 196), (0.29, 100), (0.05, 4), (1.0, 7))] == [137, 29, 1, 7]


def test_places_are_the_published_ones() -> None:
    assert sparse_vit.places(12) == (3, 6, 9)
    assert [sparse_vit.places(depth) for depth in (1, 2, 4)] == [(), (1,), (1, 2, 3)]
    assert [sparse_swin.places(depth) for depth in (2, 6, 18)] == [(1,), (1, 2, 3), (2, 4, 6)]


# --- gradients -------------------------------------------------------------------------------------------------------


def slow_predictor(module: Any, tokens: Tensor, kept: Tensor, noise: Tensor) -> Tensor:
    """The straight-through draw for one crop's tokens [T, C], by Gumbel-softmax over two choices."""
    hidden = F.gelu(module.mix(module.norm(tokens)))
    half = module.own_width
    mean = sum((kept[t] * hidden[t, half:] for t in range(len(tokens))), torch.zeros(half, dtype=tokens.dtype))
    mean = mean / torch.stack([kept.sum(), torch.ones((), dtype=tokens.dtype)]).max()
    found = []
    for t in range(len(tokens)):
        x = F.gelu(module.narrower(F.gelu(module.narrow(torch.cat([hidden[t, :half], mean])))))
        log_p = module.logits(x).log_softmax(0)
        soft = (log_p + torch.stack([noise[t], torch.zeros((), dtype=noise.dtype)])).softmax(0)
        hard = F.one_hot(soft.argmax(), 2).to(soft.dtype)
        found.append((hard - soft.detach() + soft)[0])
    return torch.stack(found)


def slow_attention(attn: Any, tokens: Tensor, seen: Tensor) -> Tensor:
    """Attention within one crop's tokens [L, C], one query and one head at a time."""
    length, dim = tokens.shape
    d = dim // attn.heads
    q, k, v = attn.qkv(tokens).view(length, 3, attn.heads, d).unbind(1)
    rows = []
    for i in range(length):
        heads = []
        for h in range(attn.heads):
            weights = []
            for j in range(length):
                weight = (q[i, h] @ k[j, h] / math.sqrt(d)).exp()
                weights.append(weight if i == j else weight * seen[j])
            total = torch.stack(weights).sum()
            heads.append(sum((w / total * v[j, h] for j, w in enumerate(weights)), torch.zeros(d, dtype=tokens.dtype)))
        rows.append(torch.cat(heads))
    return attn.proj(torch.stack(rows))


def slow_vit(trunk: Any, image: Tensor, key: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """View, regions and masks of one image [1, 3, S, S]."""
    side = image.shape[-1] // 16
    grid, before = [(1, side, side)], 1 + trunk.registers
    tokens, seen, masks = trunk._embed([image], grid, None), None, []
    for i, block in enumerate(trunk.blocks):
        if i in trunk.places:
            stage = trunk.places.index(i)
            kept = masks[-1] if masks else torch.ones(side**2, dtype=tokens.dtype)
            noise = sparse_parts.logistic_noise(key, stage, grid).double()
            masks.append(kept * slow_predictor(trunk.predictors[stage], tokens[before:], kept, noise))
            seen = torch.cat([torch.ones(before, dtype=tokens.dtype), masks[-1]])
        everyone = torch.ones(len(tokens), dtype=tokens.dtype)
        tokens = tokens + slow_attention(block.attn, block.norm1(tokens), everyone if seen is None else seen)
        tokens = tokens + block.mlp(block.norm2(tokens))
    tokens = trunk.norm(tokens)
    return tokens[:1], tokens[before:], masks


def test_straight_through_gradients_equal_those_of_a_slow_version() -> None:
    trunk = trunk_of(VIT | {"embed_dim": 16, "heads": [2], "registers": 1})
    image = crops_of(seed=7)[1][:1]
    key = keys_of([image])
    found = trunk([image], key)
    view, regions, masks = slow_vit(trunk, image, key)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for a, b, of_stages in ((found.view, found.regions, masks_of(found)), (view, regions, masks)):
        generator.manual_seed(1)
        draw = lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
        losses.append((a * draw(a)).sum() + (b * draw(b)).sum() + sum((m * draw(m)).sum() for m in of_stages))
    assert 0 < masks[0].sum() < len(masks[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(loss, list(trunk.parameters())) for loss in losses)
    for (name, _), a, b in zip(trunk.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        assert "predictors" not in name or a.abs().max() > 1e-6, name


# --- low ratios ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [-50.0, 0.0, 50.0])
@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_low_ratios_one_token_and_no_kept_token_are_finite(
    model: dict[str, Any], bias: float, dtype: torch.dtype
) -> None:
    """A bias of −50 prunes every token of every crop; 16 pixels are a single token."""
    trunk = trunk_of(model | {"keep": 0.05}, dtype=dtype)
    with torch.no_grad():
        for predictor in trunk.predictors:  # type: ignore[union-attr]
            predictor.logits.bias[0] = bias
    crops = [torch.randn(2, 3, side, side).to(dtype) for side in (64, 16)]
    trained, used = trunk(crops, keys_of(crops)), trunk(crops)
    if bias:
        assert masks_of(trained)[-1].sum() == (len(masks_of(trained)[-1]) if bias > 0 else 0)
    total = trained.view.float().sum() + trained.regions.float().square().mean() + sum(masks_of(trained)).mean()  # type: ignore[union-attr]
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk.parameters())
    assert used.view.isfinite().all()
    assert used.regions.isfinite().all()
    assert all(mask[:1].sum() + mask.sum() >= 4 for mask in masks_of(used))  # one token of each crop at least


def test_attention_is_finite_where_pruned_tokens_have_far_higher_scores() -> None:
    """Relative to the highest score of all, the weights of the kept tokens would vanish: 0 / 0."""
    q = torch.ones(1, 1, 4, 1)
    k = torch.tensor([0.0, 400.0, 1.0, 0.0]).view(1, 1, 4, 1)
    v = torch.arange(4.0).view(1, 1, 4, 1).requires_grad_()
    kept = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).requires_grad_()
    out = sparse_parts.attend_to_kept(q, k.requires_grad_(), v, kept)
    expected = torch.softmax(torch.tensor([0.0, 1.0]), 0) @ torch.tensor([0.0, 2.0])
    torch.testing.assert_close(out[0, 0, 0, 0], expected)
    torch.testing.assert_close(out[0, 0, 1, 0], torch.tensor(1.0))  # a pruned token sees itself
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (k, v, kept))


# --- costs -----------------------------------------------------------------------------------------------------------


def vit_flops(tokens: list[int], width: int, patches: int) -> int:
    """The products of a plain vision transformer whose blocks compute so many tokens each, and of its predictors."""
    blocks = sum(12 * n * width**2 + 2 * n**2 * width for n in tokens)
    scored = [tokens[i - 1] - 1 for i in (3, 6, 9)]
    per_token = width**2 + width**2 // 2 + width**2 // 8 + width // 4 * 2
    return 2 * (blocks + patches * 768 * width + sum(scored) * per_token)


TOKENS = [197] * 3 + [138] * 3 + [97] * 3 + [68] * 3  # of the blocks of a DeiT at 224 pixels that keeps 0.7


def counted(config: Config, size: int) -> int:
    """The FLOPs of a forward at inference, by torch's counter."""
    with torch.device("meta"):
        trunk = build_trunk(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            trunk([torch.empty(1, 3, size, size)])
    return counter.get_total_flops()


def test_flops_are_those_of_the_kept_tokens() -> None:
    config = config_of({"trunk": "sparse:deit_s", "keep": 0.7, "embed_dim": 32, "heads": [2]}, 224)
    assert counted(config, 224) == vit_flops(TOKENS, 32, 196)


@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_costs_are_those_of_torchs_counter(model: dict[str, Any]) -> None:
    cost = models_traced.crop_cost(config_of(model), 64)
    assert cost.flops + cost.flops_per_forward == counted(
        config_of(model), 64
    )  # a resize of positions is counted apart


@pytest.mark.slow
def test_flops_of_deit_s_are_the_published_ones() -> None:
    """2.9 G multiply-adds as published, of 4.6 G."""
    config = config_of({"trunk": "sparse:deit_s", "keep": 0.7}, 224)
    assert 5.8e9 < counted(config, 224) < 6.0e9
    assert counted(config, 224) == vit_flops(TOKENS, 384, 196)
    assert 9.1e9 < counted(config_of({"trunk": "deit_s"}, 224), 224) < 9.3e9


@pytest.mark.slow
def test_flops_of_a_sparse_swin_are_the_published_ones() -> None:
    """4.0 G multiply-adds as published, of 4.5 G."""
    assert 7.9e9 < counted(config_of({"trunk": "sparse:swin_t", "keep": 0.7}, 224), 224) < 8.2e9


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"trunk": "sparse:resnet50"}, "no sparse form of 'resnet50'"),
        ({"trunk": "sparse:swinv2_t"}, "no sparse form of 'swinv2_t'"),
        ({"trunk": "sparse:deit_s", "depths": [1]}, "leaves no block after a first one"),
        (SWIN | {"depths": [1, 1, 1]}, "has no third stage of two blocks"),
    ],
)
def test_a_trunk_that_cannot_prune_is_one_line(model: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match="model") as error:
        build_trunk(config_of(model))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- exported forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_plain_form_has_the_same_features(model: dict[str, Any]) -> None:
    trunk = trunk_of(model, dtype=torch.float32)
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        view, regions = trunk.plain(64)(images)
        expected = trunk([images])
    torch.testing.assert_close(view, expected.view, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(regions.flatten(0, 1), expected.regions, rtol=1e-4, atol=1e-4)


def test_timms_form_has_the_same_features() -> None:
    timm = pytest.importorskip("timm")
    import esvit_scale.models.sparse_timm  # noqa: F401

    trunk = trunk_of(VIT | {"registers": 2}, dtype=torch.float32)
    form = trunk.timm_form(64)
    assert form is not None
    assert form.imports == "esvit_scale.models.sparse_timm"
    network = timm.create_model(form.architecture, num_classes=0, global_pool=form.pool, **form.arguments)
    network.load_state_dict(form.tensors(trunk.state_dict()))
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), trunk([images]).view, rtol=1e-4, atol=1e-4)
        assert network.forward_features(images).shape[1] == 3 + 3  # class token, registers and ⌊0.6³ · 16⌋ patches


@pytest.mark.parametrize("model", [VIT, SWIN], ids=["vit", "swin"])
def test_attention_maps_are_of_the_tokens_that_a_block_computes(model: dict[str, Any]) -> None:
    trunk = trunk_of(model)
    image = crops_of()[0][0]
    blocks = trunk.attention_maps(image)
    assert len(blocks) == len(trunk.blocks)
    for block in blocks:
        torch.testing.assert_close(block.probabilities.sum(-1), torch.ones(block.probabilities.shape[:3]).double())
    if model is VIT:
        assert [int((block.cells >= 0).sum()) for block in blocks] == [16, 9, 5, 3]
        received = blocks[-1].received()
        kept = masks_of(trunk([image[None]]))[-1].view(4, 4).bool()
        assert torch.equal(received.sum(0) > 0, kept)


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param(VIT, id="vit"), pytest.param(SWIN, id="swin", marks=pytest.mark.long)])
def test_onnx_export_prunes_the_same_tokens_for_any_batch(model: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed (the extra `export`)")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (the extra `export`)")
    trunk = trunk_of(model, dtype=torch.float32)
    tensors = {TRUNK + name: value for name, value in trunk.state_dict().items()}
    weights = Weights(config_of(model), {"teacher": tensors}, {})
    export.write(tmp_path / "onnx", weights, "teacher", "onnx", tmp_path)
    session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 64, 64)
        view, regions = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = trunk([images])
        torch.testing.assert_close(torch.from_numpy(view), expected.view, rtol=0, atol=1e-3)
        torch.testing.assert_close(torch.from_numpy(regions).flatten(0, 1), expected.regions, rtol=0, atol=1e-3)
