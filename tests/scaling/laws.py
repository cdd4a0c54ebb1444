"""Measurements of a law that is known."""

from pathlib import Path

import numpy as np

from esvit_scale.scaling.forms import FORMS, predict

CHINCHILLA = FORMS["chinchilla"]
TRUTH = np.array([[1.69, 406.4, 410.7, 0.34, 0.28]])  # E A B alpha beta, as published
NAMES = CHINCHILLA.names


def grid(sizes=8, horizons=8):
    """N and D [n, 2]."""
    n, d = np.geomspace(3e7, 3e9, sizes), np.geomspace(1e9, 1e11, horizons)
    return np.stack(np.meshgrid(n, d, indexing="ij"), axis=-1).reshape(-1, 2)


def isoflop(budgets=5, sizes=7):
    """N and D [n, 2] on budgets of 6ND, about the optimum."""
    rows = []
    for compute in np.geomspace(1e18, 1e21, budgets):
        for n in np.geomspace(0.2, 5, sizes) * np.sqrt(compute / 120):
            rows.append((n, compute / 6 / n))
    return np.array(rows)


def measure(x, noise=0.0, seed=0, truth=TRUTH):
    generator = np.random.default_rng(seed)
    return predict(CHINCHILLA, truth, x)[0] * np.exp(noise * generator.standard_normal(len(x)))


def write(path: Path, x, y, header="N,D,loss"):
    rows = [",".join(repr(float(v)) for v in (*a, b)) for a, b in zip(x, y, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n")
    return path
