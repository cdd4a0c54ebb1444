import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from esvit_scale.data.crops import crop_box, keyed_generator, random_crop


def statistics(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Mean and deviation of area share, log aspect and centre. Boxes are (left, top, w, h)."""
    left, top, w, h = boxes.T.astype(float)
    columns = [w * h / (width * height), np.log(w / h), (left + w / 2) / width, (top + h / 2) / height]
    return np.array([[c.mean(), c.std()] for c in columns])


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize(("width", "height"), [(200, 150), (60, 300)])
def test_boxes_are_distributed_as_torchvisions(scale: tuple[float, float], width: int, height: int) -> None:
    n = 4000
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = []
    for _ in range(n):
        top, left, h, w = RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3])
        theirs.append((left, top, w, h))
    ours = []
    for i in range(n):
        left, top, right, bottom = crop_box(keyed_generator(0, 0, f"k{i}", 0), width, height, scale)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        ours.append((left, top, right - left, bottom - top))
    a, b = statistics(np.array(ours), width, height), statistics(np.array(theirs), width, height)
    error = np.maximum(a[:, 1], b[:, 1])[:, None] / np.sqrt(n) + 1e-9  # of a mean
    assert (np.abs(a - b) < 5.5 * error).all(), (a, b)


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (4, 4)])
def test_extreme_shapes_fall_back_to_the_centre_as_torchvision(width: int, height: int) -> None:
    box = crop_box(keyed_generator(0, 0, "x", 0), width, height, (1.0, 1.0))
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert box == (left, top, left + w, top + h)


def crop(image: Image.Image, seed: int = 0, epoch: int = 0, key: str = "k", number: int = 0) -> np.ndarray:
    out = np.empty((3, 12, 12), np.uint8)
    random_crop(keyed_generator(seed, epoch, key, number), image, (0.3, 0.9), out)
    return out


def test_a_crop_depends_on_its_key_alone() -> None:
    image = picture(0, 40, 30)
    first = crop(image)
    for _ in range(3):
        np.random.default_rng().random()
        np.testing.assert_array_equal(crop(image), first)
    others = [crop(image, seed=1), crop(image, epoch=1), crop(image, key="j"), crop(image, number=1)]
    assert all((other != first).any() for other in others)


def test_pixels_are_torchvisions_crop_then_resize_then_flip() -> None:
    image = picture(3, 60, 45)
    flips = 0
    for i in range(200):
        out = np.empty((3, 16, 16), np.uint8)
        random_crop(keyed_generator(0, 0, str(i), 0), image, (0.2, 1.0), out)
        box = crop_box(keyed_generator(0, 0, str(i), 0), *image.size, (0.2, 1.0))
        plain = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        flipped = (out == plain[:, :, ::-1]).all()
        assert flipped or (out == plain).all()
        flips += bool(flipped)
    assert 70 < flips < 130


def test_keys_of_any_text_work() -> None:
    assert keyed_generator(0, 0, "日本/\udcff", 0).random() != keyed_generator(0, 0, "日本/\udcfe", 0).random()
