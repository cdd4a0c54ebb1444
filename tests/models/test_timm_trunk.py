"""timm's networks as trunks: timm's own numbers, keyed stochastic depth, batch norms, values by seed, and refusals."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esvit_scale.config import validate
from esvit_scale.errors import UserError
from esvit_scale.models import batch_norm, recomputation, timm_probe
from esvit_scale.models.drop_path import drop_keys, keep_scales
from esvit_scale.models.initialize import initialize
from esvit_scale.models.layer_norm import LayerNorm
from esvit_scale.models.registry import build_trunk

timm = pytest.importorskip("timm")

LISTED = [  # a small one of every family whose cells lie otherwise: NHWC, NCHW, tokens, tokens with a class token
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "focalnet_tiny_srf",
    "davit_tiny",
    "mvitv2_tiny",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "resnet18",
]
QUICK = ["convnext_atto", "vit_tiny_patch16_224", "resnet18"]


def timm_config(name, sizes=(64, 32), drop_path=0.3, **values):
    local = [{"size": size, "count": 1} for size in sizes[1:]]
    data = {"global_crops": {"size": sizes[0]}, "local_crops": local}
    return validate({"model": {"trunk": f"timm:{name}", "drop_path": drop_path}, "data": data, **values}, where="test")


def make(name, **kwargs):
    trunk = build_trunk(timm_config(name, **kwargs))
    initialize(trunk, 3)
    return trunk


def crops_of(n=(2, 3), sizes=(64, 32), **kwargs):
    return [torch.randn(count, 3, size, size, **kwargs) for count, size in zip(n, sizes, strict=True)]


def slow(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow(LISTED))
def test_initial_values_and_outputs_match_timm(name):
    """The values are those that timm draws from the seed, the features those of its head, one pass per resolution."""
    trunk, crops = make(name).eval(), crops_of()
    torch.manual_seed(3)
    theirs = timm.create_model(name, num_classes=0, **dict(trunk.probe.arguments)).eval()
    assert all(torch.equal(p, trunk.network.get_parameter(n)) for n, p in theirs.named_parameters())
    with torch.no_grad():
        ours = trunk(crops)
        cells = [theirs.forward_features(x) for x in crops]
        views = torch.cat([theirs.forward_head(y, pre_logits=True) for y in cells])
        torch.testing.assert_close(ours.view, views)
        maps = trunk.last_blocks(crops, 2)
        stages = trunk.stage_maps(crops) if trunk.channels else []
        pyramid = theirs.forward_intermediates(crops[1], norm=False, intermediates_only=True) if stages else []
    assert (trunk.dim, trunk.has_regions) == (views.shape[1], True)
    assert ours.grids == ([(2, 4, 4), (3, 2, 2)] if name.startswith("vit_") else [(2, 2, 2), (3, 1, 1)])
    if name.startswith("vit_"):
        torch.testing.assert_close(ours.regions, torch.cat([y[:, 1:].flatten(0, 1) for y in cells]))
        before = theirs.norm(
            theirs.forward_intermediates(crops[0], norm=False, intermediates_only=True)[-2].flatten(2).mT
        )
        torch.testing.assert_close(maps[0].tokens[: 2 * 16], before.flatten(0, 1))
    else:  # the view is what its pooling makes of the cells
        pooled = torch.stack([ours.regions[:4].mean(0), ours.regions[4:8].mean(0)])
        norms_what_it_pooled = isinstance(getattr(getattr(theirs, "head", None), "norm", None), nn.LayerNorm)
        assert torch.allclose(pooled, views[:2], atol=1e-4) != norms_what_it_pooled
    assert torch.equal(maps[-1].tokens, ours.regions)
    assert torch.equal(maps[-1].view, ours.view)
    for found, theirs_ in zip(stages[::-1], pyramid[::-1], strict=False):
        torch.testing.assert_close(found.tokens[-theirs_[:, 0].numel() :], theirs_.permute(0, 2, 3, 1).flatten(0, 2))


@pytest.mark.parametrize("name", slow(["convnext_atto", "resnet18", "swin_tiny_patch4_window7_224", "mvitv2_tiny"]))
def test_recomputation_drops_the_same_branches(name):
    """Two resolutions, and the backward comes after both: a block must know whose drop factors are its own."""

    def run(block, *args):
        contexts = lambda: (nullcontext(), recomputation.recomputing())  # noqa: E731
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    crops, keys, gradients, buffers = crops_of(), drop_keys(0, 1, torch.arange(5), 1), [], []
    for wrapped in (False, True):
        trunk = make(name)
        if wrapped:
            trunk.run_block = run
        features = trunk(crops, keys)
        (features.view.square().sum() + features.regions.sum()).backward()
        gradients.append([p.grad for p in trunk.parameters()])
        buffers.append(list(trunk.buffers()))
    assert all(g is not None for g in gradients[0])
    assert all(torch.equal(a, b) for pairs in (gradients, buffers) for a, b in zip(*pairs, strict=True))
    assert len(trunk.blocks) == sum(trunk.depths) >= 6


def test_stochastic_depth_of_a_crop_does_not_depend_on_the_batch():
    trunk, crops = make("convnext_atto"), crops_of((4, 2))
    keys = drop_keys(0, 0, torch.arange(6), 1)
    together = trunk(crops, keys).view
    torch.testing.assert_close(trunk([crops[0][2:3]], keys[2:3]).view, together[2:3], rtol=0, atol=1e-5)
    assert not torch.allclose(together, trunk(crops).view)
    assert torch.equal(trunk(crops).view, trunk.eval()(crops).view)  # nothing else is drawn
    rates = [block.drop_path.drop_prob for block in timm.create_model("convnext_atto", drop_path_rate=0.3).modules() if hasattr(block, "drop_path") and hasattr(block.drop_path, "drop_prob")]  # fmt: skip
    assert trunk.drop_rates == rates
    scales = keep_scales(keys, torch.tensor(rates))[:, 0]
    assert ((scales == 0).float().mean() - torch.tensor(rates).mean()).abs() < 0.2


def test_dropped_branches_are_left_out():
    """By hand: ConvNeXt's block is x + s · branch(x)."""
    trunk, x = make("convnext_atto", sizes=(32,)), torch.randn(3, 40, 8, 8)
    block = trunk.network.stages[0].blocks[1]
    with torch.no_grad():
        block.gamma.fill_(1.0)
    whole = block(x) - x
    trunk.state.scales = torch.tensor([[0.0, 2.0, 1.0]]).expand(len(trunk.drop_rates), -1)
    torch.testing.assert_close(block(x), x + whole * torch.tensor([0.0, 2.0, 1.0]).view(3, 1, 1, 1))


