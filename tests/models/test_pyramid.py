"""The pyramid against timm's and against the trunk's own features, at sizes that pad."""

from functools import partial

import pytest
import torch
from torch import nn

from esvit_scale.errors import UserError
from esvit_scale.models.pyramid import Pyramid
from esvit_scale.models.swin import Swin
from esvit_scale.models.swin_v2 import SwinV2
from tests.models.rule import fill

SHAPE = (8, (1, 2, 2), (1, 2, 4))


@torch.no_grad()
@pytest.mark.parametrize("version", [Swin, SwinV2])
@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
def test_pyramid_has_one_map_per_stage_at_any_size(version: type[Swin], size: tuple[int, int]) -> None:
    trunk = version(*SHAPE, window=4, size=64)
    fill(trunk)
    pyramid = Pyramid(trunk)
    images = torch.randn(2, 3, *size)
    maps = pyramid(images)
    sides = [tuple(-(-side // r) for side in size) for r in pyramid.reductions]
    assert [tuple(m.shape) for m in maps] == [(2, c, *s) for c, s in zip(pyramid.channels, sides, strict=True)]
    regions = trunk.norm(maps[-1].permute(0, 2, 3, 1)).flatten(0, 2)
    torch.testing.assert_close(regions, trunk([images]).regions)


@torch.no_grad()
def test_maps_equal_timm_features_only() -> None:
    timm = pytest.importorskip("timm")
    trunk = Swin(8, (1, 1, 2, 1), (1, 2, 2, 4), window=7, size=224).double()
    fill(trunk)
    norm = partial(nn.LayerNorm, eps=1e-6)
    shape = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "norm_layer": norm}
    theirs = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **shape).double().eval()
    state = {}
    for name, value in trunk.state_dict().items():
        _, _, rest = name.partition("layers.")
        stage, _, rest = rest.partition(".")
        key = name if not rest else f"layers_{int(stage) + rest.startswith('downsample')}.{rest}"
        if not key.startswith("norm."):
            state[key] = value
    theirs.load_state_dict(state)
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    for ours, other in zip(Pyramid(trunk)(image), theirs(image), strict=True):
        torch.testing.assert_close(ours, other.permute(0, 3, 1, 2), rtol=0, atol=1e-9)


def test_gradients_reach_the_trunk() -> None:
    pyramid = Pyramid(Swin(*SHAPE, window=4, size=64))
    sum(m.square().mean() for m in pyramid(torch.randn(1, 3, 40, 40))).backward()
    assert pyramid.trunk.patch_embed.proj.weight.grad.abs().sum() > 0


def test_trunk_without_stages_is_refused() -> None:
    with pytest.raises(UserError, match="Linear has none"):
        Pyramid(nn.Linear(2, 2))
