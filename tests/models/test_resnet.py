"""The packed ResNet against torchvision's, which the official code trains, and itself."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from esvit_scale.errors import UserError
from esvit_scale.models import recomputation
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initial_value, initial_values
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.resnet import ResNet
from tests import tiny
from tests.models.rule import by_hash

GROUPS = [(3, 64), (2, 50), (4, 32)]


def resnet_config(model, size=224):
    values = {"trunk": "resnet50", "drop_path": 0.0} | model
    return tiny.model_config(values, size)


@torch.no_grad()
def move(module):
    """Parameters and statistics away from where they start."""
    for name, t in module.state_dict().items():
        if name.endswith("running_var"):
            t.copy_(by_hash(name, t.shape, 0.4, 1.0))
        elif t.dim() == 1 and t.is_floating_point():
            t.copy_(by_hash(name, t.shape, 0.2, 1.0 if name.endswith("weight") else 0.0))
        elif t.is_floating_point():
            t.copy_(by_hash(name, t.shape, 2 / t[0].numel() ** 0.5))


def make(**kwargs):
    trunk = ResNet(4, (1, 2, 1), **kwargs).double()
    move(trunk)
    return trunk


def crops_of(groups=GROUPS, dtype=torch.float64):
    return [torch.randn(n, 3, s, s, dtype=dtype) for n, s in groups]


def same_as_torchvision(trunk, theirs, crops, tolerance):
    """Features, gradients and running statistics of one pass per resolution."""
    maps = []
    handle = theirs.layer4.register_forward_hook(lambda _module, _inputs, out: maps.append(out))
    views = torch.cat([theirs(x) for x in crops])
    handle.remove()
    ours = trunk(crops)
    regions = torch.cat([x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps])
    assert ours.grids == [(len(x), *x.shape[-2:]) for x in maps]
    torch.testing.assert_close(ours.view, views, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.regions, regions, rtol=tolerance, atol=tolerance)
    weigh = lambda v, r: (v * by_hash("v", v.shape)).sum() + (r * by_hash("r", r.shape)).sum()  # noqa: E731
    weigh(views, regions).backward()
    weigh(ours.view, ours.regions).backward()
    expected = dict(theirs.named_parameters())
    for name, p in trunk.named_parameters():
        difference = (p.grad - expected[name].grad).norm()
        assert difference <= tolerance * 10 * expected[name].grad.norm(), name
    statistics = dict(theirs.named_buffers())
    for name, buffer in trunk.named_buffers():
        torch.testing.assert_close(buffer, statistics[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_outputs_match_torchvision_resnet50(training):
    """What the official code trains, in float64; statistics per resolution in training."""
    models = pytest.importorskip("torchvision.models")
    trunk = build_trunk(resnet_config({})).double().train(training)
    move(trunk)
    theirs = models.resnet50().double().train(training)
    theirs.fc = torch.nn.Identity()
    missing, unexpected = theirs.load_state_dict(trunk.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    same_as_torchvision(trunk, theirs, crops_of([(2, 64), (3, 50)] if training else [(1, 224), (1, 96)]), 1e-9)


def test_parameter_count():
    with torch.device("meta"):
        trunk = build_trunk(resnet_config({}))
    assert sum(p.numel() for p in trunk.parameters()) == 23_508_032
    assert (trunk.dim, trunk.channels, trunk.reductions) == (2048, (256, 512, 1024, 2048), (4, 8, 16, 32))
    inits = initial_values(trunk)
    for name, module in trunk.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name.startswith("layer2"):
            value = initial_value(f"{name}.weight", inits[f"{name}.weight"], module.weight.shape, 0)
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert value.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_packed_forward_equals_one_pass_per_resolution(training):
    trunk, crops = make().train(training), crops_of()
    together, alone = trunk(crops), [trunk([x]) for x in crops]
    torch.testing.assert_close(together.view, torch.cat([f.view for f in alone]), rtol=0, atol=1e-12)
    torch.testing.assert_close(together.regions, torch.cat([f.regions for f in alone]), rtol=0, atol=1e-12)
    assert together.grids == [g for f in alone for g in f.grids] == [(3, 4, 4), (2, 4, 4), (4, 2, 2)]
    if not training:
        single = torch.cat([trunk([x[i : i + 1]]).view for x in crops for i in range(len(x))])
        torch.testing.assert_close(together.view, single, rtol=0, atol=1e-12)


def test_stage_maps_and_last_blocks_have_expected_shapes():
    trunk, crops = make().eval(), crops_of()
    stages, last = trunk.stage_maps(crops), trunk.last_blocks(crops, 3)
    assert [m.tokens.shape[1] for m in stages] == list(trunk.channels)
    for m, reduction in zip(stages, trunk.reductions, strict=True):
        assert m.grids == [(n, -(-s // reduction), -(-s // reduction)) for n, s in GROUPS]
    assert [m.tokens.shape[1] for m in last] == [32, 32, 64]
    assert torch.equal(last[-1].tokens, trunk(crops).regions)
    assert torch.equal(last[1].tokens, stages[1].tokens)
    with torch.no_grad():
        view, regions = trunk.plain(64)(crops[0])
    assert (view.shape, regions.shape) == ((3, 64), (3, 16, 64))


def test_checkpointing_and_stochastic_depth_match_reference():
    crops, keys, gradients, statistics = crops_of(), drop_keys(0, 1, torch.arange(3), 3), [], []

    def run(block, *args):
        contexts = lambda: (nullcontext(), recomputation.recomputing())  # noqa: E731
        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    for wrapped in (False, True):
        trunk = make(drop_path=0.5)
        if wrapped:
            trunk.run_block = run
        trunk(crops, keys).view.square().sum().backward()
        gradients.append([p.grad for p in trunk.parameters()])
        statistics.append(list(trunk.buffers()))
    assert all(torch.equal(a, b) for pairs in (gradients, statistics) for a, b in zip(*pairs, strict=True))
    trunk.eval()
    together = trunk(crops, keys).view
    torch.testing.assert_close(trunk([crops[1][1:]], keys[4:5]).view, together[4:5], rtol=0, atol=1e-12)
    assert not torch.allclose(together, trunk(crops).view)


def test_bf16_follows_fp32():
    trunk = make().bfloat16()
    features = trunk(crops_of(dtype=torch.float32))
    features.view.float().square().sum().backward()
    assert features.view.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in trunk.parameters())


def test_invalid_models_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"model\.heads: resnet50 has no attention; leave it out") as error:
        build_trunk(resnet_config({"heads": [1, 1, 1, 1]}))
    assert "\n" not in str(error.value)
    assert build_trunk(resnet_config({"depths": [1, 1], "embed_dim": 8})).channels == (32, 64)
