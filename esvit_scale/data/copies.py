"""Images for copy detection: distorted copies that are drawn by a sample's key, the Copydays layout, and reading.

A copy is derived from its image alone and (seed, attack, key), so that every rank, process and run makes the same one:

    crop     20 to 50 % of the area are kept
    jpeg     JPEG of quality 3 to 20
    strong   all of: a crop, mirroring, rotation, change of colours, one of blur, mosaic and noise, another background,
             patches and a line of text on top, and JPEG of quality 5 to 25; some of them only now and then

Copydays (INRIA) is recognised by its folders: `original/`, and any of `strong/`, `jpegqual/N/` and `crops/N/`. Names that
begin with the same four characters belong to the same original.
"""

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from torch.utils.data import get_worker_info

from esvit_scale.data.bad_image import BadImage
from esvit_scale.data.decode import decode
from esvit_scale.data.evaluation import Items, items_of
from esvit_scale.data.hashing import derive_seed
from esvit_scale.data.loader import reason, run_stages
from esvit_scale.errors import UserError

log = logging.getLogger(__name__)

LONGEST_SIDE = 512  # pixels to which an image is reduced before it is distorted, as strengths are in pixels of that
COPYDAYS_PREFIX = 4  # characters that copies and their original share

Rng = np.random.Generator


class Attack(NamedTuple):
    """Copies to search originals for: which images are copied, and which original is the right one for each."""

    name: str
    source: Path
    numbers: Sequence[int]  # of the images in `source`
    originals: Sequence[int]  # for each of them, its original's number in the set of originals
    distort: str | None  # one of DISTORTIONS; None: the images are copies already


class SquareImage(NamedTuple):
    """An image as the trunk sees it."""

    number: int  # place in its source
    key: str
    pixels: NDArray[np.uint8]  # [S, S, 3]


def is_copydays(folder: Path) -> bool:
    """Return whether a folder has the layout of Copydays."""
    return (folder / "original").is_dir() and bool(_copydays_blocks(folder))


def copydays_attacks(folder: Path) -> list[Attack]:
    """Return the blocks of copies of a Copydays folder: strong first, then JPEG qualities and crops by their number.

    Raises:
        UserError: a folder holds no image, two originals begin with the same four characters, or a copy has no original.
    """
    originals = items_of(folder / "original", notes=False)
    number: dict[str, int] = {}
    for i in range(len(originals)):
        prefix = originals.key(i)[:COPYDAYS_PREFIX]
        if prefix in number:
            raise UserError(
                f"{folder / 'original' / originals.key(i)}: begins like {originals.key(number[prefix])}; the first "
                f"{COPYDAYS_PREFIX} characters name an original"
            )
        number[prefix] = i
    attacks = []
    for name in _copydays_blocks(folder):
        copies = items_of(folder / name, notes=False)
        keys = [copies.key(i) for i in range(len(copies))]
        lost = [key for key in keys if key[:COPYDAYS_PREFIX] not in number]
        if lost:
            raise UserError(
                f"{folder / name / lost[0]}: no image in original/ begins with {lost[0][:COPYDAYS_PREFIX]!r}"
            )
        of_copies = [number[key[:COPYDAYS_PREFIX]] for key in keys]
        attacks.append(Attack(name, folder / name, range(len(keys)), of_copies, None))
    return attacks


def generated_attacks(source: Path, kinds: Sequence[str], most: int) -> list[Attack]:
    """Return an attack of every kind on at most `most` images of a set, evenly spaced.

    Raises:
        UserError: the set has fewer than two images.
    """
    n = len(items_of(source, notes=False))
    if n < 2:
        raise UserError(f"{source}: one image; copy detection needs two or more to search")
    numbers = np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int)).tolist()
    return [Attack(kind, source, numbers, numbers, kind) for kind in kinds]


def square_images(
    source: Path, numbers: Sequence[int], distort: str | None, size: int, seed: int, workers: int
) -> Iterator[SquareImage]:
    """Yield images of a set in the order of `numbers`, distorted if asked for, each resized as a whole to a square.

    Images that cannot be read are left out, with a warning.
    """
    stage = partial(_read_part, items_of(source, notes=False), str(source), numbers, distort, size, seed)
    return run_stages([stage], min(workers, len(numbers)))


def distorted(image: Image.Image, kind: str, seed: int, key: str) -> Image.Image:
    """Return a copy of an RGB image; the same for the same (seed, kind, key) and image.

    Args:
        kind: one of DISTORTIONS.
        key: key of the sample.
    """
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.BICUBIC)
    return DISTORTIONS[kind](small, np.random.default_rng(derive_seed(seed, "copy", kind, key)))


# --- distortions -----------------------------------------------------------------------------------------------------


