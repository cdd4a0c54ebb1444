"""The laws that can be fitted: sums of power terms, some with a constant E.

    power            y = A/x^α
    power_constant   y = E + A/x^α
    two_power        y = A/N^α + B/D^β
    chinchilla       y = E + A/N^α + B/D^β      (Hoffmann et al. 2022, approach 3)

They are fitted as log y = logsumexp(e, a − α·u, b − β·v), where u and v are the logs of the inputs minus their means.
Every coefficient is then positive by construction. Because of the centring, a and b are the logs of the terms in the
middle of the data rather than at x = 1, where nothing was measured, so that the unknowns hardly depend on each other.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COEFFICIENTS, EXPONENTS = ("A", "B"), ("alpha", "beta")
LEAST_TERM = 1e-12  # lower bound of a term, as a fraction of the smallest y: practically zero
STEEPEST = 10.0  # exponents lie in [0, 10]


@dataclass(frozen=True)
class Form:
    """One law: its number of inputs and whether it has a constant."""

    name: str
    inputs: int  # 1: x; 2: N and D
    constant: bool  # E

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the parameters that the form has, in the order E, A, B, alpha, beta."""
        return (("E",) if self.constant else ()) + COEFFICIENTS[: self.inputs] + EXPONENTS[: self.inputs]

    @property
    def size(self) -> int:
        """Return the number of parameters."""
        return self.constant + 2 * self.inputs


FORMS = {
    form.name: form
    for form in (
        Form("power", 1, False),
        Form("power_constant", 1, True),
        Form("two_power", 2, False),
        Form("chinchilla", 2, True),
    )
}


class Points(NamedTuple):
    """Measurements in the form that the solver takes: centred logs of the inputs, and logs of y."""

    logs: Array  # [n, inputs] logs of the inputs minus `means`
    means: Array  # [inputs] means of the logs of the inputs
    log_y: Array  # [n]

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "Points":
        """Select points by index or mask; they stay centred on the means of all points, so theta keeps its meaning."""
        return Points(self.logs[rows], self.means, self.log_y[rows])


def points(x: Array, y: Array) -> Points:
    """Convert x [n, inputs] and y [n], all above 0, to Points."""
    logs = np.log(x)
    return Points(logs - logs.mean(0), logs.mean(0), np.log(y))


def evaluate(form: Form, theta: Array, logs: Array) -> tuple[Array, Array]:
    """Evaluate the form at centred logs [n, inputs] for rows of solver parameters theta [R, p].

    Returns:
        log ŷ [R, n] and its derivatives by theta [R, p, n]. The p parameters are e (if the form has a constant), then
        a, α with one input or a, b, α, β with two.
    """
    first, columns = int(form.constant), np.ascontiguousarray(logs.T)
    terms = np.empty((len(theta), first + form.inputs, len(logs)))
    terms[:, :first] = theta[:, :first, None]
    terms[:, first:] = theta[:, first : first + form.inputs, None] - theta[:, first + form.inputs :, None] * columns
    largest = terms.max(1)
    shares = np.exp(terms - largest[:, None])
    total = shares.sum(1)
    slopes = np.empty((len(theta), form.size, len(logs)))
    np.divide(shares, total[:, None], out=slopes[:, : first + form.inputs])
    np.multiply(slopes[:, first : first + form.inputs], -columns, out=slopes[:, first + form.inputs :])
    return largest + np.log(total), slopes


def bounds(form: Form, data: Points) -> tuple[Array, Array]:
    """Return the lower and the upper bounds of the solver's parameters theta, [p] each."""
    low, high = data.log_y.min() + np.log(LEAST_TERM), data.log_y.max() + 30
    terms = form.constant + form.inputs
    return np.array([low] * terms + [0.0] * form.inputs), np.array([high] * terms + [STEEPEST] * form.inputs)


def to_parameters(form: Form, theta: Array, means: Array) -> Array:
    """Convert solver parameters theta [R, p] to the law's parameters [R, p], in the order of `form.names`.

    The solver's a and b are logs of terms at `means`; A and B are coefficients as in the formulas above.
    """
    first = int(form.constant)
    exponents = theta[:, first + form.inputs :]
    coefficients = np.exp(theta[:, first : first + form.inputs] + exponents * means)
    return np.concatenate([np.exp(theta[:, :first]), coefficients, exponents], axis=1)


def predict(form: Form, parameters: Array, x: Array) -> Array:
    """Evaluate the law for parameters [R, p] (in the order of `form.names`) at x [n, inputs]; return y [R, n]."""
    first = int(form.constant)
    coefficients = parameters[:, first : first + form.inputs]
    exponents = parameters[:, first + form.inputs :]
    terms = coefficients[:, None, :] * np.exp(-exponents[:, None, :] * np.log(x))
    total: Array = terms.sum(2) + (parameters[:, :1] if form.constant else 0.0)
    return total
