"""The fast evaluation crop against the exact one of torchvision, over photographs of several sizes and file formats."""

import numpy as np
import pytest
import skimage.data
from PIL import Image

from esvit_scale.data import evaluation_crop
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.evaluation_crop import centre_crop, decode_centre_crop, decode_whole, whole_image
from esvit_scale.data.picture import Picture, open_picture
from esvit_scale.data.pixel_format import RGB8
from tests.data.conftest import encoded


def photograph(name: str, short: int) -> Image.Image:
    image = Image.fromarray(getattr(skimage.data, name)())
    zoom = short / min(image.size)
    return image.resize((round(image.width * zoom), round(image.height * zoom)), Image.Resampling.BICUBIC)


def crops(data: bytes, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact and the fast crop [S, S, 3] as int64."""
    exact = centre_crop(decode(data), size).transpose(1, 2, 0).astype(int)
    fast = decode_centre_crop(data, size, RGB8).astype(int)
    assert fast.shape == exact.shape == (size, size, 3)
    return exact, fast


@pytest.mark.parametrize("name", ["chelsea", "astronaut", "coffee"])
@pytest.mark.parametrize(("short", "reduction"), [(400, 1), (1030, 2), (2050, 4)])
def test_crops_of_photographs_are_near_the_exact_ones(
    monkeypatch: pytest.MonkeyPatch, name: str, short: int, reduction: int
) -> None:
    asked: list[int] = []
    pixels = Picture.pixels

    def counted(self: Picture, wanted: int = 1) -> tuple[np.ndarray, int]:
        asked.append(wanted)
        return pixels(self, wanted)

    monkeypatch.setattr(Picture, "pixels", counted)
    exact, fast = crops(encoded(photograph(name, short), "JPEG", quality=92))
    assert asked == [reduction]
    difference = np.abs(fast - exact)
    if reduction == 1:  # the kernel's weights have 16 bits, Pillow's 22
        assert difference.max() <= 1
        assert difference.mean() < 0.02
    else:  # 0.17 to 0.52 was measured over four photographs
        assert difference.mean() < 0.7
    np.testing.assert_allclose(fast.mean((0, 1)), exact.mean((0, 1)), atol=0.1)
    np.testing.assert_allclose(fast.std((0, 1)), exact.std((0, 1)), rtol=0.01)


@pytest.mark.parametrize("shape", [(30, 40), (57, 31), (256, 256), (300, 4), (2000, 300)], ids=str)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_crops_of_small_and_long_images_are_near_the_exact_ones(shape: tuple[int, int], form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    exact, fast = crops(encoded(Image.fromarray(noise), form))
    assert np.abs(fast - exact).mean() < 0.5  # Pillow's two passes have another order in a long image of noise


@pytest.mark.parametrize("shape", [(16, n) for n in range(10, 30)] + [(n, 15) for n in range(10, 30)], ids=str)
def test_crops_are_right_at_every_ratio_of_sides(shape: tuple[int, int]) -> None:
    """Among them are those of which the crop needs as many source lines as it has."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    exact, fast = crops(encoded(Image.fromarray(noise)), 14)
    assert np.abs(fast - exact).mean() < 0.5


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_crops_of_other_colour_modes_are_near_the_exact_ones(mode: str) -> None:
    exact, fast = crops(encoded(photograph("chelsea", 600).convert(mode), "JPEG", quality=92))
    assert np.abs(fast - exact).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("short", [1100, 1103, 2049])
def test_crops_of_reduced_images_are_upright(short: int, orientation: int) -> None:
    """Also where the reduction does not divide the sides: what libjpeg adds at the end must not move the crop."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact, fast = crops(encoded(photograph("astronaut", short), "JPEG", quality=92, exif=exif))
    assert np.abs(fast - exact).mean() < 0.7


@pytest.mark.parametrize(("side", "reduction"), [(2064, 4), (2058, 2), (2049, 1)])
def test_turned_images_are_reduced_by_divisors_of_their_sides(
    monkeypatch: pytest.MonkeyPatch, side: int, reduction: int
) -> None:
    asked: list[int] = []
    pixels = Picture.pixels
    monkeypatch.setattr(Picture, "pixels", lambda self, wanted=1: asked.append(wanted) or pixels(self, wanted))
    exif = Image.Exif()
    exif[0x0112] = 6
    crops(encoded(Image.new("RGB", (side, side)), "JPEG", exif=exif))
    assert asked == [reduction]


def test_very_long_images_are_cropped_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_crop, "LONG_SIDE", 500)
    exact, fast = crops(encoded(photograph("chelsea", 100).resize((900, 100)), "JPEG", quality=92))
    np.testing.assert_array_equal(fast, exact)


def test_damaged_files_are_bad_images() -> None:
    data = encoded(photograph("chelsea", 1100), "JPEG", quality=92)
    assert open_picture(data).height == 1100
    with pytest.raises(BadImage):
        decode_centre_crop(data[: len(data) // 2], 224, RGB8)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize(("width", "height"), [(28, 28), (57, 31), (451, 601)])
def test_whole_images_are_resized_to_the_square(width: int, height: int, form: str) -> None:
    data = encoded(photograph("chelsea", 300).resize((width, height)), form)
    exact = np.asarray(decode(data).resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    fast = decode_whole(data, 32, RGB8).astype(int)
    difference = np.abs(fast - exact)
    # A large JPEG is decoded at an eighth, whose last pixels are cut where 8 does not divide the sides.
    assert difference.mean() < (0.7 if form == "JPEG" and width > 400 else 1e-9)
    assert (whole_image(decode(data), 32).transpose(1, 2, 0) == exact).all()


def test_whole_arrays_are_resized_to_the_square() -> None:
    halves = np.zeros((20, 50, 2), np.uint16)
    halves[:, 25:, 1] = 1000
    found = whole_image(halves, 10)
    assert found.shape == (2, 10, 10)
    assert (found[0] == 0).all()
    assert (found[1, :, 0] == 0).all()
    assert (found[1, :, -1] == 1000).all()
