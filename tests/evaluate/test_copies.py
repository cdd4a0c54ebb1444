"""Copy detection: measures against scikit-learn and slow loops, distortions, the Copydays layout, and errors."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve

from esvit_scale import cli
from esvit_scale.data import copies
from esvit_scale.evaluate import micro_precision
from esvit_scale.evaluate.copies import ATTACKS
from tests.evaluate.conftest import paint

CPU = torch.device("cpu")


def noisy_copies(n: int, bank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of searched images, of copies, and the original of each copy; some images are copied twice."""
    rng = torch.Generator().manual_seed(seed)
    searched = torch.randn(bank, 8, generator=rng)
    originals = torch.randint(bank, (n,), generator=rng)
    noise = torch.rand(n, 1, generator=rng) * 2
    return searched, searched[originals] + noise * torch.randn(n, 8, generator=rng), originals


def similarities(searched: torch.Tensor, queries: torch.Tensor) -> np.ndarray:
    x, y = (v.double().numpy() for v in (queries, searched))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    return (x @ y.T).round(6)


def test_measures_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_precision, "BANK_ROWS_PER_BLOCK", 17)  # several blocks of both
    monkeypatch.setattr(micro_precision, "PAIRS_AT_ONCE", 17 * 9)
    searched, queries, originals = noisy_copies(40, 50, 0)
    found = micro_precision.copy_measures([searched[:45], searched[45:]], queries, originals.clamp(max=44), CPU)
    right = np.zeros((40, 50), bool)
    right[np.arange(40), originals.clamp(max=44)] = True
    scores = similarities(searched, queries)
    assert found["uap"] == pytest.approx(100 * average_precision_score(right.ravel(), scores.ravel()), abs=1e-6)
    single = [average_precision_score(right[i], scores[i]) for i in range(40)]
    assert found["map"] == pytest.approx(100 * np.mean(single), abs=1e-6)
    assert 20 < found["uap"] < 80  # neither chance nor trivial
    assert found["map"] > found["uap"]  # one threshold for all queries is the harder task
    precision, recall, _ = precision_recall_curve(right.ravel(), scores.ravel())
    assert found["recall_at_p90"] == pytest.approx(100 * recall[precision >= 0.9].max())
    assert found["first"] == pytest.approx(100 * (scores.argmax(1) == originals.clamp(max=44).numpy()).mean())


def test_interval_is_that_of_resampled_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_precision, "RESAMPLES", 100)
    searched, queries, originals = noisy_copies(30, 40, 1)
    found = micro_precision.copy_measures([searched], queries, originals, CPU, seed=5)
    scores, rng, slow = similarities(searched, queries), np.random.default_rng(5), []
    for _ in range(100):
        rows = rng.integers(30, size=30)
        right = originals.numpy()[rows, None] == np.arange(40)
        slow.append(100 * average_precision_score(right.ravel(), scores[rows].ravel()))
    assert found["interval"] == pytest.approx(list(np.percentile(slow, [2.5, 97.5])), abs=1e-6)


def test_equal_features_find_nothing() -> None:
    """A collapsed trunk: all pairs are equally similar, whatever the last bits of their products."""
    same = torch.randn(1, 300).repeat(20, 1)
    found = micro_precision.copy_measures([same], same[:5], torch.arange(5), CPU)
    assert found["uap"] == pytest.approx(5.0)
    assert found["map"] == pytest.approx(5.0)
    assert found["first"] == 0


def test_memory_does_not_grow_with_the_searched_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_precision, "BANK_ROWS_PER_BLOCK", 64)
    monkeypatch.setattr(micro_precision, "PAIRS_AT_ONCE", 640)
    at_once, levels = [], micro_precision._levels
    monkeypatch.setattr(micro_precision, "_levels", lambda s: at_once.append(s.numel()) or levels(s))
    sizes = []
    for n in (100, 1000):
        searched, queries, originals = noisy_copies(30, n, 2)
        counts = micro_precision.count_pairs([searched], queries, originals, CPU, 0)
        sizes.append(counts.wrong.numel())
        assert counts.wrong.max() <= 30 * 30 * (n - 1)
    assert max(at_once) <= 640
    assert sizes == [1001 * 30] * 2


