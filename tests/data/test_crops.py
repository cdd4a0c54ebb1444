import io

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from esvit_scale.config import validate
from esvit_scale.data.crops import Box, ImagePyramid, choose_reductions, crop_box, keyed_generator
from esvit_scale.data.worker_batch import PlacedCrop, decode_for_crops, place_crops
from tests.data.conftest import config_with, encoded, picture


def statistics(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Mean and deviation of area share, log aspect and centre. Boxes are (left, top, w, h)."""
    left, top, w, h = boxes.T.astype(float)
    columns = [w * h / (width * height), np.log(w / h), (left + w / 2) / width, (top + h / 2) / height]
    return np.array([[c.mean(), c.std()] for c in columns])


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize(("width", "height"), [(200, 150), (60, 300)])
def test_box_distribution_matches_torchvision(scale: tuple[float, float], width: int, height: int) -> None:
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
def test_extreme_shapes_fall_back_to_the_centre_like_torchvision(width: int, height: int) -> None:
    box = crop_box(keyed_generator(0, 0, "x", 0), width, height, (1.0, 1.0))
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3])
    assert box == (left, top, left + w, top + h)


def cut(image: Image.Image, box: Box, size: int, reduction: int = 1, flip: bool = False) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    ImagePyramid(np.array(image), 1).cut(box, reduction, flip, out)
    return out


def views(seed: int = 0, epoch: int = 0, key: str = "k") -> list[PlacedCrop]:
    return place_crops(config_with(seed=seed), epoch, key, 40, 30)


def test_crops_depend_on_their_key_alone() -> None:
    first = views()
    for _ in range(3):
        np.random.default_rng().random()
        assert views() == first
    assert len(set(first)) == 5
    for other in (views(seed=1), views(epoch=1), views(key="j")):
        assert not set(other) & set(first)


def test_half_of_the_crops_are_mirrored() -> None:
    flips = sum(view.flip for i in range(400) for view in views(key=str(i)))
    assert abs(flips - 1000) < 4.5 * np.sqrt(2000 / 4)


def photograph() -> Image.Image:
    """Real texture: a smooth picture would hide a wrong filter."""
    return Image.fromarray(skimage.data.coffee())  # 600 x 400


@pytest.mark.parametrize("image", [picture(3, 60, 45), photograph()], ids=["smooth", "photograph"])
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_equal_torchvision_crop_resize_flip(image: Image.Image, flip: bool) -> None:
    """Up and down, to Pillow's rounding."""
    for i in range(20):
        box = crop_box(keyed_generator(0, 0, str(i), 0), *image.size, (0.05, 1.0))
        for size in (16, 96):
            plain = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
            error = np.abs(cut(image, box, size, flip=flip) - (plain[:, ::-1] if flip else plain))
            assert error.mean() < 0.1
            assert error.max() <= 8  # in a channel of a pixel or two, where a weight is rounded the other way


def test_crop_of_output_size_is_copied() -> None:
    image = picture(0, 40, 30)
    np.testing.assert_array_equal(cut(image, (3, 4, 19, 20), 16), np.asarray(image)[4:20, 3:19])


def test_reductions_keep_enough_pixels_per_output_pixel() -> None:
    whole, small = (0, 0, 2000, 1500), (100, 100, 300, 300)
    assert choose_reductions([whole, whole], [224, 96], 2000, 1500) == [4, 4]
    assert choose_reductions([whole, whole, whole], [224, 96, 96], 2000, 1500) == [4, 8, 8]
    assert choose_reductions([whole, small], [224, 96], 2000, 1500) == [1, 1]  # a copy would cost more than it saves
    assert choose_reductions([whole, whole, small], [224, 224, 96], 2000, 1500) == [4, 4, 1]
    assert choose_reductions([(0, 0, 300, 300)], [224], 500, 375) == [1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_all_crops_together_differ_little_from_a_resize_of_the_whole_picture(kind: str) -> None:
    """Mean error over 200 samples' crops of large photographs, reduced copies included: at most 1/255."""
    big = photograph().resize((1800, 1200), Image.Resampling.BICUBIC)
    rng = np.random.default_rng(0)
    grain = Image.fromarray((np.asarray(big) * 0.9 + rng.integers(0, 25, (1200, 1800, 1))).astype(np.uint8))
    data = encoded(grain, kind, **({"quality": 92} if kind == "JPEG" else {}))
    config = validate({"data": {"global_crops": {"size": 96}, "local_crops": [{"size": 48, "count": 4}]}}, "test")
    decoded = Image.open(io.BytesIO(data)).convert("RGB")
    errors, reduced = [], 0
    for key in map(str, range(6)):
        crops, reductions, pyramid = decode_for_crops(config, 0, key, data)
        for crop, r, size in zip(crops, reductions, config.crop_sizes, strict=True):
            reduced += r > 1
            out = np.empty((size, size, 3), np.uint8)
            pyramid.cut(crop.box, r, crop.flip, out)
            snapped = tuple(min(round(x / r) * r, limit) for x, limit in zip(crop.box, decoded.size * 2, strict=True))
            plain = np.asarray(decoded.crop(snapped).resize((size, size), Image.Resampling.BICUBIC)).astype(int)
            errors.append(np.abs(out - (plain[:, ::-1] if crop.flip else plain)).mean())
    assert reduced >= len(errors) / 2
    assert np.mean(errors) < 1
    assert max(errors) < 2.5


def test_keyed_generator_accepts_any_text() -> None:
    assert keyed_generator(0, 0, "日本/\udcff", 0).random() != keyed_generator(0, 0, "日本/\udcfe", 0).random()
