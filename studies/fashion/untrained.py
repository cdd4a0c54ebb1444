"""Measure the untrained trunk of every size of sweep.yaml as the cells are measured, and write results/untrained.csv.

    python studies/fashion/untrained.py

A wider trunk has more features, from which a probe reads more before anything is learned. The initial values are those of
the cells with seed 0.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from probe import regression

from esvit_scale.evaluate import features, knn
from esvit_scale.scaling import cells, sweep_file

HERE = Path(__file__).resolve().parent


def main() -> None:
    path = HERE / "sweep.yaml"
    sweep = sweep_file.read(path)
    assert sweep.evaluate is not None
    rows: dict[int, list[object]] = {}
    for cell in cells.cells(sweep, str(path), None):
        params = cell.plan.numbers["trunk_params"]
        if params in rows:
            continue
        network = features.load_frozen_trunk(Path(f"untrained:{cell.path}"))
        train, test = (
            features.extract(
                network.trunk, Path(source), network.size, workers=0, whole=sweep.evaluate.whole, pixels=network.pixels
            )
            for source in (sweep.evaluate.train, sweep.evaluate.test)
        )
        k = sweep.evaluate.k
        near = knn.knn(train.features, train.labels, test.features, test.labels, ks=(k,))[k].top1
        rows[params] = [params, round(100 - near, 2), round(100 - regression(train, test)["top1"], 2)]
        print(*rows[params], flush=True)
    with (HERE / "results" / "untrained.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["params", "knn_error", "linear_error"], *rows.values()])


if __name__ == "__main__":
    main()
