"""Costs against the published figures, torch's FLOP counter and what autograd really keeps."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from esvit_scale import config as configs
from esvit_scale.models import recomputation
from esvit_scale.models.drop_path import drop_keys
from esvit_scale.models.initialize import initialize
from esvit_scale.models.registry import build_trunk
from esvit_scale.objective import costs
from esvit_scale.objective.network import build_student

IMAGES = 3
PUBLISHED = {"swin_t": 154.4, "swin_s": 264.6, "swin_b": 445.0, "swin_t_w14": 196.9, "swin_b_w14": 628.4}


def small(trunk, regions=True, precision="fp32", **model):
    """Maps that pad and shift at every stage, and two sizes of local crops."""
    values = {
        "data": {"global_crops": {"size": 96}, "local_crops": [{"size": 40, "count": 3}, {"size": 30, "count": 1}]},
        "model": {"trunk": trunk, "embed_dim": 16, "depths": [2, 2, 6], "heads": [1, 2, 4], "window": 5} | model,
        "objective": {"prototypes": 96, "head_hidden": 32, "bottleneck": 16, "regions": regions},
        "train": {"precision": precision},
    }
    return configs.validate(values, where="test")


def crops_of(config):
    sizes = config.crop_sizes
    groups = list(dict.fromkeys(sizes))
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return [torch.randn(IMAGES * sizes.count(size), 3, size, size).to(dtype) for size in groups]


def network_of(config):
    network = build_student(config)
    initialize(network, 0)
    return network.bfloat16() if config.train.precision == "bf16" else network


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_flops(preset):
    config = configs.resolve(preset)
    assert round(costs.image_flops(config) / 1e9, 1) == PUBLISHED[preset]
    assert costs.image_flops(config, "useful") < costs.image_flops(config, "executed")


def test_parameters():
    assert costs.parameters(configs.resolve("swin_t")) == (27_519_354, 2 * (23_073_024 + 65_536))
    assert costs.parameters(configs.resolve("swin_t_view")).heads == 23_073_024 + 65_536


@pytest.mark.parametrize("trunk", ["swin_t", "swinv2_t"])
@pytest.mark.parametrize("size", [96, 40, 30])
def test_a_crops_flops_are_torchs(trunk, size):
    config = small(trunk)
    module = build_trunk(config)
    initialize(module, 0)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module([torch.randn(1, 3, size, size)])
    cost = module.formulas().crop_cost(size, "executed")
    assert counter.get_total_flops() == cost.flops + cost.flops_per_forward


def test_padding_is_counted_by_its_definition():
    """One block: 10 tokens a side, 14 in windows of 7."""
    config = small("swin_t", depths=[1], heads=[2], embed_dim=16, window=7)
    flops = {count: costs.crop_flops(config, 40, count) for count in ("published", "executed", "useful")}
    assert flops["published"] - flops["executed"] == 2 * 4 * (14**2 - 10**2) * 16**2
    assert flops["executed"] - flops["useful"] == 2 * 2 * (14**2 - 10**2) * 49 * 16


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("trunk", ["swin_t", "swinv2_t"])
def test_a_training_steps_flops_are_torchs(trunk, regions):
    config = small(trunk, regions)
    student, teacher, crops = network_of(config), network_of(config), crops_of(config)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: inplace_addmm_flop})
    with counter:
        with torch.no_grad():
            targets = teacher.objective.targets(teacher.trunk(crops[:1]))
        keys = drop_keys(0, 0, torch.arange(IMAGES), len(config.crop_sizes))
        student(crops, targets, keys, 0.04)[0].backward()
    # The position bias by the step: teacher's and student's forward, and in the backward the weights' gradients of both
    # layers and the hidden layer's.
    first_layer = sum(2 * (2 * stage.window - 1) ** 2 * 2 * 512 * len(stage.blocks) for stage in student.trunk.stages)
    bias = student.trunk.formulas().crop_cost(40, "executed").flops_per_forward
    bias = bias and 4 * bias - first_layer
    assert counter.get_total_flops() == IMAGES * costs.image_flops(config, "executed") + bias


def inplace_addmm_flop(total, a, b, **_):
    """The counter has no formula for the in-place product (the loss adds up the prototypes' gradient with it)."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("trunk", ["swin_t", "swinv2_t"])
def test_activation_bytes_are_autograds(trunk, checkpointing, precision, monkeypatch):
    monkeypatch.setattr(recomputation, "MIN_INNER_DIMENSION", 64)  # the width of the second of three stages
    config = small(trunk, precision=precision, embed_dim=32)
    student, crops = network_of(config), crops_of(config)
    with torch.no_grad():
        teacher = network_of(config)
        targets = teacher.objective.targets(teacher.trunk(crops[:1]))
    keys = drop_keys(0, 0, torch.arange(IMAGES), len(config.crop_sizes))
    kept = Kept(student)
    kept.selective = checkpointing == "selective"
    if checkpointing != "none":
        student.trunk.run_block = kept.checkpointed
    with saved_tensors_hooks(kept.note, lambda x: x):
        loss, *_ = student(crops, targets, keys, 0.04)
    kept.note_gradients(loss)
    expected = costs.activation_bytes(config, checkpointing).total(IMAGES)

    assert kept.bytes + kept.largest_block == pytest.approx(expected, rel=0.01)
    del loss


class Kept:
    """Floating-point storages that autograd saves, each once; parameters and cached index tables are not counted."""

    def __init__(self, module):
        self.seen = {p.untyped_storage().data_ptr(): p for p in module.parameters()}
        self.storages = {}
        self.largest_block = 0
        self.selective = False

    @property
    def bytes(self):
        return sum(x.untyped_storage().nbytes() for x in self.storages.values())

    def note(self, x):
        key = x.untyped_storage().data_ptr()
        if x.is_floating_point() and key not in self.seen:
            self.storages[key] = x
        return x

    def note_gradients(self, loss):
        """The prototype loss keeps its gradients on its own node."""
        waiting, seen = [loss.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for gradient in getattr(node, "gradients", ()):
                self.note(gradient)
            waiting += [n for n, _ in node.next_functions]

    def checkpointed(self, block, tokens, plan, *keep):
        """The block's inputs are kept; what its recomputation keeps is measured apart, one block at a time."""
        for x in (tokens, *keep):
            if x is not None:
                self.note(x)
        alone = Kept(block)
        with saved_tensors_hooks(alone.note, lambda x: x):
            result = block(tokens, plan, *keep)
        self.largest_block = max(self.largest_block, alone.bytes)
        del result
        if not self.selective:
            return checkpoint(block, tokens, plan, *keep, use_reentrant=False)
        kept = recomputation.KeepResults()
        contexts = lambda: (kept, kept.reused())  # noqa: E731
        result = checkpoint(block, tokens, plan, *keep, use_reentrant=False, context_fn=contexts)
        for x in kept.tensors:
            self.note(x)
        return result
