import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from esvit_scale.data.decode import BadImage, decode
from tests.data.conftest import encoded, picture


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(0, 32, 16), "JPEG", exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode(data).size == ((32, 16) if orientation < 5 else (16, 32))
    np.testing.assert_array_equal(pixels(decode(data)), np.asarray(expected))


def test_broken_exif_is_ignored() -> None:
    data = encoded(picture(0), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data).size == (20, 16)


def test_cmyk_jpeg_decodes_to_rgb() -> None:
    original = picture(1)
    data = encoded(original.convert("CMYK"), "JPEG", quality=98)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(pixels(decode(data)) - pixels(original)).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    grey = np.linspace(0, 65535, 64 * 8).reshape(8, 64).astype(np.uint16)
    decoded = pixels(decode(encoded(Image.fromarray(grey), kind)))
    assert decoded.min() == 0
    assert decoded.max() == 255
    assert np.abs(decoded[..., 0] - grey / 257).max() <= 0.5
    assert (decoded[..., 0] == decoded[..., 2]).all()


@pytest.mark.parametrize(("bits", "photometric"), [(8, 0), (8, 1), (12, 1), (16, 0), (16, 1)])
def test_tiff_grey_is_black_where_its_photometric_says_black(bits: int, photometric: int) -> None:
    """Photometric 0 is WhiteIsZero: the stored 0 is white."""
    values = np.linspace(0, 2**bits - 1, 64 * 8).round().astype(int).reshape(8, 64)
    if bits == 12:
        stored = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    else:
        stored = b"".join(v.to_bytes(bits // 8, "little") for v in values.ravel().tolist())
    entries = [
        (256, 64),
        (257, 8),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, 8),
        (279, len(stored)),
    ]
    ifd = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(stored)) + stored + ifd + bytes(4)
    grey = np.linspace(0, 255, 64 * 8).reshape(8, 64)
    expected = 255 - grey if photometric == 0 else grey
    assert np.abs(pixels(decode(data))[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("kind", ["planar 16-bit RGB", "big-endian negative"])
def test_tiff_that_pillow_cannot_read_or_reads_wrongly(kind: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 65536, (3, 16, 20), np.uint16)
    out = io.BytesIO()
    if kind == "planar 16-bit RGB":
        tifffile.imwrite(out, values, photometric="rgb", planarconfig="separate")
        expected = values.transpose(1, 2, 0)
    else:
        tifffile.imwrite(out, values[0].astype(">u2"), photometric="miniswhite", byteorder=">")
        expected = 65535 - values[0][:, :, None]
    assert np.abs(pixels(decode(out.getvalue())) - expected / 257).max() <= 0.5


@pytest.mark.parametrize("bands", [2, 5, 13])
def test_bands_are_not_taken_for_a_colour_picture(bands: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    out = io.BytesIO()
    tifffile.imwrite(out, np.zeros((16, 20, bands), np.uint16), photometric="minisblack", planarconfig="contig")
    with pytest.raises(BadImage, match=f"{bands} channels of 16 bits"):
        decode(out.getvalue())


def png_of(header: bytes, rows: bytes) -> bytes:
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_16_bit_rgb_png_decodes_to_8_bits() -> None:
    row = b"\0" + b"".join(struct.pack(">HHH", 65535, i * 4096, 0) for i in range(16))
    data = png_of(struct.pack(">IIBBBBB", 16, 8, 16, 2, 0, 0, 0), row * 8)
    decoded = pixels(decode(data))
    assert (decoded[0, :, 0] == 255).all()
    assert np.abs(decoded[0, :, 1] - np.arange(16) * 16).max() <= 1


def test_palette_grey_bilevel_and_gif_decode_to_rgb() -> None:
    original = picture(2)
    palette = original.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    assert (pixels(decode(encoded(palette))) == np.asarray(palette.convert("RGB"))).all()
    assert (pixels(decode(encoded(palette, "GIF"))) == np.asarray(palette.convert("RGB"))).all()
    grey = original.convert("L")
    assert (pixels(decode(encoded(grey)))[..., 1] == np.asarray(grey)).all()
    assert set(np.unique(pixels(decode(encoded(original.convert("1")))))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_blended_with_white(mode: str) -> None:
    rgba = Image.new("RGBA", (8, 8), (10, 10, 10, 255))
    rgba.paste((10, 10, 10, 0), (0, 0, 4, 8))
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.paste(0, (0, 0, 4, 8))
        image.putpalette([200, 0, 0, 10, 10, 10])
        data = encoded(image, transparency=0)
    else:
        data = encoded(rgba.convert(mode))
    decoded = pixels(decode(data))
    assert (decoded[:, :4] == 255).all()
    assert (decoded[:, 4:] == 10).all()


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60000 x 60000."""
    return png_of(struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), b"\0" * 64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, I am text", "not an image"),
        (encoded(picture(0, 200, 200), "JPEG")[:1500], "truncated"),
        (encoded(picture(0, 200, 200))[:3000], "."),
        (encoded(Image.new("RGB", (1, 1))), "1x1"),
        (encoded(Image.new("RGB", (300, 3))), "300x3"),
        (bomb(), "bomb"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "float"),
        (encoded(Image.fromarray(np.full((8, 8), 1 << 20, np.int32)), "TIFF"), "32-bit integer"),
    ],
)
def test_bad_images_name_their_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value)
    assert str(error.value)


def test_mutated_files_decode_or_are_bad_images() -> None:
    """Nothing else may come out of a decoder, whatever the bytes are."""
    rng = np.random.default_rng(0)
    originals = [
        encoded(picture(i, 40, 30), kind) for i, kind in enumerate(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
    ]
    bad = 0
    for i in range(300):
        data = bytearray(originals[i % len(originals)])
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        try:
            assert decode(bytes(data[: rng.integers(1, len(data) + 1)] if i % 3 == 0 else data)).mode == "RGB"
        except BadImage:
            bad += 1
    assert 50 < bad < 300
