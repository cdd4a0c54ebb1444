"""k-NN against scikit-learn, its edge cases, and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from esvit_scale.data.manifest import REMOTE
from esvit_scale.errors import UserError
from esvit_scale.evaluate import labels as labels_module
from esvit_scale.evaluate import neighbours
from esvit_scale.evaluate.features import ExtractionOptions, FeatureSet, FrozenTrunk, SourceInfo
from esvit_scale.evaluate.knn import LabelledSet, evaluate, few_shot, knn, match_classes, run_knn, table
from esvit_scale.evaluate.neighbours import nearest_neighbours


def clusters(n: int, classes: int, seed: int, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + 1.5 * torch.randn(n, width, generator=generator), labels


def feature_set(n: int = 30, classes: int = 3, seed: int = 0) -> FeatureSet:
    features, labels = clusters(n, classes, seed)
    return FeatureSet(features, [f"{seed}-{i}" for i in range(n)], labels)


def oracle(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, k: int) -> np.ndarray:
    """scikit-learn's weighted vote: its cosine distance is 1 − s."""
    classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    return classifier.fit(train.double().numpy(), labels.numpy()).predict_proba(test.double().numpy())


@pytest.mark.parametrize("classes", [2, 7])
def test_knn_equals_scikit_learn(classes: int) -> None:
    train, labels = clusters(300, classes, seed=0)
    test, truth = clusters(120, classes, seed=1)
    found = knn(train, labels, test, truth)
    for k in (10, 20, 100, 200):
        votes = oracle(train, labels, test, k)
        assert found[k].top1 == pytest.approx(100 * np.mean(votes.argmax(1) == truth.numpy()))
        if classes < 5:
            assert found[k].top5 is None
        else:
            best = np.argsort(-votes, axis=1)[:, :5]
            hit = (best == truth.numpy()[:, None]) & (np.take_along_axis(votes, best, 1) > 0)
            assert found[k].top5 == pytest.approx(100 * hit.any(1).mean())
    assert 100 / classes < found[20].top1 < 100  # neither chance nor trivial, or the comparison says little


def test_knn_is_independent_of_feature_norms() -> None:
    train, labels = clusters(90, 6, seed=0)
    test, truth = clusters(31, 6, seed=1)
    scaled = train * torch.linspace(0.1, 9, 90)[:, None]
    assert knn(scaled, labels, test * 3, truth, ks=(5, 20)) == knn(train, labels, test, truth, ks=(5, 20))


@pytest.mark.parametrize(("rows", "queries"), [(1000, 1000), (7, 3), (90, 1), (89, 31)])
def test_neighbours_are_independent_of_block_sizes(rows: int, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BANK_ROWS_PER_BLOCK", rows)
    monkeypatch.setattr(neighbours, "QUERIES_PER_BLOCK", queries)
    train, test = clusters(90, 3, seed=0)[0], clusters(31, 3, seed=1)[0]
    similarity, index = nearest_neighbours(train, test, k=12)
    oracle = torch.cosine_similarity(test.double()[:, None], train.double()[None], dim=2).topk(12)
    assert torch.equal(index, oracle.indices)
    assert similarity.double().allclose(oracle.values, atol=1e-6)


def test_few_shots_are_means_over_draws() -> None:
    train, test = LabelledSet(feature_set(60, 3), ("a", "b", "c")), LabelledSet(feature_set(30, 3, 1), ("a", "b", "c"))
    result = few_shot(train, test, [1, 20], tries=3)
    assert list(result["results"]["1"]) == ["3"]  # k is clipped to the three samples there are
    whole = knn(train.samples.features, train.samples.labels, test.samples.features, test.samples.labels)
    every = result["results"]["20"]["10"]  # 20 of each class are all there are: every draw gives the same
    assert every["top1"] == pytest.approx(whole[10].top1)
    assert every["interval"] == pytest.approx([whole[10].top1] * 2)
    low, high = result["results"]["1"]["3"]["interval"]
    assert low < result["results"]["1"]["3"]["top1"] < high
    with pytest.raises(UserError, match="class 'a' has 20 samples; 21 of each"):
        few_shot(train, test, [1, 21], tries=1)


def test_k_beyond_the_training_set_is_clipped_with_one_notice(capsys: pytest.CaptureFixture[str]) -> None:
    train, test = feature_set(30), feature_set(12, seed=1)
    result = evaluate(LabelledSet(train, ("a", "b", "c")), LabelledSet(test, ("a", "b", "c")))
    assert list(result["results"]) == ["10", "20", "30"]
    assert capsys.readouterr().out.count("clipped to 30") == 1
    votes = oracle(train.features, train.labels, test.features, 30)
    assert result["results"]["30"]["top1"] == pytest.approx(100 * np.mean(votes.argmax(1) == test.labels.numpy()))


def test_classes_are_compared_by_name() -> None:
    train = LabelledSet(feature_set(), ("ant", "bee", "cat"))
    found = feature_set(6, seed=1)
    renumbered = LabelledSet(found._replace(labels=found.labels.clamp(max=1)), ("bee", "cat"))
    assert match_classes(train, renumbered).tolist() == [1, 2, 2, 1, 2, 2]


def test_class_without_training_samples_is_named() -> None:
    train = LabelledSet(feature_set(), ("ant", "bee", "cat"))
    test = LabelledSet(feature_set(6, seed=1), ("ant", "dog", "emu"))
    with pytest.raises(UserError, match=r"2 of its 3 classes have no training sample: 'dog', 'emu'"):
        evaluate(train, test)


def test_labels_are_unchanged_without_class_names() -> None:
    labels = torch.tensor([2, 0])
    bare = LabelledSet(FeatureSet(torch.zeros(2, 2), ["a", "b"], labels), ())
    assert match_classes(bare, bare) is labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f, y: (f.index_put((torch.tensor([1, 4]),), torch.tensor(float("nan"))), y),
            "train set: 2 of 30 .*NaN",
        ),
        (
            lambda f, y: (f, y.index_put((torch.tensor([3]),), torch.tensor(-1))),
            "train set: 1 of 30 samples have no label",
        ),
        (lambda f, y: (f, torch.zeros_like(y)), "one class"),
        (lambda f, y: (f[:0], y[:0]), "train set: no samples"),
        (lambda f, y: (f[:, :5], y), "width differs: train 5, test 16"),
    ],
)
def test_invalid_features_or_labels_are_refused(change, message: str) -> None:
    train, labels = change(*clusters(30, 3, seed=0))
    with pytest.raises(UserError, match=message):
        knn(train, labels, *clusters(12, 3, seed=1))


