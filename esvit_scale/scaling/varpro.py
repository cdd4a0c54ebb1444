"""Variable projection, the second fitting method: searches the exponents and solves for the coefficients exactly.

For fixed exponents, y = E + A·x^-α + … is linear in E, A, B ≥ 0, and non-negative least squares on the relative
residuals (ŷ − y)/y solves it exactly. Only the exponents are searched, on a grid and then by Nelder-Mead. The method
shares neither the loss (squares instead of Huber, so outliers weigh more) nor the optimizer with solver.py; if both
agree, the answer is not an artefact of either.
"""

from itertools import product

import numpy as np
from scipy.optimize import minimize, nnls

from esvit_scale.scaling.forms import Array, Form

EXPONENTS = np.geomspace(0.02, 4, 16)


def solve(form: Form, x: Array, y: Array) -> Array:
    """Fit the form to x [n, inputs] and y [n]; return the parameters [p] in the order of `form.names`."""
    middle = np.exp(np.log(x).mean(0))
    scaled = x / middle

    def error(log_exponents: Array) -> float:
        return _coefficients(form, scaled, y, np.exp(log_exponents))[1]

    grid = [np.log(exponents) for exponents in product(EXPONENTS, repeat=form.inputs)]
    best = sorted(grid, key=error)[:3]
    tight = {"xatol": 1e-9, "fatol": 1e-16, "maxiter": 4000, "maxfev": 4000}
    found = [minimize(error, start, method="Nelder-Mead", options=tight) for start in best]
    exponents = np.exp(min(found, key=lambda result: float(result.fun)).x)
    coefficients, _ = _coefficients(form, scaled, y, exponents)
    first = int(form.constant)
    coefficients[first:] *= middle**exponents
    return np.concatenate([coefficients, exponents])


def _coefficients(form: Form, x: Array, y: Array, exponents: Array) -> tuple[Array, float]:
    """Solve for the coefficients ≥ 0 at fixed exponents.

    Returns:
        The coefficients (E if the form has a constant, A, and B with two inputs), and the norm of the relative
        residuals.
    """
    columns = [x[:, i] ** -exponents[i] / y for i in range(form.inputs)]
    if form.constant:
        columns = [1 / y, *columns]
    design = np.stack(columns, axis=1)
    scale = np.linalg.norm(design, axis=0)
    coefficients, error = nnls(design / scale, np.ones(len(y)))
    return coefficients / scale, float(error)
