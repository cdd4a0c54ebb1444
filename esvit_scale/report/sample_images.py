"""Sample images for the report: crops of a few training samples, and test samples beside their nearest neighbours."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from esvit_scale.config import Config
from esvit_scale.data import decode, image_folder, photometric, raster, stream
from esvit_scale.data import manifest as manifests
from esvit_scale.data.pixel_format import PixelFormat, pixel_format
from esvit_scale.data.remote import place
from esvit_scale.data.remote.few_images import encoded_images
from esvit_scale.errors import UserError
from esvit_scale.report.false_colour import composite

CROPPED_IMAGES = 5  # number of images whose crops a report shows
SHEET_IMAGES = 8  # number of images whose crops `pretrain --show-crops` draws
CELL_SIDE = 224  # pixels of the largest crop on that sheet
THUMBNAIL_SIDE = 208  # pixels of a thumbnail's longer side, twice its size on the page
SMALL_SIDE = 64  # pictures up to this size are shown pixel by pixel, enlarged by a whole factor


class Thumbnail(NamedTuple):
    """A picture of the page. A small one is shown pixel by pixel, at a width that is a multiple of its own."""

    uri: str  # data URI
    size: str  # of the original, such as "28 × 28 pixels"
    width: int | None = None  # in pixels of the page; None: it fills its place


class CropGrid(NamedTuple):
    """Crops of a few images, a row for each image."""

    columns: list[str]
    rows: list[list[Thumbnail]]  # a row for each image, a column for each crop


class Neighbour(NamedTuple):
    """A training sample near a test sample."""

    image: Thumbnail
    label: str
    similarity: float
    right: bool  # whether it is of the query's class


class Query(NamedTuple):
    """A test sample and its nearest training samples."""

    image: Thumbnail
    label: str
    neighbours: list[Neighbour]


def crop_grid(config: Config) -> CropGrid:
    """Return the crops of a few training samples as the first epoch sees them, with the augmentations of training.

    Raises:
        UserError: the training set no longer exists.
        StoreUnreachable: it lies in a store that does not answer.
    """
    columns = [[thumbnail(image, 128) for image in column] for column in _augmented_crops(config, CROPPED_IMAGES)]
    return CropGrid(_crop_names(len(columns)), [list(row) for row in zip(*columns, strict=True)])


def crop_sheet(config: Config, images: int = SHEET_IMAGES) -> bytes:
    """Return a PNG of the crops that the first step trains on: a row for each of some images, with mean and std undone.

    Raises:
        UserError: the training data cannot be read.
    """
    columns = _augmented_crops(config, images)
    widths = _sheet_widths([column[0].width for column in columns])
    sheet = Image.new("RGB", (sum(widths) + 8 * (len(widths) + 1), 24 + (max(widths) + 8) * len(columns[0])), "white")
    draw, x = ImageDraw.Draw(sheet), 8
    for name, column, width in zip(_crop_names(len(columns)), columns, widths, strict=True):
        draw.text((x, 6), name, fill="black")
        for row, image in enumerate(column):
            sheet.paste(_resized(image, width), (x, 24 + row * (max(widths) + 8)))
        x += width + 8
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _sheet_widths(sides: list[int]) -> list[int]:
    """Return the widths in pixels at which crops of these sides are drawn: small ones are all enlarged by one factor."""
    small = [side for side in sides if side <= SMALL_SIDE]
    cell = CELL_SIDE if len(small) == len(sides) else min(CELL_SIDE, max(sides))
    factor = max(1, cell // max(small, default=cell))
    return [side * factor if side in small else min(CELL_SIDE, side) for side in sides]


def _resized(image: Image.Image, width: int) -> Image.Image:
    how = Image.Resampling.NEAREST if width % image.width == 0 else Image.Resampling.BICUBIC
    return image.resize((width, width), how)


def _crop_names(crops: int) -> list[str]:
    return ["global 1", "global 2", *(f"local {i + 1}" for i in range(crops - 2))]


def _augmented_crops(config: Config, images: int) -> list[list[Image.Image]]:
    """Return the augmented crops of the first `images` samples of training as pictures: a list for each crop."""
    train = config.train.model_copy(update={"global_batch": images, "grad_accum": 1})
    data = config.data.model_copy(update={"workers": 0, "slots": None})
    small = config.model_copy(update={"train": train, "data": data})
    batch = next(iter(stream.batches(small, stream.open_data(config), 0, 1, 0, 1)))
    pixels = pixel_format(config.data)
    columns, first = [], 0
    for group in batch.crops:  # uint8 or uint16 [V_g, B, C, S, S]
        views = len(group)
        augmented = photometric.apply(group.flatten(0, 1), batch.photometric.crops(first, first + views), pixels)
        columns += [[unnormalized(image, pixels) for image in view] for view in augmented.unflatten(0, group.shape[:2])]
        first += views
    return columns


def neighbour_rows(result: Mapping[str, Any]) -> list[Query]:
    """Return the test samples that a knn.json recorded as examples, and their nearest neighbours, with the images.

    Raises:
        UserError: one of its two sets no longer exists, or does not hold a recorded sample.
        StoreUnreachable: one of them lies in a store that does not answer.
    """
    examples = result["examples"]
    test, train = (place.local_folder(result[name]) for name in ("test", "train"))
    queries = images_by_key(test, {e["key"] for e in examples})
    bank = images_by_key(train, {n["key"] for e in examples for n in e["neighbours"]})
    return [
        Query(
            thumbnail(queries[e["key"]]),
            e["class"],
            [
                Neighbour(thumbnail(bank[n["key"]]), n["class"], n["similarity"], n["class"] == e["class"])
                for n in e["neighbours"]
            ],
        )
        for e in examples
    ]


def images_by_key(source: Path, keys: set[str]) -> dict[str, Image.Image]:
    """Return the images of a few samples of a shard set or an image folder, by key.

    Raises:
        UserError: the set does not exist, or does not hold one of the samples.
    """
    found = {key: _picture(data) for key, data in _encoded(source, keys).items()}
    missing = sorted(keys - found.keys())
    if missing:
        raise UserError(f"{source}: holds no sample {missing[0]!r}")
    return found


def _encoded(source: Path, keys: set[str]) -> dict[str, bytes]:
    if manifests.is_shard_set(source):
        return encoded_images(manifests.load(source), keys)
    names = {image_folder.printable(file.path): file.path for file in image_folder.list_images(source).files}
    return {key: (source / names[key]).read_bytes() for key in keys & names.keys()}


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """Return a small picture enlarged by the largest whole factor at which it fits `side`, without interpolation.

    Others are returned as they are.
    """
    longest = max(image.size)
    factor = side // longest if longest <= SMALL_SIDE else 1
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST) if factor > 1 else image


def thumbnail(image: Image.Image, most: int = 88) -> Thumbnail:
    """Return a picture for the page: a small one as it is (PNG), others as JPEG of at most THUMBNAIL_SIDE pixels.

    Args:
        most: largest width of a small one on the page.
    """
    size, longest = f"{image.width} × {image.height} pixels", max(image.size)
    if longest <= SMALL_SIDE:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="PNG", optimize=True)
        return Thumbnail(data_uri(buffer.getvalue(), "image/png"), size, image.width * max(1, most // longest))
    image = image.copy()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=90, subsampling=0)
    return Thumbnail(data_uri(buffer.getvalue(), "image/jpeg"), size)


def data_uri(content: bytes, mime: str) -> str:
    """Return the content of a file as a data URI."""
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _picture(data: bytes) -> Image.Image:
    """Decode an image file to an RGB picture; images that are not 8-bit RGB are shown in false colours."""
    try:
        return decode.decode(data)
    except decode.BadImage:
        if not raster.is_raster(data):
            raise
    return composite(raster.read(data))


def unnormalized(image: Tensor, pixels: PixelFormat) -> Image.Image:
    """Undo the normalisation of a crop [C, S, S] and return it as a picture."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pixels.mean, pixels.std))
    values = (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)  # [S, S, C]
    if not pixels.is_rgb8:
        return composite(values.numpy(), stretch=pixels.bits == 16)
    return Image.fromarray(np.ascontiguousarray(values.mul(255).round().byte().numpy()))
