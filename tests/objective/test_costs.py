"""What a run costs when trunk or objective have no closed form, against training steps that are really done on a CPU."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esvit_scale import cli
from esvit_scale import config as configs
from esvit_scale.models import registry as trunks
from esvit_scale.models.batch_norm import BatchNorm
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.objective import costs
from esvit_scale.objective import registry as objectives
from esvit_scale.objective.network import build_student
from esvit_scale.objective.objective import Objective
from esvit_scale.parallel import collectives
from tests.models import toy_trunk
from tests.models.test_swin_costs import Kept, inplace_addmm_flop

IMAGES = 3


class Contrast(Objective):
    """A projector with batch norm and gathered keys, as MoCo v3's kin have."""

    multi_crop = False

    def __init__(self, dim, config):
        super().__init__()
        hidden = config.head_hidden
        self.projector = nn.Sequential(nn.Linear(dim, hidden), BatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def targets(self, teacher):
        return collectives.gather_rows(self.projector(teacher.view))

    def forward(self, student, targets, teacher_temp):
        z = self.projector(student.view)
        keys = z.detach() if targets is None else targets
        own = collectives.rank() * len(z) + torch.arange(len(z), device=z.device)
        return nn.functional.cross_entropy(z @ keys.t() / 0.2, own), {}


class WithoutTeacher(Contrast):
    has_teacher = False
    images_at_least = 5


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(trunks.TRUNKS, "toy", toy_trunk.build)
    monkeypatch.setitem(objectives.OBJECTIVES, "contrast", Contrast)
    monkeypatch.setitem(objectives.OBJECTIVES, "without_teacher", WithoutTeacher)


SWIN = {"trunk": "swin_t", "embed_dim": 32, "depths": [1, 1, 2], "heads": [1, 2, 4], "window": 4}
FOCAL = {"trunk": "focal_t", "embed_dim": 32, "depths": [1, 1, 2], "heads": [1, 2, 4], "window": 4}
TOY = {"trunk": "toy", "embed_dim": 32}
CASES = {
    "toy, esvit": (TOY, {}),
    "toy, view alone": (TOY, {"regions": False}),
    "focal, esvit": (FOCAL, {}),
    "toy, contrast": (TOY, {"name": "contrast"}),
    "swin, contrast": (SWIN, {"name": "contrast"}),
    "swin, without a teacher": (SWIN, {"name": "without_teacher", "ema_momentum": 0.0, "ema_momentum_end": 0.0}),
}


def config_of(case, precision="fp32"):
    model, objective = CASES[case]
    local = [] if "name" in objective else [{"size": 32, "count": 2}]
    values = {
        "data": {"global_crops": {"size": 64}, "local_crops": local},
        "model": model,
        "objective": {"prototypes": 96, "head_hidden": 48, "bottleneck": 16} | objective,
        "train": {"precision": precision},
    }
    return configs.validate(values, where="test")


def step(network, config, images):
    """A real student's forward of both roles; the teacher shares its weights."""
    dtype = next(network.parameters()).dtype
    sizes = config.crop_sizes
    crops = [torch.randn(images * sizes.count(s), 3, s, s).to(dtype) for s in dict.fromkeys(sizes)]
    with torch.no_grad():
        targets = network.objective.targets(network.trunk(crops[:1])) if network.objective.has_teacher else None
    return network(crops, targets, drop_keys(0, 0, torch.arange(images), len(sizes)), 0.05)[0]


@pytest.mark.parametrize("case", CASES)
def test_flops_equal_those_of_a_real_step(case):
    """But for the gradient of pixels, which three forwards count and no step computes."""
    config, counts = config_of(case), []
    network = build_student(config)
    for images in (IMAGES, IMAGES + 1):
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: inplace_addmm_flop})
        with counter, sdpa_kernel(SDPBackend.MATH):  # a fused kernel's backward computes the scores again
            step(network, config, images).backward()
        counts.append(counter.get_total_flops())
    patch, dim = (8, 32) if "toy" in case else (4, 32)
    pixels = sum(2 * (size // patch) ** 2 * 3 * patch**2 * dim for size in config.crop_sizes)
    expected = costs.image_flops(config, "executed") - (0 if "swin" in case else pixels)
    if "name" in CASES[case][1]:  # its 4 B² logits, a product forward and one backward, were counted at another B
        expected += 8 * (IMAGES - max(2, network.objective.images_at_least)) * 2 * (2 * network.trunk.dim)
    assert counts[1] - counts[0] == expected
    assert costs.traced(config)


def test_objective_without_teacher_counts_no_teacher_forward():
    config = config_of("swin, without a teacher")
    less = costs.image_flops(config_of("swin, contrast")) - costs.image_flops(config)
    assert less > 2 * costs.crop_flops(config, 64)


TIMM = {"timm, one call a crop size": ({"trunk": "timm:vit_tiny_patch16_224", "drop_path": 0.1}, {})}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [*CASES, *TIMM])
def test_activation_bytes_equal_those_saved_by_autograd(case, precision, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CASES", CASES | TIMM)
    config = config_of(case, precision)
    network = build_student(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    kept = Kept(network)
    for buffer in network.buffers():
        kept.seen[buffer.untyped_storage().data_ptr()] = buffer
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda x: x):
        loss = step(network, config, IMAGES)
    kept.note_gradients(loss)
    assert costs.activation_bytes(config, "none").total(IMAGES) == pytest.approx(kept.bytes, rel=0.01)
    blocks, each_block = costs.block_activation_bytes(config), list(range(len(network.trunk.blocks)))
    assert costs.kept(config).called == each_block * (2 if case in TIMM else 1)
    assert 0 < sum(blocks) < kept.bytes / IMAGES
    recomputing = costs.activation_bytes(config, "full").per_image
    outside = costs.activation_bytes(config, "none").per_image - sum(blocks)
    assert recomputing == outside + sum(costs.block_activation_bytes(config, "full")) + max(blocks)
    assert recomputing <= costs.activation_bytes(config, "selective").per_image
    del loss


@pytest.mark.parametrize("trunk", ["swin_t", "swinv2_t"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_trace_equals_closed_form(trunk, checkpointing, monkeypatch):
    config = configs.resolve(trunk)
    closed = costs.activation_bytes(config, checkpointing)
    monkeypatch.setattr(costs, "traced", lambda config: True)
    traced = costs.activation_bytes(config, checkpointing)
    assert traced.per_image == pytest.approx(closed.per_image, rel=0.01)
    assert traced.per_step == pytest.approx(closed.per_step, rel=0.001)


def test_koleo_keeps_what_its_formula_says(monkeypatch):
    small = ["model.embed_dim=32", "model.depths=[1, 1, 2]", "model.heads=[1, 2, 4]", "objective.prototypes=96"]
    with_it, without = (
        configs.resolve("swin_t", [*small, f"objective.koleo_weight={weight}"]) for weight in (0.1, 0.0)
    )
    closed = costs.activation_bytes(with_it, "none").per_image - costs.activation_bytes(without, "none").per_image
    monkeypatch.setattr(costs, "traced", lambda config: True)
    traced = costs.activation_bytes(with_it, "none").per_image - costs.activation_bytes(without, "none").per_image
    assert closed == traced > 0


def test_parameter_counts_equal_the_network():
    trunk, heads = costs.parameters(config_of("toy, contrast"))
    assert trunk == sum(p.numel() for p in toy_trunk.ToyTrunk(32).parameters())
    assert heads == 32 * 48 + 48 + 2 * 48 + 48 * 32 + 32


def test_plan_reports_that_it_traced(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(configs.dump(config_of("toy, contrast", "bf16")))
    arguments = ["--gpus", "2", "--gpu-memory", "8G", "--tflops", "100"]
    assert cli.main(["plan", str(path), *arguments]) == 0
    assert "traced on the meta device" in capsys.readouterr().out
    assert cli.main(["plan", "swin_t", "train.global_batch=8", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counted"] == "in closed form"
