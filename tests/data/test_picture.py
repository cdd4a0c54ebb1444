"""Turbo decoding against Pillow's, pixel for pixel, and what is refused or left to Pillow."""

import base64
import io
import struct

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
def test_pixels_equal_pillow(library: str, mode: str, options: dict[str, int]) -> None:
    data = encoded(photograph().convert(mode), "JPEG", quality=85, **options)
    found = open_picture(data)
    assert (found.width, found.height) == (451, 300)
    pixels, reduction = found.pixels(1)
    assert reduction == 1
    np.testing.assert_array_equal(pixels, np.asarray(decode(data)))


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_scaled_decoding_equals_pillow_draft(library: str, reduction: int) -> None:
    data = encoded(photograph(), "JPEG", quality=90)
    pixels, found = open_picture(data).pixels(reduction)
    draft = Image.open(io.BytesIO(data))
    draft.draft("RGB", (451 // reduction, 300 // reduction))
    assert found == reduction
    np.testing.assert_array_equal(pixels, np.asarray(draft))
    assert pixels.shape == (-(-300 // reduction), -(-451 // reduction), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(library: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(0, 32, 16), "JPEG", exif=exif, quality=95)
    found = open_picture(data)
    pixels, _ = found.pixels(1)
    assert pixels.shape[:2] == (found.height, found.width)
    np.testing.assert_array_equal(pixels, np.asarray(decode(data)))


def lossless_jpeg(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W] or [H, W, C] as ITU-T T.81 process 14: the left neighbour predicts, all codes have 5 bits."""
    values = np.atleast_3d(pixels).astype(int)
    predicted = np.full_like(values, 128)
    predicted[:, 1:], predicted[1:, 0] = values[:, :-1], values[:-1, 0]
    bits = ""
    for d in (values - predicted).ravel().tolist():
        n = abs(d).bit_length()
        bits += f"{n:05b}" + (f"{d if d > 0 else d + (1 << n) - 1:0{n}b}" if n else "")
    bits += "1" * (-len(bits) % 8)
    height, width, channels = values.shape
    segments = [
        (
            0xC3,
            struct.pack(">BHHB", 8, height, width, channels) + b"".join(b"%c\x11\0" % (i + 1) for i in range(channels)),
        ),
        (0xC4, bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])),
        (0xDA, bytes([channels, *(b for i in range(channels) for b in (i + 1, 0)), 1, 0, 0])),
    ]
    head = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


ARITHMETIC_JPEG = base64.b64decode(  # 48 x 32, of cjpeg -arithmetic -quality 75
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQNDAsLDBkSEw8UHRofHh0aHBwgJC4nICIsIxwcKDcpLDAxNDQ0Hyc5PT"
    "gyPC4zNDL/2wBDAQkJCQwLDBgNDRgyIRwhMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjIyMjL/yQARCAAgADAD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AM/wam3kyHYZdqatWEu4MPo7uC6YgPX/AIS14FN/9AALnBpTuifgwGhFlapdULeBeY"
    "o1bBajU523tN9dWYBp4SgfTGKLdoTKJ+OsrTYF1bkEzBFsd1H6BfGhI0b08s+7q8ai9zm1byyzCtz/2Q=="
)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["lossless grey", "lossless", "arithmetic", "CMYK", "stored as RGB", "4:1:1"])
def test_accepted_images_decode_at_every_reduction(library: str, kind: str, reduction: int) -> None:
    photo = photograph().crop((0, 0, 64, 48))
    data = {
        "lossless grey": lambda: lossless_jpeg(np.asarray(photo.convert("L"))),
        "lossless": lambda: lossless_jpeg(np.asarray(photo)),
        "arithmetic": lambda: ARITHMETIC_JPEG,
        "CMYK": lambda: encoded(photo.convert("CMYK"), "JPEG", progressive=True),
        "stored as RGB": lambda: encoded(photo, "JPEG", keep_rgb=True),
        "4:1:1": lambda: encoded(photo, "JPEG", subsampling="4:1:1"),
    }[kind]()
    accepted = np.asarray(decode(data))
    pixels, found = open_picture(data).pixels(reduction)
    assert pixels.shape[:2] == (-(-accepted.shape[0] // found), -(-accepted.shape[1] // found))
    if found == 1:
        np.testing.assert_array_equal(pixels, accepted)
    else:
        assert found == reduction
        assert abs(pixels.mean() - accepted.mean()) < 2
    if kind == "lossless grey":
        np.testing.assert_array_equal(pixels[:, :, 0], np.asarray(photo.convert("L")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_other_formats_is_applied(kind: str, orientation: int) -> None:
    stored = np.asarray(picture(0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = stored.transpose(1, 0, 2) if orientation > 4 else stored  # TIFF 6.0: what is row 0 and column 0
    upright = upright[::-1] if orientation in (3, 4, 7, 8) else upright
    upright = upright[:, ::-1] if orientation in (2, 3, 6, 7) else upright
    found = open_picture(data)
    assert (found.width, found.height) == (upright.shape[1], upright.shape[0])
    np.testing.assert_array_equal(found.pixels(1)[0], upright)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_decoded_whole(kind: str) -> None:
    data = encoded(picture(1), kind)
    pixels, reduction = open_picture(data).pixels(4)
    assert reduction == 1
    np.testing.assert_array_equal(pixels, np.asarray(decode(data)))


def test_harmless_damage_decodes_with_pillow() -> None:
    """Junk between segments is a mere warning for Pillow; libjpeg-turbo's strict mode would drop the picture."""
    data = encoded(photograph(), "JPEG")
    junk = data[:-2] + b"\x00\x00\x00" + data[-2:]
    np.testing.assert_array_equal(open_picture(junk).pixels(1)[0], np.asarray(decode(junk)))


@pytest.mark.parametrize("keep", [0.5, 0.97])
def test_truncated_files_are_bad(library: str, keep: float) -> None:
    data = encoded(photograph(), "JPEG")
    with pytest.raises(BadImage, match="truncated"):
        open_picture(data[: int(len(data) * keep)]).pixels(2)


def test_jpeg_of_a_thousand_scans_is_bad() -> None:
    data = encoded(photograph(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[scan:-2] * 300 + data[-2:]
    for use in (open_picture, decode):  # training, and `shards create` and `verify`
        with pytest.raises(BadImage, match="scans"):
            use(bomb)
    with pytest.raises(BadImage, match="empty"):
        open_picture(b"")
