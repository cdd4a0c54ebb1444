"""Re-encoding of image files to a smaller size or another format; by default a file's bytes are kept."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

QUALITY = 90  # default of --quality where images are re-encoded
PILLOW = {"jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}
ENDINGS = {"jpeg": "jpg", "webp": "webp", "png": "png"}
CHOICES: dict[str, Literal["jpeg", "png", "webp"] | None] = {
    "jpg": "jpeg",
    "jpeg": "jpeg",
    "png": "png",
    "webp": "webp",
    "keep": None,
}  # choices of --format


@dataclass(frozen=True)
class Reencode:
    """The settings of re-encoding. With `short_side` alone, images that are small enough keep their bytes.

    Args:
        short_side: largest shorter side in pixels; larger images are shrunk to it (Lanczos), none is enlarged.
        quality: 1..100, for JPEG and WebP (PNG is lossless); if given, every image is re-encoded.
        format: `jpeg`, `png` or `webp`; if given, every image is re-encoded, even one that has this format already.
    """

    short_side: int | None = None
    quality: int | None = None
    format: Literal["jpeg", "png", "webp"] | None = None

    def __bool__(self) -> bool:
        return any((self.short_side, self.quality, self.format))

    def apply(self, image: Image.Image, data: bytes, ext: str) -> tuple[bytes, str]:
        """Return the bytes to store for an RGB image that was decoded from `data`, and their extension."""
        resized = self._resized(image)
        if resized is image and not (self.quality or self.format):
            return data, ext
        kind = self.format or ("webp" if ext == "webp" else "jpeg")
        out = io.BytesIO()
        resized.save(out, PILLOW[kind], **({} if kind == "png" else {"quality": self.quality or QUALITY}))
        return out.getvalue(), ENDINGS[kind]

    def _resized(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        if not self.short_side or short <= self.short_side:
            return image
        width, height = (max(round(side * self.short_side / short), self.short_side) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


KEEP_BYTES = Reencode()
