"""The truncated triplet against loops over the formula in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale.errors import UserError
from esvit_scale.objective.network import build_network
from esvit_scale.objective.registry import check_local_batch
from tests import tiny
from tests.objective import cases
from tests.objective.cases import Inputs


def slow(given: Inputs, ranks: int) -> tuple[Tensor, Any, Any]:
    """Negatives come from the image's own rank; batch norm is over all."""
    student, teacher = cases.module("triplet", given.student), cases.module("triplet", given.teacher)
    leaf = given.features._replace(view=given.features.view.clone().requires_grad_())
    queries = cases.mlp(student.predictor, cases.mlp(student.projector, leaf.view, 2), 2).chunk(2)
    keys = cases.mlp(teacher.projector, given.teacher_features.view, 2).detach().chunk(2)
    images, loss = len(queries[0]), torch.zeros((), dtype=torch.float64)
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        for i in range(images):
            rank = i * ranks // images
            local = range(rank * images // ranks, (rank + 1) * images // ranks)
            distance = {j: -2 * F.cosine_similarity(q[i], k[j], dim=0) for j in local}
            others = sorted((d for j, d in distance.items() if j != i), key=lambda d: d.item())
            loss = loss + (100 + 2 * distance[i] - sum(others[1:10]) / 9) / images
    return loss, student, leaf


def test_loss_and_gradients_match_definition() -> None:
    given = cases.inputs("triplet")
    found = cases.step("triplet", given, given.features, given.teacher_features)
    loss, student, leaf = slow(given, ranks=1)
    cases.assert_same(found, loss, cases.gradients(loss, student, leaf))


@pytest.mark.parametrize(("batch", "accum", "world"), [(22, 1, 2), (44, 2, 2), (11, 1, 1)])
def test_fewer_than_eleven_images_per_rank_are_refused(tmp_path, batch: int, accum: int, world: int) -> None:
    own = {"objective__name": "triplet", "data__local_crops": [], "train__grad_accum": accum}
    config = tiny.config(tmp_path, tmp_path, train__global_batch=batch, **own)
    objective = build_network(config).objective
    check_local_batch(objective, config, world)
    small = tiny.config(tmp_path, tmp_path, train__global_batch=batch - accum * world, **own)
    with pytest.raises(UserError, match=f"10 images to a rank at a time, and triplet needs 11; at least .*={batch}"):
        check_local_batch(objective, small, world)