def _cropped(image: Image.Image, rng: Rng, least: float = 0.2, most: float = 0.5) -> Image.Image:
    """Return a rectangle with `least` to `most` of the area and up to a third more of one side's share."""
    area, aspect = rng.uniform(least, most), np.exp(rng.uniform(-0.3, 0.3))
    width = max(1, round(image.width * min(1.0, np.sqrt(area * aspect))))
    height = max(1, round(image.height * min(1.0, np.sqrt(area / aspect))))
    left, top = (int(rng.integers(0, room + 1)) for room in (image.width - width, image.height - height))
    return image.crop((left, top, left + width, top + height))


def _jpeg(image: Image.Image, rng: Rng, least: int = 3, most: int = 20) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=int(rng.integers(least, most + 1)))
    return Image.open(out).convert("RGB")


def _strong(image: Image.Image, rng: Rng) -> Image.Image:
    image = _cropped(image, rng, 0.3, 0.7)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True, fillcolor=_colour(rng))
    for enhance, low, high in (
        (ImageEnhance.Brightness, 0.5, 1.6),
        (ImageEnhance.Contrast, 0.5, 1.6),
        (ImageEnhance.Color, 0.0, 2.0),
    ):
        image = enhance(image).enhance(float(rng.uniform(low, high)))
    image = (_blurred, _mosaic, _noisy)[rng.integers(3)](image, rng)
    if rng.random() < 0.5:
        image = _on_background(image, rng)
    return _jpeg(_painted(image, rng), rng, 5, 25)


def _blurred(image: Image.Image, rng: Rng) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(image.size) * rng.uniform(0.005, 0.02)))


def _mosaic(image: Image.Image, rng: Rng) -> Image.Image:
    cells = int(rng.integers(32, 65))
    small = image.resize((min(cells, image.width), min(cells, image.height)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _noisy(image: Image.Image, rng: Rng) -> Image.Image:
    pixels = np.asarray(image) + rng.normal(0, rng.uniform(15, 40), (image.height, image.width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _on_background(image: Image.Image, rng: Rng) -> Image.Image:
    """Return the image on a larger canvas of smooth random colours, of which it covers 40 to 70 %."""
    side = 1 / np.sqrt(rng.uniform(0.4, 0.7))
    size = round(image.width * side), round(image.height * side)
    patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    canvas = patches.resize(size, Image.Resampling.BICUBIC)
    at = tuple(int(rng.integers(0, room + 1)) for room in (size[0] - image.width, size[1] - image.height))
    canvas.paste(image, (at[0], at[1]))
    return canvas


def _painted(image: Image.Image, rng: Rng) -> Image.Image:
    """Return the image with one to three rectangles and a line of text on top."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        width, height = (max(1, round(side * rng.uniform(0.1, 0.35))) for side in image.size)
        left, top = (
            int(rng.integers(0, side - part + 1)) for side, part in zip(image.size, (width, height), strict=True)
        )
        pen.rectangle((left, top, left + width, top + height), fill=_colour(rng))
    letters = "".join(chr(c) for c in rng.integers(ord("A"), ord("Z") + 1, 12))
    font = ImageFont.load_default(max(8, image.height // int(rng.integers(6, 12))))
    pen.text((0, rng.uniform(0, 0.8) * image.height), letters, fill=_colour(rng), font=font)
    return image


def _colour(rng: Rng) -> tuple[int, int, int]:
    red, green, blue = (int(c) for c in rng.integers(0, 256, 3))
    return red, green, blue


DISTORTIONS: dict[str, Callable[[Image.Image, Rng], Image.Image]] = {
    "crop": _cropped,
    "jpeg": _jpeg,
    "strong": _strong,
}


# --- reading ---------------------------------------------------------------------------------------------------------


def _copydays_blocks(folder: Path) -> list[str]:
    found = ["strong"] if (folder / "strong").is_dir() else []
    for group in ("jpegqual", "crops"):
        named = [p.name for p in folder.glob(f"{group}/*") if p.is_dir() and p.name.isdecimal()]
        found += [f"{group}/{name}" for name in sorted(named, key=int)]
    return found


def _read_part(
    items: Items, source: str, numbers: Sequence[int], distort: str | None, size: int, seed: int
) -> Iterator[SquareImage]:
    info = get_worker_info()
    worker, workers = (info.id, info.num_workers) if info else (0, 1)
    for number in numbers[worker::workers]:
        try:
            key, _, data = items.read(number)
            image = decode(data)
        except (BadImage, OSError) as error:
            log.warning(f"{source}/{items.name(number)}: left out: {reason(error)}")
            continue
        if distort is not None:
            image = distorted(image, distort, seed, key)
        yield SquareImage(number, key, np.array(image.resize((size, size), Image.Resampling.BICUBIC)))
    items.close()
