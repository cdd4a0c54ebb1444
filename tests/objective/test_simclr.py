"""NT-Xent against a double loop in float64."""

import pytest
import torch
from torch.nn import functional as F

from tests.objective import cases


def test_loss_and_gradients_match_definition() -> None:
    given = cases.inputs("simclr")
    found = cases.step("simclr", given, given.features, given.teacher_features)
    student = cases.module("simclr", given.student)
    leaf = given.features._replace(view=given.features.view.clone().requires_grad_())
    z = cases.mlp(student.projector, leaf.view)
    loss, right = torch.zeros((), dtype=torch.float64), 0
    for i in range(2 * cases.B):
        positive = (i + cases.B) % (2 * cases.B)
        scores = {j: F.cosine_similarity(z[i], z[j], dim=0) / 0.2 for j in range(2 * cases.B) if j != i}
        loss = loss - torch.log(scores[positive].exp() / sum(s.exp() for s in scores.values())) / (2 * cases.B)
        right += max(scores, key=lambda j: scores[j].item()) == positive
    cases.assert_same(found, loss, cases.gradients(loss, student, leaf))
    assert found.logs["contrastive_accuracy"].item() == pytest.approx(right / (2 * cases.B))
