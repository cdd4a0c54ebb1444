import io

import numpy as np
import pytest
from PIL import Image

from esvit_scale.data import samples
from esvit_scale.errors import UserError


@pytest.fixture(scope="module")
def cut() -> tuple[list[samples.Sample], list[samples.Sample]]:
    return samples.demo_samples(size=32, train=4, test=2)


def test_samples_have_expected_counts_classes_and_order(cut: tuple[list[samples.Sample], list[samples.Sample]]) -> None:
    n = len(samples.CLASSES)
    assert n == 20
    for part, each in zip(cut, (4, 2), strict=True):
        assert [s.label for s in part] == list(range(n)) * each
        assert len({s.key for s in part}) == len(part)
        assert all(Image.open(io.BytesIO(s.data)).size == (32, 32) for s in part)
    assert not {s.key for s in cut[0]} & {s.key for s in cut[1]}


def test_samples_are_reproducible(cut: tuple[list[samples.Sample], list[samples.Sample]]) -> None:
    assert samples.demo_samples(size=32, train=4, test=2) == cut
    assert samples.demo_samples(size=32, train=4, test=2, seed=1) != cut


@pytest.mark.parametrize("name", samples.CLASSES)
def test_train_and_test_share_no_pixel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs replaced by pictures of their own coordinates."""
    height, width, channels = samples.photograph(name).shape
    assert channels == 3
    numbers = np.arange(height * width).reshape(height, width)
    coordinates = np.stack([numbers >> 16, numbers >> 8 & 255, numbers & 255], 2).astype(np.uint8)
    monkeypatch.setattr(samples, "photograph", lambda _: coordinates)
    monkeypatch.setattr(samples, "CLASSES", (name,))

    def pixels(part: list[samples.Sample]) -> set[int]:
        stack = np.stack([np.asarray(Image.open(io.BytesIO(s.data))).astype(int) for s in part])
        return set((stack[..., 0] << 16 | stack[..., 1] << 8 | stack[..., 2]).ravel().tolist())

    train, test = (pixels(part) for part in samples.demo_samples(size=64, train=20, test=20))
    assert train
    assert test
    assert not train & test


def test_patches_larger_than_half_a_photograph_are_an_error() -> None:
    with pytest.raises(UserError, match=r"half of .* has .*; use"):
        samples.demo_samples(size=400, train=1, test=1)
