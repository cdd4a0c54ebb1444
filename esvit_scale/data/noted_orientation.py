"""Image orientations that are recorded in a sample's json instead of in its image file.

img2dataset encodes images again without their EXIF data, leaves the pixels as the camera stored them, and writes what
exifread found into the sample's json: `"exif": "{\\"Image Orientation\\": \\"Rotated 90 CW\\", …}"`. This module puts the
orientation back into the file as a tag, which all readers of this package undo; no pixel is encoded again.
"""

import json
import struct
import zlib

from PIL import Image

from esvit_scale.data.decode import exif_orientation, open_header

_AS_TEXT = {  # exifread's text → EXIF orientation
    "Horizontal (normal)": 1,
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}
_WEBP_EXIF, _WEBP_ALPHA = 0x08, 0x10  # bits of the flags of a VP8X chunk


def noted(metadata: bytes | None) -> int:
    """Return the EXIF orientation (1 to 8) that a sample's json records; 1 when it records none."""
    try:
        exif = json.loads(metadata or b"{}").get("exif") or {}
        exif = json.loads(exif) if isinstance(exif, str) else exif
        return _AS_TEXT.get(str(exif.get("Image Orientation", "")).strip(), 1)
    except (ValueError, AttributeError, RecursionError):
        return 1


def oriented(data: bytes, orientation: int) -> bytes:
    """Return the bytes of an image file with the EXIF tag for an orientation that its source noted elsewhere.

    The tag is added to JPEG, PNG and WebP; pixels are not encoded anew. Other formats, and files that already have the
    tag, come back unchanged.

    Raises:
        BadImage: the header cannot be read.
    """
    image = open_header(data)
    if orientation == 1 or exif_orientation(image) != 1:
        return data
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x0112, 3, 1, orientation) + bytes(4)
    if image.format == "JPEG":
        block = b"Exif\0\0" + tiff
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    if image.format == "PNG":  # inserted after the header chunk
        chunk = b"eXIf" + tiff
        return data[:33] + struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    return _webp(data, image, tiff) if image.format == "WEBP" else data


def _webp(data: bytes, image: Image.Image, tiff: bytes) -> bytes:
    """Return a WebP file with an EXIF chunk appended; a simple file also gets the extended header that announces it."""
    chunks = data[12 : 8 + int.from_bytes(data[4:8], "little")]
    if chunks[:4] == b"VP8X":
        chunks = chunks[:8] + bytes([chunks[8] | _WEBP_EXIF]) + chunks[9:]
    else:
        flags = _WEBP_EXIF | (_WEBP_ALPHA if image.mode == "RGBA" else 0)
        sides = b"".join((side - 1).to_bytes(3, "little") for side in image.size)
        chunks = b"VP8X" + struct.pack("<IB3x", 10, flags) + sides + chunks
    chunks += b"EXIF" + struct.pack("<I", len(tiff)) + tiff + bytes(len(tiff) % 2)
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WEBP" + chunks
