"""Orientations that img2dataset drops from the file and notes in the sample's json."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_scale import cli
from esvit_scale.data import shard_repair
from esvit_scale.data.decode import decode
from esvit_scale.data.evaluation import items_of
from esvit_scale.data.noted_orientation import noted, oriented
from tests.data.conftest import encoded, picture

WORDS = {  # exifread's, of EXIF orientation 1 to 8
    1: "Horizontal (normal)",
    2: "Mirrored horizontal",
    3: "Rotated 180",
    4: "Mirrored vertical",
    5: "Mirrored horizontal then rotated 90 CCW",
    6: "Rotated 90 CW",
    7: "Mirrored horizontal then rotated 90 CW",
    8: "Rotated 90 CCW",
}


def metadata(orientation: int) -> bytes:
    exif = json.dumps({"Image Make": "Canon", "Image Orientation": WORDS[orientation]})
    return json.dumps({"key": "0", "status": "success", "exif": exif}).encode()


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    pixels = pixels.transpose(1, 0, 2) if orientation > 4 else pixels
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "WEBP with alpha"])
def test_orientation_tag_turns_every_format(kind: str, orientation: int) -> None:
    image = picture(0, 32, 16)
    options = {"WEBP": {"lossless": True}, "WEBP with alpha": {"lossless": True}}.get(kind, {})
    data = encoded(image.convert("RGBA") if "alpha" in kind else image, kind[:4], **options)
    found = oriented(data, noted(metadata(orientation)))
    np.testing.assert_array_equal(np.asarray(decode(found)), upright(np.asarray(decode(data)), orientation))
    assert oriented(found, 6) == found or orientation == 1  # it has its own


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"exif": null}', b'{"exif": "{}"}', b'{"exif": "x"}', b"\xff", None]
)
def test_json_without_orientation_means_upright(text: bytes | None) -> None:
    assert noted(text) == 1


def test_rotated_images_of_a_source_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / "00000.tar", "w") as tar:
        for i in range(6):
            for ext, content in (("jpg", encoded(picture(i, 32, 16), "JPEG")), ("json", metadata([1, 6, 3][i % 3]))):
                info = tarfile.TarInfo(f"{i:05d}.{ext}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    (source / "00000_stats.json").write_text(json.dumps({"count": 6, "successes": 6}))
    options = ["--rotate-as-noted", "--workers", "1"]
    assert cli.main(["shards", "create", str(source), str(tmp_path / "a"), "--from", "img2dataset", *options]) == 0
    assert "turned 4 images to the orientation that their json records" in capsys.readouterr().err
    assert shard_repair.recorded_options(tmp_path / "a")["recipe"]["rotate_as_noted"] is True
    items = items_of(tmp_path / "a")
    for number in range(6):
        key, _, data = items.read(number)
        orientation = [1, 6, 3][int(key[-5:]) % 3]
        stored = np.asarray(Image.open(io.BytesIO(encoded(picture(int(key[-5:]), 32, 16), "JPEG"))))
        np.testing.assert_array_equal(np.asarray(decode(data)), upright(stored, orientation))
    assert cli.main(["shards", "create", str(source), str(tmp_path / "b"), *options]) == 2
    assert "--from img2dataset" in capsys.readouterr().err
    assert cli.main(["shards", "create", str(source), str(tmp_path / "b"), "--workers", "1"]) == 0
    assert "rotate_as_noted" not in shard_repair.recorded_options(tmp_path / "b")["recipe"]
