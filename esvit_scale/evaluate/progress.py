"""How far a long evaluation is: a bar with rate and ETA on a terminal, otherwise a line every ten seconds."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from esvit_scale.parallel import collectives

T = TypeVar("T")
EVERY = 10  # seconds


def progress(
    items: Iterable[T], name: str, total: int, unit: str, count: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Passes the items on, and tells on rank 0; an item counts for `count(item)` of `total` units."""
    if collectives.rank() != 0:
        yield from items
        return
    live = sys.stderr.isatty()
    start = told = time.monotonic()
    done = 0
    with tqdm(desc=name, total=total, unit=f" {unit}", disable=not live, leave=False) as bar:
        for item in items:
            yield item
            done += count(item)
            bar.update(count(item))
            now = time.monotonic()
            if not live and now - told > EVERY:
                told, rate = now, done / (now - start)
                left = max(0, total - done) / rate if rate else float("inf")
                print(f"{name}: {done}/{total} {unit} · {rate:.3g} {unit}/s · ETA {left:.0f} s", file=sys.stderr)
