"""Retrieval between modalities and accuracies of each, against loops and by hand."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.evaluate import modalities
from esvit_scale.evaluate.modalities import Modality, MultimodalSet, Trained
from esvit_scale.models.initialize import initialize
from esvit_scale.objective.network import build_network

VALUES: dict[str, Any] = {
    "data": {
        "global_crops": {"size": 16, "count": 1},
        "local_crops": [],
        "audio": {"views": 1, "rate": 1000, "seconds": 0.05},
        "text": {"views": 1, "length": 5},
    },
    "model": {"trunk": "modal_small", "embed_dim": 8, "depths": [1], "heads": [1]},
    "objective": {"name": "vatt", "pairs": ["image-audio", "image-text"], "head_hidden": 6, "bottleneck": 4},
}
VALUES["objective"] |= {"ema_momentum": 0.0, "ema_momentum_end": 0.0}
VALUES["model"]["modalities"] = {"patch": 8, "waveform_patch": 10}


def trained() -> Trained:
    config = configs.validate(VALUES, where="modalities")
    network = build_network(config)
    initialize(network, 2)
    return Trained(network.eval(), config, 3)


class Part(NamedTuple):
    keys: list[str]
    labels: Tensor
    images: Tensor
    has_image: Tensor
    signals: dict[str, Any]


class Signal(NamedTuple):
    values: Tensor
    lengths: Tensor


def parts(n: int = 12) -> list[Part]:
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(1, 257, (n, 5), generator=generator)
    text[1] = text[0]  # the same text twice
    audio = torch.rand(n, 50, generator=generator) - 0.5
    lengths = torch.randint(1, 51, (n,), generator=generator)
    lengths[2] = 0
    images = torch.randn(n, 3, 16, 16, generator=generator)
    whole = Part(
        [f"k{i}" for i in range(n)],
        torch.arange(n) % 2,
        images,
        torch.arange(n) != 3,
        {"audio": Signal(audio, lengths), "text": Signal(text, torch.full((n,), 5))},
    )

    def cut(rows: slice) -> Part:
        signals = {k: Signal(v.values[rows], v.lengths[rows]) for k, v in whole.signals.items()}
        return Part(whole.keys[rows], whole.labels[rows], whole.images[rows], whole.has_image[rows], signals)

    return [cut(slice(0, 8)), cut(slice(8, n))]


def test_every_direction_ranks_the_samples_that_have_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained()
    monkeypatch.setattr(modalities, "evaluation_signals", lambda source, config, batch: iter(parts()))
    monkeypatch.setattr(modalities, "load", lambda checkpoint: model)
    monkeypatch.setattr(modalities, "source_info", lambda source: type("Info", (), {"classes": ("a", "b")}))
    result = modalities.run_modalities(Path("run"), tmp_path / "val", tmp_path, (1, 3))
    assert (tmp_path / "modalities.json").exists()
    found = {(row["query"], row["found"]): row for row in result["retrieval"]}
    names = ("image", "audio", "text")
    assert set(found) == {
        (a, b) for a in names for b in names if a != b
    }  # audio and text without a pair of their own, too
    assert [found["image", b]["samples"] for b in ("audio", "text")] == [10, 11]
    objective: Any = model.network.objective
    whole = parts()
    joined = {
        k: [torch.cat([getattr(p.signals[k], f) for p in whole]) for f in ("values", "lengths")]
        for k in ("audio", "text")
    }
    with torch.no_grad():
        features = model.network.trunk([torch.cat([p.images for p in whole])], None, joined)
    keep = [i for i in range(12) if i != 3]
    x, y = objective.comparable({"image": features.view, "text": features.signals["text"].view}, "image", "text")
    hits = 0
    for i in keep:
        order = sorted(keep, key=lambda j: -(x[i] @ y[j]).item())
        right = {0, 1} if i in (0, 1) else {i}
        # A tie between equal texts does not matter here, as both are right.
        hits += bool(right & set(order[:3]))
    assert found["image", "text"]["recall"]["3"]["value"] == pytest.approx(100 * hits / 11)
    low, high = found["image", "text"]["recall"]["3"]["interval"]
    assert low <= 100 * hits / 11 <= high
    assert found["image", "text"]["lengths"] is None
    assert found["audio", "text"]["lengths"] is not None
    assert "image → text" in modalities.table(result)


def test_chance_is_that_of_random_orders() -> None:
    relevant = torch.eye(9, dtype=torch.bool)
    relevant[0, 1] = relevant[1, 0] = relevant[0, 2] = True
    stated = modalities.chance(relevant, (1, 4))
    generator = np.random.default_rng(0)
    hits = {1: 0, 4: 0}
    for _ in range(4000):
        order = generator.permutation(9)
        for k in hits:
            hits[k] += int(relevant[:, torch.from_numpy(order[:k].copy())].any(1).sum())
    for k, count in hits.items():
        assert stated[str(k)] == pytest.approx(100 * count / (9 * 4000), abs=1.0)


def test_lengths_rank_by_standard_scores() -> None:
    audio, text = torch.tensor([100, 200, 400, 300]), torch.tensor([1, 2, 4, 3])
    assert modalities.by_length(audio, text).argmax(1).tolist() == [0, 1, 2, 3]
    constant = modalities.by_length(audio, torch.ones(4, dtype=torch.int64))
    assert torch.equal(constant, constant[:, :1].expand(4, 4))
    first = modalities.recall(constant, torch.eye(4, dtype=torch.bool), (1, 3))
    assert first["3"]["value"] == 0  # a tie of all counts against the ranking


def test_classification_finds_what_the_features_separate() -> None:
    labels = torch.arange(60) % 3
    views = torch.nn.functional.one_hot(labels, 3).float() + 0.05 * torch.randn(60, 3)
    present = torch.ones(60, dtype=torch.bool)
    present[:5] = False
    noise = Modality(torch.randn(60, 3), ~present, None)
    data = MultimodalSet({"image": Modality(views, present, None), "audio": noise}, labels, ("a", "b", "c"), labels)
    test = data._replace(classes=("c", "b", "a"), labels=2 - labels)

    found = {row["modality"]: row for row in modalities.classify(data, test)}
    assert found["image"]["n_test"] == 55
    assert found["image"]["knn"]["top1"] == found["image"]["linear"]["top1"] == 100


def test_untrained_network_is_the_one_with_which_a_run_starts() -> None:
    untrained = modalities.load(Path("untrained:vatt_small"))
    config = configs.resolve("vatt_small")
    begun = build_network(config)
    initialize(begun, config.seed)
    assert untrained.step == 0
    for name, value in begun.state_dict().items():
        assert torch.equal(untrained.network.state_dict()[name], value), name
    with pytest.raises(UserError, match="reads images alone"):
        modalities.load(Path("untrained:demo"))
