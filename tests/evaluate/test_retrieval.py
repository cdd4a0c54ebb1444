"""Retrieval in labelled sets and in the revisited layout: slow oracles, files, and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from esvit_scale import cli
from esvit_scale.errors import UserError
from esvit_scale.evaluate import retrieval, revisited
from esvit_scale.evaluate.feature_cache import FeatureSet
from esvit_scale.evaluate.labels import LabelledSet
from tests.evaluate.conftest import paint

NAMES = ("ant", "bee", "cat", "dog")


def labelled(n: int, seed: int, names: tuple[str, ...] = NAMES) -> LabelledSet:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(names), (n,), generator=rng)
    centres = torch.randn(len(names), 12, generator=torch.Generator().manual_seed(9))
    features = centres[labels] + 1.5 * torch.randn(n, 12, generator=rng)
    return LabelledSet(FeatureSet(features, [f"{i}.png" for i in range(n)], labels), names)


def test_every_image_queries_the_others_as_in_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "RANKED_AT_ONCE", 200)  # several blocks of queries
    monkeypatch.setattr(retrieval, "BANK_ROWS_PER_BLOCK", 33)
    bank = labelled(70, 0)
    found = retrieval.evaluate(bank, ks=(1, 5))
    x, y = bank.samples.features.double().numpy(), bank.samples.labels.numpy()
    similarity = cosine_similarity(x)
    precisions, recalls = [], {1: [], 5: []}
    for i in range(70):
        others = np.delete(np.arange(70), i)
        precisions.append(average_precision_score(y[others] == y[i], similarity[i, others]))
        order = others[np.argsort(-similarity[i, others])]
        for k in recalls:
            recalls[k].append((y[order[:k]] == y[i]).any())
    results = found["results"]
    assert results["map"]["value"] == pytest.approx(100 * np.mean(precisions), abs=1e-4)
    for k, hits in recalls.items():
        assert results["recall"][str(k)]["value"] == pytest.approx(100 * np.mean(hits))
    assert 30 < results["map"]["value"] < 90  # neither chance nor trivial
    per_class = {row["class"]: row for row in found["per_class"]}
    assert per_class["cat"]["map"] == pytest.approx(100 * np.mean(np.array(precisions)[y == 2]), abs=1e-4)
    assert found["mean_per_class"]["map"] == pytest.approx(np.mean([row["map"] for row in per_class.values()]))
    low, high = results["map"]["interval"]
    assert low < results["map"]["value"] < high
    assert all(near["key"] != row["key"] for row in found["examples"] for near in row["neighbours"])


def test_other_queries_are_matched_by_class_name() -> None:
    bank, queries = labelled(60, 0), labelled(25, 1)
    same = retrieval.evaluate(bank, queries, ks=(1,))
    order = [2, 0, 3, 1]  # the classes of the queries in another order, and one that the bank lacks
    names = (*(NAMES[i] for i in order), "emu")
    number = torch.tensor([order.index(i) for i in range(4)])
    labels = number[queries.samples.labels]
    renamed = LabelledSet(queries.samples._replace(labels=labels), names)
    other = retrieval.evaluate(bank, renamed, ks=(1,))
    assert other["results"] == same["results"]
    labels = labels.clone()
    labels[:5] = 4
    left = retrieval.evaluate(bank, LabelledSet(queries.samples._replace(labels=labels), names), ks=(1,))
    assert (left["n_queries"], left["queries_left_out"]) == (20, 5)


def test_memory_does_not_grow_with_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The similarities that are sorted at a time are counted."""
    monkeypatch.setattr(retrieval, "RANKED_AT_ONCE", 1000)
    at_once = []
    rank = retrieval.rank_relevant
    monkeypatch.setattr(retrieval, "rank_relevant", lambda s, r: at_once.append(s.numel()) or rank(s, r))
    for n in (50, 200, 800):
        samples = labelled(n, n).samples
        some = slice(0, 50)
        found = retrieval.rank_queries(
            samples.features, samples.labels, samples.features[some], samples.labels[some], True
        )
        assert len(found.first) == 50
    assert max(at_once) <= 1000
    assert len(at_once) == 50 * 50 // 1000 + 1 + 50 * 200 // 1000 + 50


def test_errors_of_feature_sets() -> None:
    bank = labelled(30, 0)
    with pytest.raises(UserError, match="--k 30: larger than the 29 images"):
        retrieval.evaluate(bank, ks=(1, 30))
    with pytest.raises(UserError, match="one class"):
        retrieval.evaluate(LabelledSet(bank.samples._replace(labels=torch.zeros(30).long()), NAMES), ks=(1,))
    single = LabelledSet(FeatureSet(torch.randn(4, 3), list("abcd"), torch.arange(4)), NAMES)
    with pytest.raises(UserError, match="every class has only one image"):
        retrieval.evaluate(single, ks=(1,))
    bank.samples.features[3] = torch.nan
    with pytest.raises(UserError, match="1 of 30 feature vectors hold NaN"):
        retrieval.evaluate(bank, ks=(1,))


# --- the revisited protocol ------------------------------------------------------------------------------------------


def published_map(ranks: np.ndarray, gnd: list[dict[str, list[int]]], kappas: tuple[int, ...]) -> tuple[float, list]:
    """The steps of the published evaluation: skip queries without positives, shift positions by the junk before them."""
    total, count, at_kappa = 0.0, 0, np.zeros(len(kappas))
    for i, row in enumerate(gnd):
        if not row["ok"]:
            continue
        places = [p for p, image in enumerate(ranks[i]) if image in row["ok"]]
        junk = [p for p, image in enumerate(ranks[i]) if image in row["junk"]]
        places = [p - sum(j < p for j in junk) for p in places]
        ap = 0.0
        for j, rank in enumerate(places):
            ap += ((j / rank if rank else 1.0) + (j + 1) / (rank + 1)) / (2 * len(row["ok"]))
        total, count = total + ap, count + 1
        for c, kappa in enumerate(kappas):
            within = min(max(places) + 1, kappa)
            at_kappa[c] += sum(p + 1 <= within for p in places) / within
    return 100 * total / count, list(100 * at_kappa / count)


