"""SwAV against loops over the formula in float64."""

import torch
from torch.nn import functional as F

from tests.objective import cases
from tests.objective.test_sinkhorn import dense


def test_loss_and_gradients_match_definition() -> None:
    given = cases.inputs("swav")
    found = cases.step("swav", given, given.features, given.teacher_features)
    student = cases.module("swav", given.student)
    leaf = given.features._replace(view=given.features.view.clone().requires_grad_())
    z = F.normalize(cases.mlp(student.projector, leaf.view), dim=1)
    scores = (z @ F.normalize(student.last_layer.weight_v, dim=1).T).view(-1, cases.B, cases.SIZES["prototypes"])
    loss = torch.zeros((), dtype=torch.float64)
    for view in (0, 1):
        codes = dense(scores[view].detach() / cases.TEMP)
        for crop in range(len(scores)):
            if crop != view:
                for i in range(cases.B):
                    loss = loss - codes[i] @ F.log_softmax(scores[crop, i] / 0.1, 0) / cases.B
    loss = loss / (2 * (len(scores) - 1))
    cases.assert_same(found, loss, cases.gradients(loss, student, leaf))


def test_prototypes_have_unit_norm_and_freeze_like_a_last_layer() -> None:
    module = cases.module("swav", cases.values("swav"))
    rows = module.last_layer(torch.zeros(1, cases.SIZES["bottleneck"]).double(), lambda _, rows: rows)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)).double())
    names = [name for name, p in module.named_parameters() if p.requires_grad and "last_layer" in name]
    assert names == ["last_layer.weight_v"]