def test_k_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        knn(*clusters(30, 3, seed=0), *clusters(12, 3, seed=1), ks=(0, 5))


def test_command_writes_stable_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    sets = {"train": feature_set(60, 6, seed=0), "test": feature_set(18, 6, seed=1)}
    names = tuple(f"class{c}" for c in range(6))
    monkeypatch.setattr(labels_module, "source_info", lambda source: SourceInfo(0, names))
    monkeypatch.setattr("esvit_scale.evaluate.knn.check_train_and_test", lambda *_: None)
    monkeypatch.setattr("esvit_scale.evaluate.knn.load_frozen_trunk", lambda path: FrozenTrunk(nn.Identity(), 64, 400))
    monkeypatch.setattr("esvit_scale.evaluate.knn.extract", lambda trunk, source, *_, **__: sets[source.name])
    (tmp_path / "train").mkdir()  # the folder of a remote set in the cache
    (tmp_path / "train" / REMOTE).write_text(json.dumps({"url": "s3://bucket/train", "options": {}, "limit": None}))
    result = run_knn(
        tmp_path / "run", tmp_path / "train", tmp_path / "test", tmp_path / "out", ExtractionOptions(), ks=(10, 20)
    )
    written = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert written == result
    assert list(written) == [
        *("checkpoint", "step", "train", "test", "n_train", "n_test", "feature_dim", "results", "best"),
        *("largest_class", "examples"),
    ]
    assert (written["train"], written["test"]) == ("s3://bucket/train", str(tmp_path / "test"))
    assert set(written["results"]["10"]) == {"top1", "top5", "interval"}
    assert written["best"]["top1"] == max(r["top1"] for r in written["results"].values())
    assert [len(e["neighbours"]) for e in written["examples"]] == [5] * 10
    shown = capsys.readouterr().out
    assert "step 400" in shown
    low, high = written["results"]["10"]["interval"]
    assert f"95 % intervals, %: k=10 {low:.1f}–{high:.1f}, k=20 " in shown
    assert f"always guessing the largest class of the training set, {written['largest_class']['class']}: " in shown
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["knn.json"]


def test_largest_class_of_the_training_set_is_guessed_for_the_test_set() -> None:
    def labelled(*labels: int) -> LabelledSet:
        samples = FeatureSet(torch.randn(len(labels), 4), [str(i) for i in range(len(labels))], torch.tensor(labels))
        return LabelledSet(samples, ("a", "b", "c"))

    result = evaluate(labelled(0, 1, 1, 2), labelled(1, 0, 0, 0), ks=(1,))
    assert result["largest_class"] == {"class": "b", "top1": 25.0}


def test_table_lines_up_results_of_different_k() -> None:
    def row(ks: dict[str, float]) -> dict:
        return {
            "checkpoint": "x",
            "step": None,
            "feature_dim": 8,
            "n_train": 1,
            "n_test": 2,
            "results": {k: {"top1": v, "top5": None} for k, v in ks.items()},
        }

    text = table([row({"10": 12.34, "20": 50.0}), row({"10": 99.0})], ["first", "second"])
    assert "12.3" in text
    assert text.splitlines()[2].split() == ["second", "99.0", "–", "8"]


def test_unlabelled_or_missing_sets_are_refused_before_extraction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("good/a/0.png", "good/b/0.png", "flat/0.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.setattr("esvit_scale.evaluate.knn.load_frozen_trunk", None)
    for test, message in (("flat", "flat: its images have no labels"), ("goo", "did you mean")):
        with pytest.raises(UserError, match=message):
            run_knn(tmp_path / "run", tmp_path / "good", tmp_path / test, tmp_path / "out", ExtractionOptions())
    assert not (tmp_path / "out").exists()
