"""The whole objective against a triple loop written from the formula, and the official code's numbers."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from esvit_scale.config import Objective
from esvit_scale.models.trunk import Features
from esvit_scale.objective.esvit import EsViT, region_pairs, view_pairs
from esvit_scale.objective.objective import spread
from tests.models.rule import by_rule, fill

B, C, K = 2, 12, 50
LAYOUTS = {
    "two globals": [(2 * B, 3, 3)],
    "one local size": [(2 * B, 3, 3), (3 * B, 2, 2)],
    "two local sizes": [(2 * B, 3, 3), (2 * B, 2, 2), (1 * B, 1, 2)],
}


def objective(regions=True, seed="s"):
    module = EsViT(C, Objective(regions=regions, prototypes=K, head_hidden=16, bottleneck=8)).double()
    fill(module)
    if seed != "s":
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.add_(by_rule(seed + name, tuple(p.shape), 0.1))
    return module


def features(name, grids, requires_grad=False):
    regions = by_rule(name, (sum(n * h * w for n, h, w in grids), C)).requires_grad_(requires_grad)
    return Features(views_of(regions, grids), regions, list(grids))


def views_of(regions, grids):
    parts = regions.split([n * h * w for n, h, w in grids])
    return torch.cat([x.view(n, h * w, C).mean(1) for x, (n, h, w) in zip(parts, grids, strict=True)])


def slow_loss(student_module, teacher_module, student, teacher, temp, centers, regions):
    """Views t, crops v, images b, regions i: plain loops over the formula."""
    crops = [  # (image, [T, C])
        (c % B, x) for x, (n, h, w) in zip(_split(student), student.grids, strict=True)
        for c, x in enumerate(x.view(n, h * w, C))
    ]  # fmt: skip
    maps = teacher.regions.view(2, B, -1, C)
    total, pairs = 0, 0
    for t in range(2):
        for v in range(len(crops) // B):
            if v == t:
                continue
            pairs += 1
            pair = 0
            for b in range(B):
                image, tokens = crops[v * B + b]
                assert image == b
                view = _cross_entropy(
                    _logits(teacher_module.view_head, maps[t, b].mean(0)), centers[0], temp,
                    _logits(student_module.view_head, tokens.mean(0)),
                )  # fmt: skip
                if not regions:
                    pair = pair + view / B
                    continue
                region = 0
                for f in tokens:
                    cosines = [F.cosine_similarity(f, g, dim=0).item() for g in maps[t, b]]
                    best = maps[t, b][cosines.index(max(cosines))]
                    region = region + _cross_entropy(
                        _logits(teacher_module.region_head, best), centers[1], temp,
                        _logits(student_module.region_head, f),
                    ) / len(tokens)  # fmt: skip
                pair = pair + (0.5 * view + 0.5 * region) / B
            total = total + pair
    return total / pairs


def _split(f):
    return f.regions.split([n * h * w for n, h, w in f.grids])


def _logits(head, x):
    rows = head.last_layer
    w = rows.weight_g * rows.weight_v / rows.weight_v.norm(dim=1, keepdim=True)
    return w @ F.normalize(head.mlp(x), dim=0)


def _cross_entropy(teacher_logits, center, temp, student_logits):
    p = F.softmax((teacher_logits - center) / temp, dim=0).detach()
    return -(p * F.log_softmax(student_logits / 0.1, dim=0)).sum()


@pytest.mark.parametrize("regions", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_match_triple_loop(layout, regions):
    grids = LAYOUTS[layout]
    student_module, teacher_module = objective(regions), objective(regions, "t")
    student, teacher = features("a", grids, requires_grad=True), features("b", grids[:1])
    with torch.no_grad():
        targets = teacher_module.targets(teacher)
        if regions:
            student_module.region_center.load_state_dict({"values": by_rule("rc", (K,), 0.2)})
        student_module.view_center.load_state_dict({"values": by_rule("vc", (K,), 0.2)})
    centers = by_rule("vc", (K,), 0.2), by_rule("rc", (K,), 0.2)
    loss, logs = student_module(student, targets, 0.05)
    expected = slow_loss(student_module, teacher_module, student, teacher, 0.05, centers, regions)
    assert abs(loss.item() - expected.item()) < 1e-9
    leaves = [student.regions, *student_module.parameters()]
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    of_a_head = ("loss", "teacher_entropy", "student_entropy", "prototypes_used")
    parts = ("view", "region") if regions else ("view",)
    assert set(logs) == {f"{name}_{part}" for name in of_a_head for part in parts}
    assert not any(value.requires_grad for value in logs.values())


OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "official_loss.json").read_text())


@pytest.mark.parametrize("case", OFFICIAL, ids=["V+R", "V"])
def test_three_steps_match_official_loss(case):
    """Loss, gradients and centres of the official modules in float64; weights and features by rule."""
    grids = LAYOUTS["one local size"]
    student_module, teacher_module = objective(case["regions"]), objective(case["regions"], "teacher")
    for i, step in enumerate(case["steps"]):
        student_module.zero_grad()
        student, teacher = features(f"student{i}", grids, requires_grad=True), features(f"teacher{i}", grids[:1])
        with torch.no_grad():
            targets = teacher_module.targets(teacher)
        temp = 0.04 + step["epoch"] * (0.03 / 29)
        loss, _ = student_module(student, targets, temp)
        loss.backward()
        student_module.commit()
        assert loss.item() == pytest.approx(step["loss"], abs=1e-9)
        assert summary(student.regions.grad, "g") == pytest.approx(step["features_grad"], abs=1e-9)
        gradients = {n: summary(p.grad, n + "g") for n, p in student_module.named_parameters()}
        assert gradients.keys() == {n for n in step["gradients"] if case["regions"] or "region" not in n}
        for name, numbers in gradients.items():
            assert numbers == pytest.approx(step["gradients"][name], abs=1e-9), name
        for center, key in ((student_module.view_center, "view"), (student_module.region_center, "region")):
            if f"{key}_center" in step:
                expected = torch.tensor(step[f"{key}_center"], dtype=torch.float64)
                torch.testing.assert_close(center.values(targets.view.rows), expected, rtol=0, atol=1e-9)


def summary(grad, rule):
    """Two numbers of a gradient: its norm and its projection on a direction by rule."""
    return [grad.norm().item(), (grad * by_rule(rule, tuple(grad.shape))).sum().item()]


def test_matching_is_the_argmax_of_the_cosine_within_the_same_image():
    grids = LAYOUTS["two local sizes"]
    student, teacher = features("m", grids), features("n", grids[:1])
    unit = F.normalize(teacher.regions, dim=1).view(2 * B, 9, C)
    match, weight = region_pairs(student, unit, B)
    images = [c % B for n, h, w in grids for c in range(n) for _ in range(h * w)]
    crops = [f + c // B for (n, h, w), f in zip(grids, (0, 2, 4), strict=True) for c in range(n) for _ in range(h * w)]
    for s, f in enumerate(student.regions):
        for t in range(2):
            rows = range((t * B + images[s]) * 9, (t * B + images[s] + 1) * 9)
            best = max(rows, key=lambda r: F.cosine_similarity(f, teacher.regions[r], dim=0).item())
            assert match[s, t] == best
            assert (weight[s, t] == 0) == (crops[s] == t)
    assert weight.sum().item() == pytest.approx(1)


def test_matching_ignores_bf16_rounding_of_the_norm():
    student, teacher = features("m", LAYOUTS["two globals"]), features("n", LAYOUTS["two globals"])
    half = Features(student.view.bfloat16(), student.regions.bfloat16(), student.grids)
    targets = objective().float().targets(Features(teacher.view.float(), teacher.regions.float(), teacher.grids))
    exact = Features(student.view, half.regions.double(), student.grids)
    assert targets.features.dtype == torch.float32
    assert torch.equal(region_pairs(half, targets.features, B)[0], region_pairs(exact, targets.features, B)[0])


def test_view_pairs_leave_out_the_crop_itself():
    match, weight = view_pairs(4, B, torch.zeros(()))
    assert match.tolist() == [[b, B + b] for _ in range(4) for b in range(B)]
    pair = 1 / (6 * B)
    expected = [[0, pair]] * B + [[pair, 0]] * B + [[pair, pair]] * (2 * B)
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_region_loss_weights_crops_equally():
    """Each pair is a mean over its own regions: a global crop of 9 regions counts as a local of 4."""
    grids = LAYOUTS["one local size"]
    unit = F.normalize(features("n", grids[:1]).regions, dim=1).view(2 * B, 9, C)
    _, weight = region_pairs(features("m", grids), unit, B)
    per_crop = [x.sum().item() for x in weight.sum(1).split([9 * B, 9 * B, 4 * B, 4 * B, 4 * B])]
    assert per_crop == pytest.approx([1 / 8, 1 / 8, 2 / 8, 2 / 8, 2 / 8])


def test_without_regions_there_is_no_region_head():
    module = objective(regions=False)
    assert module.region_head is None
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"view_head"}
    module.discard()


def test_accumulated_micro_batches_equal_the_whole_batch():
    """Two halves share the old centre, and their mean gradient and centre update are those of the whole."""
    grids, temp = LAYOUTS["one local size"], 0.05
    teacher_module = objective(seed="t")
    student, teacher = features("a", grids), features("b", grids[:1])

    def half(f, image):
        parts = [
            x.view(n // B, B, -1, C)[:, image].reshape(-1, C) for x, (n, _, _) in zip(_split(f), f.grids, strict=True)
        ]
        small = [(n // B, h, w) for n, h, w in f.grids]
        return Features(views_of(torch.cat(parts), small), torch.cat(parts), small)

    whole, split = objective(), objective()
    whole(student, teacher_module.targets(teacher), temp)[0].backward()
    for image in range(B):
        targets = teacher_module.targets(half(teacher, image))
        (split(half(student, image), targets, temp)[0] / B).backward()
        assert split.view_center.values(targets.view.rows).abs().max() == 0
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)
    whole.commit()
    split.commit()
    assert whole.extra_state().keys() == {"view.values", "region.values"}
    for key, value in whole.extra_state().items():
        torch.testing.assert_close(split.extra_state()[key], value, rtol=0, atol=1e-12)


def test_centres_survive_a_checkpoint():
    module, grids = objective(), LAYOUTS["two globals"]
    targets = objective(seed="t").targets(features("b", grids))
    module(features("a", grids), targets, 0.05)
    module.commit()
    other = objective()
    other.load_extra_state(module.extra_state())
    first, second = (m(features("a", grids), targets, 0.05)[0] for m in (module, other))
    assert torch.equal(first, second)
    assert first != objective()(features("a", grids), targets, 0.05)[0]


def test_feature_spread_is_one_for_isotropic_and_zero_for_constant() -> None:
    torch.manual_seed(0)
    assert spread(torch.randn(4000, 64)).item() == pytest.approx(1, abs=0.02)
    assert spread(torch.randn(1, 64).expand(100, 64)).item() == pytest.approx(0, abs=1e-3)
    assert spread(torch.randn(1, 64) + 0.01 * torch.randn(100, 64)).item() < 0.05
