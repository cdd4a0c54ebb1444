"""MoCo v3 against loops over the formula in float64."""

import pytest
import torch
from torch.nn import functional as F

from tests.objective import cases


def test_loss_and_gradients_match_definition() -> None:
    given = cases.inputs("moco_v3")
    found = cases.step("moco_v3", given, given.features, given.teacher_features)
    student, teacher = cases.module("moco_v3", given.student), cases.module("moco_v3", given.teacher)
    leaf = given.features._replace(view=given.features.view.clone().requires_grad_())
    queries = F.normalize(cases.mlp(student.predictor, cases.mlp(student.projector, leaf.view, 2), 2), dim=1)
    keys = F.normalize(cases.mlp(teacher.projector, given.teacher_features.view, 2), dim=1).detach()
    loss, right = torch.zeros((), dtype=torch.float64), 0
    for query_view, key_view in ((0, 1), (1, 0)):
        for i in range(cases.B):
            q = queries[query_view * cases.B + i]
            scores = torch.stack([q @ keys[key_view * cases.B + j] / 0.2 for j in range(cases.B)])
            loss = loss - 2 * 0.2 * torch.log(scores[i].exp() / scores.exp().sum()) / cases.B
            right += int(scores.argmax() == i)
    cases.assert_same(found, loss, cases.gradients(loss, student, leaf))
    assert found.logs["contrastive_accuracy"].item() == pytest.approx(right / (2 * cases.B))


def test_last_layers_are_normalised_without_gain() -> None:
    names = {name for name, _ in cases.module("moco_v3").named_parameters()}
    layers = {f"projector.layers.{i}.weight" for i in range(3)} | {f"predictor.layers.{i}.weight" for i in range(2)}
    norms = {f"projector.norms.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert names == layers | norms | {f"predictor.norms.0.{kind}" for kind in ("weight", "bias")}


def test_local_crops_are_refused() -> None:
    message = cases.error_of("moco_v3", data__local_crops=[{"size": 16, "count": 2}])
    assert message == "data.local_crops: moco_v3 compares the two global crops alone; set data.local_crops=[]"
