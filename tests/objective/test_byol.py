"""BYOL against loops over the formula in float64."""

import torch
from torch.nn import functional as F

from tests.objective import cases


def test_loss_and_gradients_match_definition() -> None:
    given = cases.inputs("byol")
    found = cases.step("byol", given, given.features, given.teacher_features)
    student, teacher = cases.module("byol", given.student), cases.module("byol", given.teacher)
    leaf = given.features._replace(view=given.features.view.clone().requires_grad_())
    predictions = cases.mlp(student.predictor, cases.mlp(student.projector, leaf.view, 2), 2)
    keys = cases.mlp(teacher.projector, given.teacher_features.view, 2).detach()
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(cases.B):
        for own, other in ((i, cases.B + i), (cases.B + i, i)):
            loss = loss + (2 - 2 * F.cosine_similarity(predictions[own], keys[other], dim=0)) / cases.B
    cases.assert_same(found, loss, cases.gradients(loss, student, leaf))
    assert abs(found.logs["positive_similarity"].item() - (4 - loss.item()) / 4) < 1e-9
