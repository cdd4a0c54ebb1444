"""Mixup and CutMix of pairs: against timm's, and the same for every division of a batch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup

from esvit_scale.data import mixing
from esvit_scale.data.mixing import Mixture

IMAGES, SIZE, CLASSES = 12, 15, 7


def of_batch(images: int = IMAGES, mixup: float = 0.8, cutmix: float = 1.0, batch_index: int = 5) -> Mixture:
    return mixing.draw(3, batch_index, torch.arange(images), SIZE, mixup, cutmix)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_images_and_labels_match_timms_pairs(monkeypatch: pytest.MonkeyPatch, mixup: float, cutmix: float) -> None:
    """With the same weights and boxes, images and soft labels are those of timm's `Mixup` in its mode "pair"."""
    images, labels = torch.randn(IMAGES, 3, SIZE, SIZE), torch.randint(CLASSES, (IMAGES,))
    mixture = of_batch(mixup=mixup, cutmix=cutmix)
    boxes = mixture.boxes[::2]
    of_box = (boxes[:, 1] - boxes[:, 0] > 0).numpy()
    pairs: Iterator[int] = iter(np.flatnonzero(of_box).tolist())

    def bbox(shape: object, lam: float, **_: object) -> tuple[tuple[int, ...], float]:
        pair = next(pairs)
        return tuple(boxes[pair].tolist()), mixture.own[2 * pair].item()

    monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", bbox)
    theirs = timm_mixup.Mixup(mixup or 1.0, cutmix, mode="pair", label_smoothing=0.1, num_classes=CLASSES)
    lam = np.where(of_box, 0.5, mixture.blend[::2].numpy()).astype(np.float32)  # with a box, any but 1
    monkeypatch.setattr(theirs, "_params_per_elem", lambda count: (lam.copy(), of_box))
    order = torch.tensor([*range(0, IMAGES, 2), *range(IMAGES - 1, 0, -2)])  # timm pairs the first with the last
    expected_images, expected_labels = theirs(images[order].clone(), labels[order])
    back = order.argsort()
    torch.testing.assert_close(mixing.mix_images(images, mixture), expected_images[back], rtol=0, atol=1e-6)
    soft = mixing.mix_labels(labels, mixture)
    dense = torch.zeros(IMAGES, CLASSES).scatter_add_(1, soft.classes, soft.weights)
    torch.testing.assert_close(0.9 * dense + 0.1 / CLASSES, expected_labels[back], rtol=0, atol=1e-6)


def test_parts_of_a_batch_are_mixed_as_the_whole_batch_is() -> None:
    images = torch.randn(IMAGES, 3, SIZE, SIZE)
    whole = mixing.mix_images(images, of_batch())
    parts = []
    for rows in (slice(0, 4), slice(4, 12)):
        part = mixing.draw(3, 5, torch.arange(IMAGES)[rows], SIZE, 0.8, 1.0)
        parts.append(mixing.mix_images(images[rows], part))
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(mixing.mix_images(images, of_batch(batch_index=6)), whole)


def test_weights_and_boxes_have_the_distributions_of_the_papers() -> None:
    """Beta(α, α) has mean ½ and variance 1 / (4 (2α + 1)); half of the pairs get a box; a label has the share of the pixels."""
    found = of_batch(3000)
    is_box = found.boxes[:, 1] > found.boxes[:, 0]
    assert is_box.double().mean() == pytest.approx(0.5, abs=0.04)
    blends = of_batch(3000, cutmix=0.0).blend[::2].double()
    assert blends.mean() == pytest.approx(0.5, abs=0.03)
    assert blends.var() == pytest.approx(1 / (4 * 2.6), rel=0.1)
    top, bottom, left, right = found.boxes.unbind(1)
    area = ((bottom - top) * (right - left)).double() / SIZE**2
    torch.testing.assert_close(found.own[is_box].double(), 1 - area[is_box], rtol=0, atol=1e-6)
    assert (found.boxes >= 0).all()
    assert (found.boxes <= SIZE).all()