def test_revisited_measures_equal_the_published_steps() -> None:
    rng = np.random.default_rng(3)
    ranks = np.stack([rng.permutation(50) for _ in range(12)])
    judged = []
    for i in range(12):
        images = rng.permutation(50)[:20].tolist()
        judged.append({"easy": images[:6] if i else [], "hard": images[6:12] if i != 5 else [], "junk": images[12:]})
    for setting, (ok, junk) in revisited.SETTINGS.items():
        gnd = [{"ok": [i for f in ok for i in r[f]], "junk": [i for f in junk for i in r[f]]} for r in judged]
        expected, at_kappa = published_map(ranks, gnd, revisited.KAPPAS)
        found = revisited.score(ranks, judged, setting)
        assert found["map"] == pytest.approx(expected)
        assert list(found["precision"].values()) == pytest.approx(at_kappa)
        assert found["queries"] == sum(bool(g["ok"]) for g in gnd)
    assert revisited.score(ranks, [{"easy": [], "hard": [], "junk": []}] * 12, "hard")["map"] is None


def revisited_set(root: Path) -> dict:
    """Twelve images of three colours of several shapes; a query is the part of an image that its box shows."""
    (root / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = ((200, 40, 40), (40, 190, 60), (40, 60, 210))
    names = [f"image{i:02d}" for i in range(12)]
    for i, name in enumerate(names):
        pixels = np.clip(colours[i % 3] + rng.normal(0, 20, (30 + 5 * i, 60 - 2 * i, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "jpg" / f"{name}.jpg")
    gnd = []
    for q in range(3):
        pixels = np.zeros((60, 60, 3), np.uint8)
        pixels[10:50, 5:45] = colours[q]
        Image.fromarray(pixels).save(root / "jpg" / f"query{q}.jpg")
        relevant = [i for i in range(12) if i % 3 == q]
        gnd.append({"bbx": [7.5, 12.5, 43, 48], "easy": relevant[:2], "hard": relevant[2:3], "junk": relevant[3:]})
    truth = {"imlist": names, "qimlist": [f"query{q}" for q in range(3)], "gnd": gnd}
    (root / "gnd_roxford5k.json").write_text(json.dumps(truth))
    return truth


def test_command_on_a_revisited_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "roxford5k", tmp_path / "out"
    truth = revisited_set(root)
    arguments = ["evaluate", "retrieval", "--checkpoint", "pixels", "--data", str(root), "--out", str(out)]
    assert cli.main([*arguments, "--size", "40"]) == 0
    result = json.loads((out / "retrieval.json").read_text())
    assert {name: row["map"] for name, row in result["results"].items()} == dict.fromkeys(revisited.SETTINGS, 100.0)
    assert result["protocol"]["largest_side"] == 40
    assert "medium" in capsys.readouterr().out
    assert Image.open(out / "retrieval.png").width > 500
    for broken, message in (
        ({**truth, "qimlist": ["query0"]}, "1 queries in qimlist, but 3"),
        ({**truth, "imlist": [*truth["imlist"][:-1], "lost"]}, "lost.jpg: no such image"),
        ({**truth, "gnd": [{**truth["gnd"][0], "easy": [12]}, *truth["gnd"][1:]]}, "index 12 is not of one of the 12"),
        ({**truth, "gnd": [{**truth["gnd"][0], "bbx": [5, 5, 5, 9]}, *truth["gnd"][1:]]}, "x0 < x1"),
        ({"imlist": []}, "not the ground truth"),
    ):
        (root / "gnd_roxford5k.json").write_text(json.dumps(broken))
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    (root / "gnd_roxford5k.json").rename(root / "gnd_roxford5k.pkl")
    assert cli.main(arguments) == 2
    assert "pickles are not read" in capsys.readouterr().err


def test_command_on_a_labelled_set(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(data: Path, *more: str) -> int:
        common = ["evaluate", "retrieval", "--checkpoint", str(checkpoint), "--workers", "0", "--out", str(tmp_path)]
        return cli.main([*common, "--data", str(data), *more])

    assert run(photos / "test", "--k", "1", "5") == 0
    alone = json.loads((tmp_path / "retrieval.json").read_text())
    assert (alone["n_queries"], alone["n_bank"]) == (24, 24)
    assert run(photos / "train", "--queries", str(photos / "test")) == 0
    across = json.loads((tmp_path / "retrieval.json").read_text())
    assert (across["n_queries"], across["n_bank"]) == (24, 60)
    assert list(across) == [
        *("checkpoint", "step", "data", "queries", "kind", "n_bank", "n_queries", "queries_left_out", "feature_dim"),
        *("results", "mean_per_class", "per_class", "examples"),
    ]
    assert Image.open(tmp_path / "retrieval.png").width > 500
    paint(tmp_path / "one", 3, 0, {"red": (200, 0, 0)})
    capsys.readouterr()
    for data, more, message in (
        (photos / "test", ["--k", "24"], "--k 24: larger than the 23 images"),
        (photos / "test", ["--size", "64"], "only for the revisited sets"),
        (tmp_path / "one", ["--k", "1"], "one class"),
        (photos / "test" / "red", [], "have no labels"),
    ):
        assert run(data, *more) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
