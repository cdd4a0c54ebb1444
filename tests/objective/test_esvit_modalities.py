"""Modalities as views against loops over samples, views and tokens in float64, with missing modalities and padding."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esvit_scale import config as configs
from esvit_scale.errors import UserError
from esvit_scale.models.initialize import initialize
from esvit_scale.models.trunk import Features, SignalFeatures
from esvit_scale.objective.esvit_modalities import ModalEsViT

B, C, K = 6, 8, 11
TEMP, STUDENT_TEMP = 0.06, 0.1
GRIDS = {"student": [(2 * B, 2, 2), (B, 1, 2)], "teacher": [(2 * B, 2, 2)]}
LENGTHS = {"student": {"audio": (2, 3), "text": (1, 4)}, "teacher": {"audio": (2, 5), "text": (1, 4)}}  # views, tokens


def objective_of(regions: bool = True) -> ModalEsViT:
    sizes = {"prototypes": K, "head_hidden": 9, "bottleneck": 6, "regions": regions}
    built = ModalEsViT(C, configs.Objective(name="esvit_modalities", **sizes))
    initialize(built, int(torch.randint(1 << 30, ())))
    with torch.no_grad():
        for p in built.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return built.double()


def features_of() -> tuple[Features, Features]:
    """Fresh features of student and teacher of B samples, of which some lack some modalities; the first has all."""
    has_image = torch.rand(B) < 0.7
    has_image[0] = True
    present = {name: torch.rand(views * B) < 0.7 for name, (views, _) in LENGTHS["student"].items()}
    found = []
    for role in ("student", "teacher"):
        signals = {}
        for name, (views, tokens) in LENGTHS[role].items():
            present[name][::B] = True
            counts = torch.randint(1, tokens + 1, (views * B,)) * present[name]
            valid = torch.arange(tokens) < counts[:, None]
            x = torch.randn(views * B, 1 + tokens, C, dtype=torch.float64, requires_grad=role == "student")
            signals[name] = SignalFeatures(x[:, 0], x[:, 1:], valid, present[name])
        count = sum(n * h * w for n, h, w in GRIDS[role])
        view = torch.randn(sum(n for n, *_ in GRIDS[role]), C, dtype=torch.float64, requires_grad=role == "student")
        regions = torch.randn(count, C, dtype=torch.float64, requires_grad=role == "student")
        found.append(Features(view, regions, GRIDS[role], signals, has_image))
    return found[0], found[1]


def flat(f: Features) -> list[tuple[tuple[str, int], int, Tensor, Tensor]]:
    """(view's name, sample, its view feature, its valid tokens) of every view that is there."""
    found, row, first, crop = [], 0, 0, 0
    for n, h, w in f.grids:
        for _ in range(n // B):
            for i in range(B):
                if f.has_image[i]:
                    found.append((("image", crop), i, f.view[row], f.regions[first : first + h * w]))
                row, first = row + 1, first + h * w
            crop += 1
    for name, s in f.signals.items():
        for row in range(len(s.view)):
            if s.present[row]:
                found.append(((name, row // B), row % B, s.view[row], s.tokens[row][s.valid[row]]))
    return found


def cross_entropy(objective: ModalEsViT, head: str, t: Tensor, s: Tensor, center: Tensor) -> Tensor:
    module = getattr(objective, f"{head}_head")
    v, g = module.last_layer.weight_v, module.last_layer.weight_g
    rows = g * v / v.norm(dim=1, keepdim=True)
    p = ((rows @ F.normalize(module.mlp(t), dim=0) - center) / TEMP).softmax(0).detach()
    return -(p * (rows @ F.normalize(module.mlp(s), dim=0) / STUDENT_TEMP).log_softmax(0)).sum()


def slow_loss(objective: ModalEsViT, student: Features, teacher: Features, centers: dict[str, Tensor]) -> Tensor:
    names = [[("image", i) for i in range(crops)] + [("audio", 0), ("audio", 1), ("text", 0)] for crops in (3, 2)]
    pairs = {(s, t): ([], []) for s in names[0] for t in names[1] if s != t}  # type: ignore[var-annotated]
    for name, i, view, tokens in flat(student):
        for other, j, of_teacher, others in flat(teacher):
            if i != j or name == other:
                continue
            losses = pairs[name, other]
            losses[0].append(cross_entropy(objective, "view", of_teacher, view, centers["view"]))
            near = [max(others, key=lambda o: F.cosine_similarity(o, x, dim=0).item()) for x in tokens.detach()]
            terms = [
                cross_entropy(objective, "region", o, x, centers["region"]) for o, x in zip(near, tokens, strict=True)
            ]
            losses[1].append(sum(terms) / len(terms))
    total = torch.zeros((), dtype=torch.float64)
    for losses in pairs.values():
        for part in losses:
            total = total + 0.5 * sum(part) / max(len(part), 1) / len(pairs)
    return total


def gradients(loss: Tensor, objective: ModalEsViT, f: Features) -> list[Tensor]:
    leaves = [*objective.parameters(), f.view, f.regions]
    leaves += [s.view._base for s in f.signals.values() if s.view._base is not None]
    return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def test_loss_gradients_and_centres_match_definition() -> None:
    objective = objective_of()
    student, teacher = features_of()
    zero = {"view": torch.zeros(K, dtype=torch.float64), "region": torch.zeros(K, dtype=torch.float64)}
    with torch.no_grad():
        targets = objective.targets(teacher)
    objective(student, targets, TEMP)
    objective.commit()
    with torch.no_grad():
        centers = {}
        for head, rows in (
            ("view", [v for _, _, v, _ in flat(teacher)]),
            ("region", [x for *_, t in flat(teacher) for x in t]),
        ):
            module = getattr(objective, f"{head}_head")
            v, g = module.last_layer.weight_v, module.last_layer.weight_g
            logits = [(g * v / v.norm(dim=1, keepdim=True)) @ F.normalize(module.mlp(x), dim=0) for x in rows]
            centers[head] = 0.1 * sum(logits) / len(logits) + zero[head]
    for head, expected in centers.items():
        torch.testing.assert_close(objective.extra_state()[f"{head}.values"], expected, rtol=0, atol=1e-9)
    loss, logs = objective(student, targets, TEMP)
    expected = slow_loss(objective, student, teacher, centers)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert 0.5 * (logs["loss_view"] + logs["loss_region"]).item() == pytest.approx(loss.item(), abs=1e-9)
    ours, theirs = gradients(loss, objective, student), gradients(expected, objective, student)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_a_batch_without_a_pair_gives_zero() -> None:
    """Only one view of one modality is there, which is no pair with itself."""
    objective = objective_of()
    student, teacher = features_of()

    def alone(f: Features) -> Features:
        nothing = {
            name: s._replace(present=s.present & (name == "text"), valid=s.valid & (name == "text"))
            for name, s in f.signals.items()
        }
        return f._replace(has_image=torch.zeros(B, dtype=torch.bool), signals=nothing)

    with torch.no_grad():
        targets = objective.targets(alone(teacher))
    loss, logs = objective(alone(student), targets, TEMP)
    assert loss.item() == 0
    assert all(value.isfinite() for value in logs.values())
    assert all(not g.any() for g in gradients(loss, objective, student))


def test_sinkhorn_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective.centering"):
        ModalEsViT(C, configs.Objective(name="esvit_modalities", centering="sinkhorn"))
