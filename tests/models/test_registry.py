import pytest
import torch

from esvit_scale.config import validate
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import build_trunk
from esvit_scale.models.swin_variants import SHAPES
from esvit_scale.objective.network import build_student
from tests import tiny

COUNTS = {
    ("swin_t", 7): 27_519_354,
    ("swin_t", 14): 27_569_754,
    ("swin_s", 7): 48_837_258,
    ("swin_s", 14): 48_968_298,
    ("swin_b", 7): 86_743_224,
    ("swin_b", 14): 86_917_944,
    ("swin_l", 7): 194_995_476,
    ("swin_l", 14): 195_257_556,
    ("swinv2_t", 7): 27_578_154,  # V2's position bias does not depend on the window; T, S, B and L are timm's counts
    ("swinv2_t", 16): 27_578_154,
    ("swinv2_s", 7): 48_959_418,
    ("swinv2_b", 7): 86_893_816,
    ("swinv2_l", 7): 195_202_932,
    ("swinv2_h", 7): 655_219_370,
    ("swinv2_1b", 7): 1_060_976_996,
    ("swinv2_g", 7): 2_997_843_680,
}


def test_every_shape_has_a_parameter_count():
    assert {name for name, _ in COUNTS} == set(SHAPES)


@pytest.mark.parametrize(("name", "window"), COUNTS)
def test_parameter_counts_match_published(name, window):
    with torch.device("meta"):
        trunk = build_trunk(tiny.model_config({"trunk": name, "window": window}))
    assert sum(p.numel() for p in trunk.parameters()) == COUNTS[name, window]
    assert trunk.dim == SHAPES[name].embed_dim * 8


def test_overrides_change_the_shape():
    trunk = build_trunk(
        tiny.model_config({"embed_dim": 32, "depths": [1, 1, 2, 1], "heads": [1, 2, 4, 8], "window": 4}, 64)
    )
    assert trunk.dim == 256
    assert [stage.window for stage in trunk.stages] == [4, 4, 4, 2]
    assert [stage.shifts for stage in trunk.stages] == [[0], [0], [0, 0], [0]]


@pytest.mark.parametrize(
    ("model", "size", "words"),
    [
        ({"trunk": "swin_tt"}, 224, ["model.trunk", "swin_tt", "did you mean 'swin_t'"]),
        ({"trunk": "swin_t", "embed_dim": 64}, 224, ["model.heads.0", "3 heads", "64 channels", "nearest: 2"]),
        ({"trunk": "swin_t", "depths": [1, 1]}, 224, ["model.depths has 2", "model.heads 4"]),
        ({"trunk": "swin_t"}, 24, ["data.global_crops.size", "24 pixels", "at least 32"]),
    ],
)
def test_invalid_models_are_refused_in_one_line(model, size, words):
    with pytest.raises(UserError) as error:
        build_trunk(tiny.model_config(model, size))
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trunk", ["swin_t", "swinv2_t"])
@pytest.mark.parametrize(
    ("window", "size", "local"),
    [(20, 64, 32), (7, 50, 22), (1, 32, 32), (7, 56, 3)],
    ids=["larger than every map", "no multiples of 4", "one token", "a crop smaller than a patch"],
)
def test_odd_windows_and_crops_train(trunk, window, size, local):
    values = {
        "model": {"trunk": trunk, "embed_dim": 8, "depths": [1, 2, 1], "heads": [1, 1, 2], "window": window},
        "data": {"global_crops": {"size": size}, "local_crops": [{"size": local, "count": 2}]},
        "objective": {"prototypes": 16, "head_hidden": 8, "bottleneck": 4},
    }
    network = build_student(validate(values, where="test"))
    initialize(network, 0)
    crops = [torch.randn(4, 3, size, size), torch.randn(4, 3, local, local)]
    with torch.no_grad():
        targets = network.objective.targets(network.trunk(crops[:1]))
    loss, *_ = network(crops, targets, None, teacher_temp=0.04)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in network.parameters())
