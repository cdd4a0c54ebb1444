"""SimSiam against loops over the formula in float64."""

import torch
from torch.nn import functional as F

from tests.objective import cases


def test_loss_and_gradients_match_definition() -> None:
    given = cases.inputs("simsiam")
    found = cases.step("simsiam", given, given.features, given.teacher_features)
    student = cases.module("simsiam", given.student)
    leaf = given.features._replace(view=given.features.view.clone().requires_grad_())
    projections = cases.mlp(student.projector, leaf.view, 2)
    predictions = cases.mlp(student.predictor, projections, 2)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(cases.B):
        for own, other in ((i, cases.B + i), (cases.B + i, i)):
            target = projections[other].detach()
            loss = loss - 0.5 * F.cosine_similarity(predictions[own], target, dim=0) / cases.B
    cases.assert_same(found, loss, cases.gradients(loss, student, leaf))


def test_moving_average_teacher_is_refused() -> None:
    """Evaluation would read a teacher that nothing trained against."""
    message = cases.error_of("simsiam", objective__ema_momentum=0.99)
    assert "set objective.ema_momentum=0 and objective.ema_momentum_end=0" in message
    assert cases.error_of("simsiam", objective__ema_momentum_end=1.0) == message
    assert cases.error_of("simsiam") == ""
