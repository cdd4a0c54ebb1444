"""Costs by running a trunk without numbers: against Swin's closed form, and against what a CPU does and keeps."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esvit_scale import config as configs
from esvit_scale.models import registry as trunks
from esvit_scale.models import traced as models_traced
from esvit_scale.models.descriptions import CropCost
from esvit_scale.parallel import collectives
from tests.models import toy_trunk


def config_of(trunk, **model):
    values = {
        "data": {"global_crops": {"size": 64}, "local_crops": [{"size": 40, "count": 2}]},
        "model": {"trunk": trunk, "embed_dim": 16} | model,
    }
    return configs.validate(values, where="test")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(trunks.TRUNKS, "toy", toy_trunk.build)
    return config_of("toy")


@pytest.mark.parametrize("trunk", ["swin_t", "swinv2_t"])
@pytest.mark.parametrize("size", [64, 40, 30])
def test_traced_costs_equal_closed_form(trunk, size):
    config = config_of(trunk, depths=[2, 1, 2], heads=[1, 2, 4], window=5)
    cost = models_traced.crop_cost(config, size)
    formulas = trunks.build_trunk(config).formulas()
    assert cost == formulas.crop_cost(size, "executed")._replace(pixel_flops=0)


@pytest.mark.parametrize("size", [64, 40])
def test_traced_costs_equal_cpu_counts(toy, size):
    counter = FlopCounterMode(display=False)
    # Before torch 2.15 the counter has no formula for the CPU's flash attention, and counts it as nothing.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        features = trunks.build_trunk(toy)([torch.randn(1, 3, size, size)])
    cost: CropCost = models_traced.crop_cost(toy, size)
    assert tuple(cost) == (counter.get_total_flops(), counter.get_total_flops(), 0, features.grids[0][1:], 0)
    tokens = (size // 8) ** 2  # 12 C² a token and block, and the scores twice
    by_hand = 2 * tokens * (3 * 64 * 16 + toy_trunk.DEPTH * (12 * 16**2 + 2 * tokens * 16))
    assert cost.flops == by_hand


def test_each_crop_size_is_traced_once(toy, monkeypatch):
    models_traced.crop_cost(toy, 48)
    monkeypatch.setattr(models_traced, "build_trunk", None)
    assert models_traced.crop_cost(toy.model_copy(update={"seed": 5}), 48).grid == (6, 6)


def test_shared_storages_count_once_and_parameters_never():
    with torch.device("meta"):
        layer, x = torch.nn.Linear(3, 5), torch.empty(7, 3)
        kept = models_traced.Kept(layer)
        with kept.hooks():
            y = layer(x)
            (y * y[:2].sum()).sum().exp()
    assert kept.bytes == 4 * (7 * 3 + 7 * 5 + 1 + 1)  # x; y, of which a view is kept, too; its sum; the exponential


def test_tracing_needs_no_other_ranks(monkeypatch):
    """Rank 0 alone counts (train/step_metrics.py), while a process group exists: a collective would wait for ever."""
    for name, answer in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 4)):
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    with models_traced.on_meta():
        assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert (collectives.rank(), collectives.world_size()) == (1, 4)
    with pytest.raises(ZeroDivisionError), collectives.alone():
        1 / 0  # noqa: B018
    assert collectives.world_size() == 4


class Eager(toy_trunk.ToyTrunk):
    """Looks at its pixels once more when it is given drop keys."""

    def forward(self, crops, drop_keys=None):
        if drop_keys is not None:
            self.stem(crops[0])
        return super().forward(crops, drop_keys)


def test_student_is_counted_with_drop_keys(monkeypatch):
    """With drop keys ViL looks at two of nine windows."""
    monkeypatch.setitem(trunks.TRUNKS, "eager", lambda config: Eager(16))
    cost = models_traced.crop_cost(config_of("eager"), 64)
    assert cost.flops_with_keys - cost.flops == 2 * 64 * (3 * 64) * 16