def test_batch_norms_are_replaced_and_run_per_resolution():
    trunk, crops = make("resnet18", drop_path=0.0), crops_of((4, 6))
    kinds = {type(m) for m in trunk.modules() if "Norm" in type(m).__name__}
    assert all(issubclass(kind, batch_norm.BatchNorm) for kind in kinds)
    theirs = timm.create_model("resnet18", num_classes=0).train()
    theirs.load_state_dict(trunk.network.state_dict(), strict=False)
    ours, views = trunk(crops).view, torch.cat([theirs(x) for x in crops])
    torch.testing.assert_close(ours, views, rtol=1e-3, atol=1e-4)
    statistics = dict(theirs.named_buffers())
    for name, buffer in trunk.network.named_buffers():
        torch.testing.assert_close(buffer, statistics[name], rtol=1e-4, atol=1e-5)
    activated = make("regnety_002", drop_path=0.0)  # its batch norms hold the activations
    theirs = timm.create_model("regnety_002", num_classes=0).eval()
    theirs.load_state_dict(activated.network.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(activated.eval()(crops).view, torch.cat([theirs(x) for x in crops]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_ns_224"])
def test_bf16_follows_fp32(name):
    """V2's tables beside its parameters follow their precision, also when an engine has widened them again; the dropout
    in CR's position network is off."""
    trunk = make(name, drop_path=0.0).bfloat16()
    for module in trunk.modules():
        for key, buffer in module._buffers.items():
            module._buffers[key] = buffer.float() if buffer is not None and buffer.is_floating_point() else buffer
    crops = crops_of()
    features = trunk(crops)
    features.view.float().square().sum().backward()
    assert features.view.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in trunk.parameters())
    assert torch.equal(trunk(crops).view, features.view)


def test_initial_values_depend_only_on_the_seed():
    with torch.device("meta"):
        trunk = build_trunk(timm_config("convnext_atto"))
    values = trunk.initial_values()
    state = torch.random.get_rng_state()
    first = {name: init.draw(7) for name, init in values.items()}
    assert torch.equal(state, torch.random.get_rng_state())
    again = {name: values[name].draw(7) for name in reversed(list(values))}
    assert all(torch.equal(first[name], again[name]) for name in values)
    assert first["network.stem.0.weight"].dtype == torch.float32
    assert not torch.equal(first["network.stem.0.weight"], values["network.stem.0.weight"].draw(8))


def test_network_with_another_token_width_has_no_regions():
    trunk = make("mobilenetv3_small_050")
    features = trunk(crops_of())
    assert (trunk.has_regions, trunk.dim, features.view.shape) == (False, 1024, (5, 1024))
    assert (features.regions.shape, features.grids) == ((0, 1024), [(2, 0, 0), (3, 0, 0)])


@pytest.mark.parametrize(
    ("cells", "height", "width", "grid"),
    [(49, 224, 224, (7, 7)), (8, 64, 128, (2, 4)), (10, 64, 64, None), (0, 1, 1, None)],
)
def test_token_grids_match_the_network(cells, height, width, grid):
    assert timm_probe.grid_of(cells, height, width) == grid


@pytest.mark.parametrize(
    ("name", "sizes", "values", "words"),
    [
        ("swin_tinny_patch4_window7_224", (64,), {}, ["model.trunk", "swin_tinny", "did you mean 'swin_tiny_patch4"]),
        ("maxvit_nano_rw_256", (224, 96), {}, ["maxvit_nano_rw_256 does not take", "224, 96 pixels", "divisible by window"]),
        ("mixer_s32_224", (224, 96), {}, ["mixer_s32_224 does not take", "doesn't match model"]),
        ("vit_tiny_patch16_224", (224, 50), {}, ["does not take", "divisible by patch size"]),
        ("densenet121", (64,), {}, ["model.drop_path", "no stochastic depth", "model.drop_path=0"]),
        ("convnext_atto", (64,), {"depths": [1, 1]}, ["model.depths: timm:convnext_atto has widths of its own"]),
    ],
)  # fmt: skip
def test_invalid_models_are_refused_in_one_line(name, sizes, values, words):
    wanted = timm_config(name, sizes).model_dump()
    wanted["model"] |= values
    with pytest.raises(UserError) as error:
        build_trunk(validate(wanted, where="test"))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_reentrant_checkpointing_requires_one_crop_size():
    build_trunk(timm_config("convnext_atto", (64,), train={"activation_checkpointing": "deepspeed"}))
    with pytest.raises(UserError, match=r"train\.activation_checkpointing: deepspeed.*once a crop size \(2\).*torch"):
        build_trunk(timm_config("convnext_atto", train={"activation_checkpointing": "deepspeed"}))


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_layer_norms_sum_their_gradients_in_fp32(name):
    """All of them are replaced, and 20,000 rows of bf16 add up: each gradient to 0.5 % of fp64's."""
    norms = [m for m in make(name).modules() if isinstance(m, nn.LayerNorm)]
    assert norms
    assert all(isinstance(norm, LayerNorm) for norm in norms)
    torch.manual_seed(0)
    narrow, (width,) = norms[0].bfloat16(), norms[0].normalized_shape
    shape = (20, width, 25, 40) if name.startswith("convnext") else (20, 1000, width)
    x, grad = (torch.randn(shape) + 0.5).bfloat16(), (torch.randn(shape) + 0.1).bfloat16()
    wide = copy.deepcopy(narrow).double()
    narrow(x).backward(grad)
    wide(x.double()).backward(grad.double())
    for p, true in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert (p.grad.double() - true.grad).norm() < 5e-3 * true.grad.norm()
