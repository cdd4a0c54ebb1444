"""Argparse types of options: each converts a text, or raises an error that shows a valid value."""

import argparse
import math
import re
from pathlib import Path

from esvit_scale.store_urls import address_meant, is_set_url, protocol


class SetUrl(str):
    """The URL of a shard set in an object store; cli.py replaces it by the set's folder in the node's cache."""


def set_or_folder(text: str) -> "Path | SetUrl":
    """Convert the place of a shard set or folder of images, a path or the URL of a set."""
    return SetUrl(text) if is_set_url(_as_typed(text)) else Path(text)


def destination(text: str) -> Path | str:
    """Convert the place to write a shard set to: a folder's path, or its URL in a store, which stays a text."""
    return text.rstrip("/") if is_set_url(_as_typed(text)) else Path(text)


def local_path(text: str) -> Path:
    """Convert the path of a file or folder; the address of a store, which would become a folder `s3:`, is refused."""
    if protocol(_as_typed(text)):
        raise argparse.ArgumentTypeError(
            f"{text}: not an address but a path is needed; a folder of this name would be ./{text}"
        )
    return Path(text)


def _as_typed(text: str) -> str:
    """Return the text, or refuse a mistyped address, which would otherwise become a folder of that name."""
    if meant := address_meant(text):
        raise argparse.ArgumentTypeError(f"{text}: did you mean {meant}? A path of this name is ./{text}")
    return text


def local_folder(text: str) -> Path:
    """Convert a folder that batch jobs write to; the address of a store is refused."""
    if is_set_url(_as_typed(text)):
        raise argparse.ArgumentTypeError(
            f"{text}: the shipped script writes to a folder; for a store run `esvit-scale shards create … {text} "
            "--shard-range I/N` in jobs of your own, then `esvit-scale shards merge`"
        )
    return Path(text)


def size(text: str) -> int:
    """Convert a size such as 500M or 2G (powers of 1000) to bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.upper())
    number = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500M or 2G, got {text!r}")
    return number


def rate(text: str) -> float:
    """Convert a rate, in the unit that the option's help names, to a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, without a unit, got {text!r}")
    return number


def part(text: str) -> tuple[int, int]:
    """Convert I/N (part I of N parts) to two integers."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 ≤ I ≤ N (the first of four parts is 1/4), got {text!r}")
    return int(match[1]), int(match[2])


def fraction(text: str) -> float:
    """Convert a fraction between 0 and 1, both excluded, to a float."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, such as 0.01, got {text!r}")
    return value


def quality(text: str) -> int:
    """Convert a JPEG or WebP quality of 1 to 100 to an integer."""
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"expected a quality of 1..100, got {text!r}")
    return int(text)


def distance(text: str) -> int:
    """Convert a Hamming distance of 0 to 7 bits between image hashes to an integer."""
    if not text.isdecimal() or int(text) > 7:
        raise argparse.ArgumentTypeError(f"expected 0..7 bits, got {text!r}")
    return int(text)


def channels(text: str) -> int:
    """Convert a number of 1 to 16 channels to an integer."""
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"expected 1..16 channels, got {text!r}")
    return int(text)


def bands(text: str) -> tuple[int, ...]:
    """Convert one or three comma-separated channel numbers to a tuple."""
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?,[1-9]\d?)?", text):
        raise argparse.ArgumentTypeError(f"expected one or three channel numbers from 1, such as 4,3,2, got {text!r}")
    return tuple(map(int, text.split(",")))
