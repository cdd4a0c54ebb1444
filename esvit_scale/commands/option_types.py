"""Types of the shard commands' options, each with a one-line error that shows a right value."""

import argparse
import re


def size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text.upper())
    number = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500M or 2G, got {text!r}")
    return number


def part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 ≤ I ≤ N (the first of four parts is 1/4), got {text!r}")
    return int(match[1]), int(match[2])


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a fraction between 0 and 1, such as 0.01, got {text!r}")
    return value


def quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"expected a quality of 1..100, got {text!r}")
    return int(text)


def distance(text: str) -> int:
    if not text.isdecimal() or int(text) > 7:
        raise argparse.ArgumentTypeError(f"expected 0..7 bits, got {text!r}")
    return int(text)


def channels(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"expected 1..16 channels, got {text!r}")
    return int(text)


def bands(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?,[1-9]\d?)?", text):
        raise argparse.ArgumentTypeError(f"expected one or three channel numbers from 1, such as 4,3,2, got {text!r}")
    return tuple(map(int, text.split(",")))
