"""Index plans against a slow description of what Swin does to one padded, rolled map."""

import itertools

import pytest
import torch

from esvit_scale.models.windows import MASKED, merge_plan, storage_plan, window_partition, window_plan, window_reverse

CPU = torch.device("cpu")
LAYOUTS = [((2, 8, 8),), ((1, 7, 7), (2, 5, 6)), ((2, 8, 8), (3, 4, 4), (1, 3, 9)), ((2, 1, 1), (1, 2, 2))]


@pytest.mark.parametrize("grids", LAYOUTS)
@pytest.mark.parametrize(("window", "shift"), [(4, 0), (4, 2), (7, 3), (3, 1), (1, 0)])
def test_window_partition_and_mask_match_swin(grids, window, shift):
    plan = window_plan(grids, window, shift, CPU)
    ids = window_reverse(torch.arange(sum(n * h * w for n, h, w in grids))[:, None], storage_plan(grids, window, CPU))
    # ids[row-major] = place in the stage's order; invert to describe slots by row-major token
    row_major = torch.empty_like(ids[:, 0])
    row_major[ids[:, 0]] = torch.arange(len(ids))
    slots = torch.where(
        torch.ones(len(plan.slots.tokens), dtype=torch.bool).index_fill(0, plan.slots.pads, False),
        row_major[plan.slots.tokens],
        -1,
    ).view(-1, window * window)
    assert sorted(slots[slots >= 0].tolist()) == list(range(len(ids)))
    masks = {i: torch.zeros(window**2, window**2) for i in range(len(slots))}
    for first, end, mask in plan.masks:
        masks |= dict.fromkeys(range(first, end), mask)
    ours = sorted((s.tolist(), masks[i].tolist()) for i, s in enumerate(slots))
    assert ours == sorted(_slow_windows(grids, window, shift))


def _slow_windows(grids, window, shift):
    found, first = [], 0
    for n, h, w in grids:
        hp, wp = -(-h // window) * window, -(-w // window) * window
        region = lambda i, size: 0 if i < size - window else 1 if i < size - shift or not shift else 2  # noqa: E731
        for crop in range(n):
            for y0, x0 in itertools.product(range(0, hp, window), range(0, wp, window)):
                cells, labels = [], []
                for y, x in itertools.product(range(y0, y0 + window), range(x0, x0 + window)):
                    sy, sx = (y + shift) % hp, (x + shift) % wp
                    cells.append(first + crop * h * w + sy * w + sx if sy < h and sx < w else -1)
                    labels.append((region(y, hp), region(x, wp)))
                mask = [[0.0 if a == b or not shift else MASKED for b in labels] for a in labels]
                found.append((cells, mask))
        first += n * h * w
    return found


def test_layout_divisible_by_the_window_is_a_view():
    assert window_plan(((2, 8, 8), (4, 4, 4)), 4, 0, CPU).slots.identity
    assert not window_plan(((2, 8, 8), (4, 4, 4)), 4, 2, CPU).slots.identity
    assert not window_plan(((2, 8, 8), (4, 3, 3)), 4, 0, CPU).slots.identity


def test_patch_merging_order_and_padding_match_swin():
    grids = ((1, 3, 3),)
    tokens = window_partition(torch.arange(1.0, 10).view(9, 1), storage_plan(grids, 2, CPU))
    quads = window_partition(tokens, merge_plan(grids, 2, 2, CPU)).view(-1, 4)
    assert quads.tolist() == [[1, 4, 2, 5], [3, 6, 0, 0], [7, 0, 8, 0], [9, 0, 0, 0]]


@pytest.mark.parametrize("fill", [False, True])
def test_partition_and_reverse_pass_gradcheck(fill):
    plan = window_plan(((2, 3, 5), (1, 2, 2)), 4, 2, CPU).slots
    tokens = torch.randn(len(plan.inverse), 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, b: window_partition(t, plan, b if fill else None), (tokens, bias))
    slots = torch.randn(len(plan.tokens), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: window_reverse(s, plan), (slots,))
    assert torch.equal(window_reverse(window_partition(tokens, plan), plan), tokens)
