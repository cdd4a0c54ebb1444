"""The shipped presets as rows: size, cost, the data that each suits and its published result, read from its header."""

import re
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.10 does not have it


# Up to how many images, and to what side of the global crops in pixels, `small` is the recipe; docs/recipes.md has the
# measurements. `swin_t` and its relatives were published for ImageNet-1K.
SMALL_IMAGES, SMALL_CROP = 100_000, 40
IMAGENET_IMAGES, IMAGENET_CROP = 1_000_000, 160


class Preset(NamedTuple):
    """One shipped preset, as the comment at the head of its file describes it."""

    name: str
    what: str  # the first sentence: trunk and objective
    parameters: int | None  # of the trunk; None where the header does not say
    gflops: float | None  # per image and step
    suits: str
    expected: str  # the published result, with its conditions


def names() -> list[str]:
    """Return the names of the shipped presets, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def text(name: str) -> str:
    """Return the YAML of a shipped preset."""
    return (_folder() / f"{name}.yaml").read_text("utf-8")


def read(name: str) -> Preset:
    """Return the row of one preset."""
    header = [line.removeprefix("#") for line in re.match(r"(#.*\n)+", text(name))[0].splitlines()]  # type: ignore[index]
    lines = re.sub(r"\n {3,}", " ", "\n".join(header)).split("\n")  # a line that is indented continues the one above
    what = re.sub(r" *\([\d,]+ parameters[^)]*\)", "", lines[0]).strip().rstrip(".")
    whole = "\n".join(lines)
    parameters = re.search(r"([\d,]+) parameters", whole)
    gflops = re.search(r"Cost: ([\d,.]+) GFLOPs", whole)
    suits = re.search(r"^ Suits: (.*)\.$", whole, re.MULTILINE)
    expected = re.search(r"^ Expected[,:] *(.*?)\.?$", whole, re.MULTILINE)
    return Preset(
        name,
        what,
        int(parameters[1].replace(",", "")) if parameters else None,
        float(gflops[1].replace(",", "")) if gflops else None,
        suits[1] if suits else "",
        expected[1] if expected else "",
    )


def published(preset: Preset, measure: str) -> str:
    """Return a preset's published accuracy by a measure ("linear", "k-NN") as text; "–" where none is published."""
    result = preset.expected if preset.expected.startswith("ImageNet-1K") else ""
    found = re.search(rf"{measure} ([\d.]+) %", result)
    return found[1] if found else "–"


def recipe_for(images: int, crop: int) -> str:
    """Return in words which preset fits a training set, or that none was measured on its like.

    Args:
        images: number of images in the set.
        crop: side in pixels of the global crops.
    """
    data = f"{images:,} images in crops of {crop} pixels"
    if images <= SMALL_IMAGES and crop <= SMALL_CROP:
        return f"preset small fits {data} (docs/recipes.md)"
    if images >= IMAGENET_IMAGES and crop >= IMAGENET_CROP:
        return f"presets swin_t to swin_l fit {data}, as published"
    return f"no preset was measured on {data}; docs/recipes.md has rules"


def _folder() -> "Traversable":
    return resources.files("esvit_scale") / "configs"
