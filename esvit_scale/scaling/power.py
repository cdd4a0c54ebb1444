"""`sweep power`: how well a sweep will know the exponent of its law, computed before anything is trained.

The frontier is taken to be error = A/C^α through the errors expected at the cheapest and the dearest budget C. An error
of p % on n test images has the variance p (100 − p)/n, the same images for all seeds, and a variance between seeds, of
which several seeds leave the mean. Through the logs of the errors goes a straight line by least squares, whose slope has
the variance Σ wᵢ² Var(pᵢ)/pᵢ², wᵢ = (xᵢ − x̄)/Σ(xⱼ − x̄)², x = log C.
"""

import math
from typing import NamedTuple

import numpy as np

from esvit_scale.errors import UserError

APART = 10.0  # standard errors between the cheapest and the dearest budget, below which no law should be fitted
NORMAL_95 = 1.96


class Power(NamedTuple):
    """What a sweep will be able to tell."""

    exponent: float
    half_width: float  # of its 95 % interval
    standard_errors: tuple[float, float]  # points, at the cheapest and the dearest budget
    apart: float  # standard errors between these two


def power(budgets: list[float], errors: tuple[float, float], test_images: int, seeds: int, spread: float) -> Power:
    """Return the exponent through the two expected errors, and how well it will be known.

    Args:
        budgets: FLOPs of the runs.
        errors: expected error in percent at the smallest and at the largest budget.
        test_images: number of test images that the errors are measured on.
        seeds: number of runs of each budget, whose errors are averaged.
        spread: standard deviation between seeds in points, beyond that of the test images.

    Raises:
        UserError: fewer than two different budgets, or errors that do not fall from budget to budget between 100 and 0.
    """
    x = np.log(np.unique(budgets))
    if len(x) < 2:
        raise UserError("budgets: a law needs at least two different budgets")
    if not 0 < errors[1] < errors[0] < 100:
        raise UserError(
            f"--error {errors[0]:g} {errors[1]:g}: expected two percentages, the larger one (cheapest budget) first"
        )
    exponent = math.log(errors[0] / errors[1]) / (x[-1] - x[0])
    expected = errors[0] * np.exp(-exponent * (x - x[0]))
    variance = expected * (100 - expected) / test_images + spread**2 / seeds
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    half_width = NORMAL_95 * math.sqrt((weights**2 * variance / expected**2).sum())
    apart = (errors[0] - errors[1]) / math.sqrt(variance[0] + variance[-1])
    return Power(exponent, half_width, (math.sqrt(variance[0]), math.sqrt(variance[-1])), apart)


def lines(found: Power, budgets: int, errors: tuple[float, float]) -> list[str]:
    """Return what `sweep power` prints."""
    cheap, dear = found.standard_errors
    said = [
        f"error expected: {errors[0]:g} ± {cheap:.2g} % at the cheapest budget, {errors[1]:g} ± {dear:.2g} % at the dearest: "
        f"{found.apart:.3g} standard errors apart",
        f"exponent {found.exponent:.3g} ± {found.half_width:.2g} (95 %) from {budgets} budgets, for a law without a constant; "
        "with one, its interval is wider",
    ]
    if found.apart < APART:
        said.append(
            f"warning: less than {APART:g} standard errors: too little slope for a law; take budgets further apart, a harder "
            "task, more test images or more seeds"
        )
    return said
