"""Fit a logistic regression to the view features of finished cells, and write linear.json as `evaluate linear` does.

    python studies/fashion/probe.py SWEEP.yaml …

k-NN has left these features in each run dir, so no image is read again. `evaluate linear` takes the last four blocks'
means, which are other features, in a second pass over the images that takes longer than a cheap cell's training.
"""

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esvit_scale import files
from esvit_scale.evaluate import features, logistic
from esvit_scale.evaluate.features import ExtractionOptions, FeatureSet
from esvit_scale.evaluate.labels import split_held_out
from esvit_scale.evaluate.metrics import accuracy, wilson_interval
from esvit_scale.scaling import cells, runner, sweep_file
from esvit_scale.scaling.cells import Cell
from esvit_scale.scaling.sweep_file import Evaluate


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    for path in map(Path, sys.argv[1:]):
        sweep = sweep_file.read(path)
        assert sweep.evaluate is not None
        for cell in cells.cells(sweep, str(path), None):
            done = cell.path / "linear.json"
            if runner.state(cell, sweep).word == "finished" and not done.is_file():
                result = probe(cell, sweep.evaluate)
                files.write_json(done, result)
                print(f"{cell.name}: {result['results']['logistic']['top1']:.2f} %", flush=True)


def probe(cell: Cell, evaluate: Evaluate) -> dict[str, Any]:
    """Return the content of linear.json for a cell."""
    train, test = (view_features(cell, Path(source), evaluate.whole) for source in (evaluate.train, evaluate.test))
    result = regression(train, test)
    return {
        "features": "view",
        "n_train": len(train.labels),
        "n_test": len(test.labels),
        "results": {"logistic": result},
    }


def regression(train: FeatureSet, test: FeatureSet) -> dict[str, Any]:
    """Fit a logistic regression, its penalty chosen on a part of the training set; return its score on the test set."""
    labels, classes = train.labels, int(train.labels.max()) + 1

    def of(rows: torch.Tensor) -> logistic.LabelledFeatures:
        return logistic.LabelledFeatures(train.features.float(), rows, labels[rows], classes)

    fit, held_out = split_held_out(labels, 0)
    best, _ = logistic.search_penalty(of(fit), of(held_out))
    final = logistic.fit(of(torch.arange(len(labels))), best.l2)
    top1 = accuracy(final.scores(test.features.float()), test.labels)
    return {"top1": top1, "interval": wilson_interval(top1, len(test.labels)), "selected": best._asdict()}


def view_features(cell: Cell, source: Path, whole: bool) -> FeatureSet:
    """Return a cell's view features of a set, from the cache that its k-NN filled."""
    teacher = features.load_frozen_trunk(cell.path)
    options = ExtractionOptions(workers=0, cache=cell.path / "features", whole=whole)
    return features.extract(teacher.trunk, source, teacher.size, **options._asdict(), pixels=teacher.pixels)


if __name__ == "__main__":
    main()
