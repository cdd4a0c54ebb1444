"""Many heads in one pass against torch's own optimizer on one head at a time."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esvit_scale.evaluate import linear_heads
from esvit_scale.evaluate.linear_heads import (
    GRID,
    OFFICIAL,
    HeadConfig,
    LabelledBatch,
    LinearHeads,
    accuracies,
    head_scores,
    train,
)

DIM, WIDTH, CLASSES, BATCH = 3, 8, 4, 10


def data(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return torch.randn(n, 2, WIDTH, generator=generator) + 2 * F.one_hot(labels, WIDTH)[:, None], labels


def batches(epoch: int) -> Iterator[LabelledBatch]:
    x, y = data()
    for i in range(0, len(y), BATCH):
        yield LabelledBatch(x[i : i + BATCH], y[i : i + BATCH], BATCH)


def plain(head: HeadConfig, weight: torch.Tensor, epochs: int) -> nn.Linear:
    """The protocol, one head: torch's SGD and its cosine schedule, stepped per epoch."""
    linear = nn.Linear(weight.shape[1], CLASSES)
    linear.weight.data.copy_(weight)
    linear.bias.data.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), head.lr * BATCH / 256, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
    for epoch in range(epochs):
        for x, y, _ in batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(linear(pooled(x, head)), y).backward()
            optimizer.step()
        scheduler.step()
    return linear


def pooled(x: torch.Tensor, head: HeadConfig) -> torch.Tensor:
    parts = [x[:, 0], x[:, 1]] if head.pooling == "mean+max" else [x[:, 0]]
    return torch.cat([p[:, -DIM:] if head.blocks == 1 else p for p in parts], 1)


def test_heads_trained_together_equal_heads_trained_alone() -> None:
    several = tuple(
        HeadConfig(lr, blocks, pooling) for blocks in (1, 4) for pooling in ("mean", "mean+max") for lr in (1, 5)
    )
    heads = LinearHeads(several, DIM, WIDTH, CLASSES, seed=0)
    first = {name: linear.weight.detach().clone() for name, linear in heads.linear.items()}
    train(heads, 5, BATCH, batches)
    x, y = data()
    found = accuracies(heads, x, y)
    for i, head in enumerate(several):
        name = f"{head.blocks} {head.pooling}"
        place = heads.members[name].index(i)
        alone = plain(head, first[name][place * CLASSES : (place + 1) * CLASSES], epochs=5)
        expected = alone(pooled(x, head))
        assert torch.allclose(head_scores(heads, i, x), expected, atol=1e-4)
        assert found[i] == pytest.approx(100 * float((expected.argmax(1) == y).double().mean()))
    assert found.max() > 70


def test_heads_are_initialized_as_the_protocol_says() -> None:
    linear = LinearHeads((OFFICIAL,), 768, 2304, 100, seed=0).linear["4 mean"]
    assert linear.weight.shape == (100, 2304)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not linear.bias.any()
    assert HeadConfig(1e-3, 4, "mean") == OFFICIAL
    assert len(GRID) == 52
    assert {h.lr for h in GRID} == set(linear_heads.LEARNING_RATES)


def test_diverged_head_does_not_affect_others() -> None:
    calm, wild = HeadConfig(1, 4, "mean"), HeadConfig(1e38, 4, "mean")
    both = LinearHeads((calm, wild), DIM, WIDTH, CLASSES, seed=0)
    train(both, 5, BATCH, batches)
    x, y = data()
    found = accuracies(both, x, y)
    assert not head_scores(both, 1, x).isfinite().all()
    assert found[1] == 0 < 70 < found[0]


def test_unequal_rank_parts_are_weighted_by_the_global_batch() -> None:
    """As on a rank that got fewer images: each loss is divided by the global batch's size."""

    def parts(epoch: int) -> Iterator[LabelledBatch]:
        for x, y, size in batches(epoch):
            yield LabelledBatch(x.repeat(2, 1, 1), y.repeat(2), 2 * size)
            yield LabelledBatch(x[:0], y[:0], size)

    once, twice = (LinearHeads((HeadConfig(0.5, 4, "mean"),), DIM, WIDTH, CLASSES, seed=0) for _ in range(2))
    train(once, 1, BATCH, batches)
    linear_heads.MOMENTUM, momentum = 0.0, linear_heads.MOMENTUM
    try:
        once, twice = (LinearHeads((HeadConfig(0.5, 4, "mean"),), DIM, WIDTH, CLASSES, seed=0) for _ in range(2))
        train(once, 1, BATCH, batches)
        train(twice, 1, BATCH, parts)
    finally:
        linear_heads.MOMENTUM = momentum
    x, _ = data()
    assert torch.allclose(head_scores(once, 0, x), head_scores(twice, 0, x), atol=1e-6)
