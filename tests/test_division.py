"""Divisors, shares and the check of a global batch, against their definitions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_scale.division import batch_problem, largest_divisor, nearest_multiple, share


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 600))
def test_largest_divisor_is_the_largest(n, at_most):
    assert largest_divisor(n, at_most) == max(d for d in range(1, at_most + 1) if n % d == 0)


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 40))
def test_shares_cover_every_item_once_in_order_and_differ_by_one_at_most(n, parts):
    shares = [range(n)[share(n, part, parts)] for part in range(parts)]
    assert [item for one in shares for item in one] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 64))
def test_nearest_batch_is_accepted(batch, accum, ranks):
    problem = batch_problem(batch, accum, ranks)
    assert (problem is None) == (batch % (accum * ranks) == 0)
    assert problem is None or batch_problem(nearest_multiple(batch, accum * ranks), accum, ranks) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 3), "train.global_batch: 10 does not divide over train.grad_accum=3; nearest: 9"),
        ((8, 2, 3), "train.global_batch: 8 does not divide over 3 ranks × train.grad_accum=2; nearest: 6"),
        ((8, 1, 3, "GPUs"), "train.global_batch: 8 does not divide over 3 GPUs × train.grad_accum=1; nearest: 9"),
    ],
)
def test_batch_problem_names_the_key_and_the_nearest_value(arguments, message):
    assert batch_problem(*arguments) == message
