"""Turbo decoding against Pillow's, pixel for pixel, and what is refused or left to Pillow."""

import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from esvit_scale.data import picture as pictures
from esvit_scale.data.decode import BadImage, decode
from esvit_scale.data.picture import open_picture
from tests.data.conftest import encoded, picture


@pytest.fixture(params=["simplejpeg", "pillow"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(pictures, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.chelsea())  # 451 x 300


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}], ids=str)
def test_the_pixels_are_pillows(library: str, mode: str, options: dict[str, int]) -> None:
    data = encoded(photograph().convert(mode), "JPEG", quality=85, **options)
    found = open_picture(data)
    assert (found.width, found.height) == (451, 300)
    pixels, reduction = found.pixels(1)
    assert reduction == 1
    np.testing.assert_array_equal(pixels, np.asarray(decode(data)))


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_scaled_decoding_is_pillows_draft(library: str, reduction: int) -> None:
    data = encoded(photograph(), "JPEG", quality=90)
    pixels, found = open_picture(data).pixels(reduction)
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (451 // reduction, 300 // reduction))
    assert found == reduction
    np.testing.assert_array_equal(pixels, np.asarray(draft))
    assert pixels.shape == (-(-300 // reduction), -(-451 // reduction), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(library: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(0, 32, 16), "JPEG", exif=exif, quality=95)
    found = open_picture(data)
    pixels, _ = found.pixels(1)
    assert pixels.shape[:2] == (found.height, found.width)
    np.testing.assert_array_equal(pixels, np.asarray(decode(data)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_decoded_whole(kind: str) -> None:
    data = encoded(picture(1), kind)
    pixels, reduction = open_picture(data).pixels(4)
    assert reduction == 1
    np.testing.assert_array_equal(pixels, np.asarray(decode(data)))


def test_harmless_damage_is_pillows_to_judge() -> None:
    """Junk between segments is a mere warning for Pillow; libjpeg-turbo's strict mode would drop the picture."""
    data = encoded(photograph(), "JPEG")
    junk = data[:-2] + b"\x00\x00\x00" + data[-2:]
    np.testing.assert_array_equal(open_picture(junk).pixels(1)[0], np.asarray(decode(junk)))


@pytest.mark.parametrize("keep", [0.5, 0.97])
def test_truncated_files_are_bad(library: str, keep: float) -> None:
    data = encoded(photograph(), "JPEG")
    with pytest.raises(BadImage, match="truncated"):
        open_picture(data[: int(len(data) * keep)]).pixels(2)


def test_a_thousand_scans_are_a_bomb() -> None:
    data = encoded(photograph(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="scans"):
        open_picture(data[:-2] + data[scan:-2] * 300 + data[-2:])
    with pytest.raises(BadImage, match="empty"):
        open_picture(b"")