def test_copies_depend_on_their_key_alone() -> None:
    rng = np.random.default_rng(0)
    for shape in ((90, 120, 3), (8, 60, 3), (700, 300, 3)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        for kind in ATTACKS:
            one = copies.distorted(image, kind, 0, "a")
            assert one.mode == "RGB"
            assert np.array_equal(one, copies.distorted(image, kind, 0, "a"))
            others = [
                copies.distorted(image, kind, seed, key) for seed, key in ((0, "b"), (0, "c"), (1, "a"), (2, "a"))
            ]
            assert sum(o.size == one.size and np.array_equal(o, one) for o in others) <= 1  # JPEG has 18 qualities
            assert max(one.size) <= 1000


@pytest.mark.slow
def test_command_on_a_set(checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    common = ["evaluate", "copies", "--checkpoint", str(checkpoint), "--workers", "0", "--out", str(out)]
    sets = ["--data", str(photos / "test"), "--distractors", str(photos / "train")]
    assert cli.main([*common, *sets, "--queries", "10"]) == 0
    result = json.loads((out / "copies.json").read_text())
    assert list(result) == [
        *("checkpoint", "step", "data", "distractors", "n_bank", "n_distractors", "feature_dim", "protocol", "results")
    ]
    assert (result["n_bank"], result["n_distractors"]) == (84, 60)
    assert list(result["results"]) == ["crop", "jpeg", "strong"]
    assert all(row["queries"] == 10 for row in result["results"].values())
    assert result["results"]["jpeg"]["uap"] > result["results"]["strong"]["uap"]
    assert Image.open(out / "copies.png").width > 500
    assert "84 images, of which 60 are distractors; whole images at 32×32 pixels" in capsys.readouterr().out
    assert len(list((out / "features").iterdir())) == 5
    assert cli.main([*common, *sets, "--queries", "10", "--attack", "strong"]) == 0  # from the cache
    again = json.loads((out / "copies.json").read_text())
    assert again["results"] == {"strong": result["results"]["strong"]}
    assert len(list((out / "features").iterdir())) == 5
    paint(tmp_path / "one", 1, 0, {"red": (200, 0, 0)})
    for data, message in (
        (tmp_path / "one", "one image; copy detection needs two"),
        (tmp_path / "no", "no such folder"),
    ):
        capsys.readouterr()
        assert cli.main([*common, "--data", str(data)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def copydays(root: Path) -> Path:
    """Five originals, and for each a JPEG copy of low quality and two strong copies."""
    rng = np.random.default_rng(0)
    for block in ("original", "strong", "jpegqual/5", "jpegqual/20"):
        (root / block).mkdir(parents=True)
    for i in range(5):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = small.resize((80, 60 + 4 * i), Image.Resampling.NEAREST)
        image.save(root / "original" / f"{2000 + i}00.jpg")
        for quality in (5, 20):
            image.save(root / f"jpegqual/{quality}" / f"{2000 + i}00.jpg", quality=quality)
        for n in (1, 2):
            image.rotate(8 * n).save(root / "strong" / f"{2000 + i}0{n}.jpg")
    return root


def test_command_on_copydays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = copydays(tmp_path / "copydays"), tmp_path / "out"
    sets = ["--data", str(root), "--out", str(out)]
    arguments = ["evaluate", "copies", "--checkpoint", "pixels", "--workers", "0", *sets]
    assert cli.main(arguments) == 0
    result = json.loads((out / "copies.json").read_text())
    assert {name: row["queries"] for name, row in result["results"].items()} == {
        **{"strong": 10, "jpegqual/5": 5, "jpegqual/20": 5}
    }
    assert all(row["map"] == 100 for row in result["results"].values())
    assert result["protocol"]["layout"] == "Copydays"
    shutil.copy(root / "strong" / "200001.jpg", root / "strong" / "300001.jpg")

    def fails(message: str, *more: str) -> None:
        capsys.readouterr()
        assert cli.main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    fails("300001.jpg: no image in original/ begins with '3000'")
    (root / "strong" / "300001.jpg").unlink()
    fails("holds copies of its own (strong, …)", "--attack", "crop")
    shutil.copy(root / "original" / "200100.jpg", root / "original" / "200101.jpg")
    fails("begins like 200100.jpg")
