"""Two ranks with half of the images each find the loss and gradients of one rank with all, for every objective.

One file, because test processes get whole files and each process that needs the ranks starts them.
"""

import pytest

from tests.objective import cases, test_triplet
from tests.objective.cases import Result
from tests.objective.conftest import Ranks


@pytest.mark.parametrize(
    "case",
    [
        "dino",
        "dino-sinkhorn",
        "esvit-sinkhorn",
        "simsiam",
        "byol",  # batch norm over all ranks
        "moco_v3",  # keys of all ranks, each rank's own in their place; batch norm over all ranks
        "simclr",  # negatives of all ranks, and the gradient of every rank's loss to an image
        "swav",  # codes over the images of all ranks
    ],
)
def test_two_ranks_match_one(ranks: Ranks, case: str) -> None:
    cases.assert_ranks_agree(case, *ranks(case))


def test_triplet_uses_own_negatives_and_shared_batch_norm(ranks: Ranks) -> None:
    given, found = ranks("triplet")
    loss, student, leaf = test_triplet.slow(given, ranks=2)
    expected = Result(loss.detach(), found[1], cases.gradients(loss, student, leaf))
    cases.assert_ranks_agree("triplet", given, found, expected)
