"""Classification with labels: the loss and its gradients, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from esvit_scale import config as configs
from esvit_scale.data.mixing import SoftLabels
from esvit_scale.errors import UserError
from esvit_scale.models.trunk import Features
from esvit_scale.objective.classify import Classify
from esvit_scale.objective.network import build_network
from esvit_scale.objective.registry import check_local_batch
from tests import tiny

IMAGES, DIM, CLASSES = 6, 10, 5


def objective(smoothing: float = 0.1) -> Classify:
    built = Classify(DIM, configs.Objective(name="classify", classes=CLASSES, label_smoothing=smoothing)).double()
    with torch.no_grad():
        for p in built.parameters():
            p.normal_()
    return built


def soft_labels() -> SoftLabels:
    own = torch.rand(IMAGES, dtype=torch.float64)
    return SoftLabels(torch.randint(CLASSES, (IMAGES, 2)), torch.stack([own, 1 - own], 1))


def features(view: Tensor) -> Features:
    return Features(view, view[:0], [(len(view), 1, 1)])


def slow_loss(built: Classify, view: Tensor, labels: SoftLabels) -> Tensor:
    """One image and one class after the other."""
    loss = view.new_zeros(())
    for row, classes, weights in zip(view, labels.classes.tolist(), labels.weights, strict=True):
        logits = [built.classifier.weight[k] @ row + built.classifier.bias[k] for k in range(CLASSES)]
        total = sum(logit.exp() for logit in logits)
        for k, logit in enumerate(logits):
            target = built.smoothing / CLASSES
            target += (1 - built.smoothing) * sum(w for c, w in zip(classes, weights, strict=True) if c == k)
            loss = loss - target * (logit.exp() / total).log()
    return loss / len(view)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_match_loops_in_float64(smoothing: float) -> None:
    built, labels = objective(smoothing), soft_labels()
    view = torch.randn(IMAGES, DIM, dtype=torch.float64, requires_grad=True)
    leaves = [view, *built.parameters()]
    loss, logs = built(features(view), labels, 0.05)
    expected = slow_loss(built, view, labels)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    for found, exact in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    main = labels.classes[torch.arange(IMAGES), labels.weights.argmax(1)]
    assert logs["train_top1"] == (built.targets(features(view)).argmax(1) == main).double().mean()


def test_formulas_match_the_counted_flops() -> None:
    built, view = objective(), torch.randn(IMAGES, DIM, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        built(features(view), soft_labels(), 0.05)[0].backward()
    assert built.formulas().image_flops([(1, 1)], "executed") * IMAGES == counter.get_total_flops()


VALID: dict[str, Any] = {
    "objective__name": "classify",
    "objective__regions": False,
    "objective__classes": 3,
    "data__global_crops": {"size": 32, "count": 1},
    "data__local_crops": [],
}


def refusal(**changes: Any) -> str:
    config = tiny.config(Path("run"), Path("data"), **VALID | changes)
    try:
        check_local_batch(build_network(config).objective, config, 2)
    except UserError as error:
        return str(error)
    return ""


def test_config_that_does_not_fit_is_refused_in_one_line() -> None:
    assert refusal() == ""
    assert refusal(objective__ema_momentum=0.99) == ""
    assert "set data.global_crops.count=1" in refusal(data__global_crops={"size": 32})
    assert "set data.global_crops.count=2" in refusal(objective__name="byol", objective__classes=0)
    assert "objective.classes: byol learns without labels" in refusal(
        objective__name="byol", data__global_crops={"size": 32}
    )
    assert "objective.classes: classify needs at least 2 classes, got 1" in refusal(objective__classes=1)
    assert "set data.local_crops=[]" in refusal(data__local_crops=[{"size": 16}])
    assert "set objective.koleo_weight=0" in refusal(objective__koleo_weight=0.1)
    assert "nearest: train.global_batch=8" in refusal(train__global_batch=6, data__mixup=0.8)
    assert refusal(train__global_batch=6) == ""


def test_names_and_mixing_without_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"class_names: 1 names for objective\.classes=3"):
        tiny.config(Path("run"), Path("data"), **VALID, objective__class_names=["a"])
    with pytest.raises(UserError, match=r"data\.mixup and data\.cutmix mix labels"):
        tiny.config(Path("run"), Path("data"), data__mixup=0.8)
