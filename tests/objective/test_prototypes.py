"""The fused cross-entropy against the slow algorithm of its docstring, in float64."""

import pytest
import torch
from torch.nn import functional as F

from esvit_scale.models.heads import ProjectionHead
from esvit_scale.objective import prototype_tiles
from esvit_scale.objective.prototype_tiles import TilePasses
from esvit_scale.objective.prototypes import prototype_cross_entropy

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


def problem(students=11, teachers=5, matches=2, k=23, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    match = torch.randint(teachers, (students, matches), generator=generator)
    weight = torch.rand(students, matches, dtype=torch.float64, generator=generator)
    weight[2, 0] = 0
    given = [F.normalize(random(students, d), dim=1), 0.3 * random(k, d), F.normalize(random(teachers, d), dim=1)]
    given += [0.3 * random(k, d), 0.1 * random(k)]
    return *(x.to(dtype) for x in given), match, weight


def slow(z_s, rows_s, z_t, rows_t, center, match, weight):
    loss = z_s.new_zeros(())
    for s in range(len(z_s)):
        q = F.log_softmax(rows_s @ z_s[s] / STUDENT_TEMP, dim=0)
        for m in range(match.shape[1]):
            p = F.softmax((rows_t @ z_t[match[s, m]] - center) / TEACHER_TEMP, dim=0)
            for k in range(len(p)):
                loss = loss - weight[s, m] * p[k] * q[k]
    return loss


def fused(*given, tile=None):
    return prototype_cross_entropy(*given, STUDENT_TEMP, TEACHER_TEMP, TilePasses(tile))  # type: ignore[call-arg]


def with_gradient(given):
    return [x.detach().clone().requires_grad_() if i < 2 else x for i, x in enumerate(given)]


@pytest.mark.parametrize("tile", [1, 5, 22, 100])
@pytest.mark.parametrize("matches", [1, 2, 3])
def test_loss_and_gradients_match_slow_reference(tile, matches):
    given = problem(matches=matches)
    ours, theirs = with_gradient(given), with_gradient(given)
    loss, expected = fused(*ours, tile=tile)[0], slow(*theirs)
    (3 * loss).backward()
    (3 * expected).backward()
    assert abs(loss.item() - expected.item()) < 1e-9
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-9)


def test_gradients_reach_features_directions_and_gains():
    head = ProjectionHead(7, 9, 6, 23).double()
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 1.5)
    _, _, z_t, rows_t, center, match, weight = problem()
    features = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    leaves = [features, *head.parameters()]
    ours = head.last_layer(head(features), lambda z, rows: fused(z, rows, z_t, rows_t, center, match, weight)[0])
    v, g = head.last_layer.weight_v, head.last_layer.weight_g
    expected = slow(head(features), g * v / v.norm(dim=1, keepdim=True), z_t, rows_t, center, match, weight)
    assert abs(ours.item() - expected.item()) < 1e-9
    got, right = torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_teacher_gets_no_gradient():
    given = [x.clone().requires_grad_() if x.is_floating_point() else x for x in problem()]
    loss, entropies = fused(*given)
    loss.backward()
    assert [x.grad is not None for x in given if x.is_floating_point()] == [True, True, False, False, False, False]
    assert not any(entropy.requires_grad for entropy in entropies)


def test_gradients_accumulate_and_scale_with_the_upstream_gradient():
    given = with_gradient(problem())
    fused(*given)[0].backward()
    once = [x.grad.clone() for x in given[:2]]
    (0.5 * fused(*given)[0]).backward()
    for x, g in zip(given[:2], once, strict=True):
        torch.testing.assert_close(x.grad, 1.5 * g)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_required_gradients_are_computed(frozen):
    given = with_gradient(problem())
    full = with_gradient(given)
    given[frozen] = given[frozen].detach()
    fused(*given)[0].backward()
    fused(*full)[0].backward()
    assert given[frozen].grad is None
    torch.testing.assert_close(given[1 - frozen].grad, full[1 - frozen].grad)
    with torch.no_grad():
        torch.testing.assert_close(fused(*full)[0], fused(*given)[0].detach())


def test_entropies_match_definition():
    z_s, rows_s, z_t, rows_t, center, _, _ = given = problem()
    p = F.softmax((z_t @ rows_t.T - center) / TEACHER_TEMP, dim=1)
    q = F.softmax(z_s @ rows_s.T / STUDENT_TEMP, dim=1)
    entropies = fused(*given, tile=2)[1]
    torch.testing.assert_close(entropies.teacher, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(entropies.student, -(q * q.log()).sum(1).mean())
    torch.testing.assert_close(entropies.usage, -(p.mean(0) * p.mean(0).log()).sum())


def test_fp16_is_multiplied_in_bf16():
    """1/K and smaller numbers are nothing in fp16."""
    given = problem(k=200, d=32, dtype=torch.float32)
    half = [x.half() if i in (0, 2) else x.bfloat16() if i in (1, 3) else x for i, x in enumerate(given)]
    half[0].requires_grad_()
    loss, _ = fused(*half)
    (256 * loss).backward()  # fp16's loss scale
    wide = with_gradient(given)
    fused(*wide)[0].backward()
    assert half[0].grad.dtype == torch.float16
    assert F.cosine_similarity(half[0].grad.float().flatten(), wide[0].grad.flatten(), dim=0) > 0.995


def test_sharp_teacher_and_large_gains_stay_finite():
    z_s, rows_s, z_t, rows_t, center, match, weight = problem(dtype=torch.float32)
    given = with_gradient([z_s, 300 * rows_s, z_t, 300 * rows_t, center, match, weight])
    loss, entropies = prototype_cross_entropy(*given, STUDENT_TEMP, 1e-3)  # type: ignore[call-arg]
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, *entropies, given[0].grad, given[1].grad))


def test_bf16_multiplies_in_bf16_and_sums_in_fp32():
    exact = with_gradient(problem(students=64, k=200, d=32, dtype=torch.float32))
    half = [x.detach().bfloat16() if i in (0, 2) else x for i, x in enumerate(exact)]
    half[0].requires_grad_()
    half[1] = half[1].detach().requires_grad_()
    (loss, _), (expected, _) = fused(*half, tile=7), fused(*exact)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert half[1].grad.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for a, b in zip(half[:2], exact[:2], strict=True):
        assert F.cosine_similarity(a.grad.float().flatten(), b.grad.flatten(), dim=0) > 0.995


def test_no_tensor_exceeds_a_tile():
    """The largest tensor made is tokens × tile; what is kept for the backward is K × D and tokens × D."""
    k, d, students, teachers, tile = 512, 4, 300, 50, 8
    given = with_gradient(problem(students=students, teachers=teachers, k=k, d=d, dtype=torch.float32))
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    with Watch():
        loss, _ = fused(*given, tile=tile)
    assert max(made) <= max((students + teachers) * tile, k * d, (students + teachers) * d)
    assert sorted(x.numel() for x in loss.grad_fn.gradients) == [students * d, k * d]


def test_second_backward_is_refused():
    loss, _ = fused(*with_gradient(problem()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("tokens", [1, 70, 1072, 10**7])
def test_tile_size_stays_within_its_budget(tokens):
    tile = prototype_tiles.tile_size(tokens, torch.device("cpu"))
    assert tile % prototype_tiles.NARROWEST_TILE == 0
    assert tile == prototype_tiles.NARROWEST_TILE or 4 * tokens * tile <= prototype_tiles.CPU_TILE_BYTES
    assert 4 * tokens * (tile + prototype_tiles.NARROWEST_TILE) > prototype_tiles.CPU_TILE_BYTES
