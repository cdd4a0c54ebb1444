"""VATT's losses against loops over samples and views in float64, with missing modalities."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initialize
from esvit_scale.models.trunk import Features, SignalFeatures
from esvit_scale.objective.vatt import VATT

B, C = 6, 10
VIEWS = {"image": 2, "audio": 2, "video": 1, "text": 3}
PAIRS = ["image-audio", "video-audio", "image-text", "text-audio"]


def objective_of(pairs: list[str] | None = None) -> VATT:
    built = VATT(C, configs.Objective(name="vatt", pairs=pairs or PAIRS, head_hidden=9, bottleneck=6, student_temp=0.2))
    initialize(built, int(torch.randint(1 << 30, ())))
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return built.double()


def features_of(presence: float = 0.6) -> Features:
    """Fresh features of B samples, of which some lack some modalities; the first has all."""
    signals = {}
    for name in ("audio", "video", "text"):
        n = VIEWS[name] * B
        present = torch.rand(n) < presence
        present[::B] = True
        view = torch.randn(n, C, dtype=torch.float64, requires_grad=True)
        signals[name] = SignalFeatures(view, view[:, None], present[:, None], present)
    view = torch.randn(VIEWS["image"] * B, C, dtype=torch.float64, requires_grad=True)
    has_image = torch.rand(B) < presence
    has_image[0] = True
    return Features(view, view[:0], [(2 * B, 0, 0)], signals, has_image)


def slow_loss(objective: VATT, f: Features) -> tuple[Tensor, dict[str, float]]:
    present = {"image": f.has_image.repeat(2)} | {name: s.present for name, s in f.signals.items()}
    views = {"image": f.view} | {name: s.view for name, s in f.signals.items()}
    spaces: dict[tuple[str, int], list[Tensor]] = {}
    for name, rows in views.items():
        for row in rows if name in objective.modalities else ():
            if name == "text":
                spaces.setdefault((name, 2), []).append(F.normalize(objective.text(row), dim=0))
                continue
            head: Any = objective.first[name]
            z = head(row) if name == "audio" else head.out(head.norm(head.hidden(row)).relu())
            spaces.setdefault((name, 1), []).append(F.normalize(z, dim=0))
            spaces.setdefault((name, 2), []).append(F.normalize(objective.second(z.relu()), dim=0))
    total, logs = torch.zeros((), dtype=torch.float64), {}
    for a, b in objective.pairs:
        space = 2 if b == "text" else 1
        x, y = spaces[a, space], spaces[b, space]

        def has(name: str, view: int, i: int) -> bool:
            return bool(present[name][view * B + i])

        groups = [list(range(VIEWS["text"]))] if b == "text" else [[u] for u in range(VIEWS[b])]
        of_pair = []
        for v in range(VIEWS[a]):
            for group in groups:
                losses = []
                for i in range(B):
                    own = [u for u in group if has(b, u, i)]
                    if not has(a, v, i) or not own:
                        continue
                    score = lambda p, q, u: (x[v * B + p] @ y[u * B + q] / 0.2).exp()  # noqa: B023, E731
                    right = sum(score(i, i, u) for u in own)
                    wrong = sum(score(i, j, u) for j in range(B) for u in group if j != i and has(b, u, j))
                    wrong = wrong + sum(score(j, i, u) for j in range(B) for u in own if j != i and has(a, v, j))
                    losses.append(-torch.log(right / (right + wrong)))
                of_pair.append(sum(losses) / len(losses) if losses else torch.zeros((), dtype=torch.float64))
        mean = sum(of_pair) / len(of_pair)
        logs[f"loss_{a}_{b}"] = float(mean.detach())
        total = total + mean / len(objective.pairs)
    return total, logs


def gradients(loss: Tensor, objective: VATT, f: Features) -> list[Tensor]:
    leaves = [*objective.parameters(), f.view, *(s.view for s in f.signals.values())]
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def test_loss_and_gradients_match_definition() -> None:
    objective, f = objective_of(), features_of()
    assert objective.pairs[-1] == ("audio", "text")
    loss, logs = objective(f, None, 0.0)
    expected, parts = slow_loss(objective, f)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for name, value in parts.items():
        assert logs[name].item() == pytest.approx(value, abs=1e-9)
    for ours, theirs in zip(gradients(loss, objective, f), gradients(expected, objective, f), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_missing_modalities_change_nothing_and_no_pair_gives_zero() -> None:
    """What lies where a modality is missing has no influence; without any pair the loss is 0, and so are gradients."""
    objective, f = objective_of(), features_of()
    other = {
        name: s._replace(view=torch.where(s.present[:, None], s.view, torch.randn_like(s.view)).detach())
        for name, s in f.signals.items()
    }
    assert objective(f, None, 0.0)[0].item() == pytest.approx(
        objective(f._replace(signals=other), None, 0.0)[0].item(), abs=1e-12
    )
    none = f._replace(
        has_image=torch.zeros(B, dtype=torch.bool),
        signals={name: s._replace(present=s.present & (name == "video")) for name, s in f.signals.items()},
    )
    loss, logs = objective(none, None, 0.0)
    assert loss.item() == 0
    assert all(value.isfinite() for value in logs.values())
    assert all(not g.any() for g in gradients(loss, objective, none))


def test_pairs_without_images_leave_images_out() -> None:
    """VATT's own pairs: images have no part in the loss, and gradients of 0 for the tokenizer that every run has."""
    objective, f = objective_of(["video-audio", "video-text"]), features_of()
    loss, _ = objective(f, None, 0.0)
    assert loss.item() == pytest.approx(slow_loss(objective, f)[0].item(), abs=1e-9)
    of_images = gradients(loss, objective, f)[len([*objective.parameters()])]
    assert of_images.shape == f.view.shape
    assert not of_images.any()


def test_perfect_pairs_have_accuracy_1_and_the_loss_of_their_negatives() -> None:
    """Orthogonal samples: −log(e^(1/τ) / (e^(1/τ) + 2 (B − 1)))."""
    objective = objective_of(["video-audio"])
    z = torch.eye(B, dtype=torch.float64)
    objective.spaces = lambda views: ({"video": z, "audio": z.repeat(2, 1)}, {})  # type: ignore[method-assign]
    loss, logs = objective(features_of(presence=1.1), None, 0.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 * (B - 1) * math.exp(-5)), abs=1e-9)
    assert logs["accuracy_video_audio"].item() == pytest.approx(1)


def test_pairs_that_are_none_are_refused() -> None:
    for pairs in (["image-sound"], ["text-text"], ["image"]):
        with pytest.raises(UserError, match=r"objective.pairs: .* is no pair of modalities"):
            objective_of(pairs)
