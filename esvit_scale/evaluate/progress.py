"""Progress display, on rank 0, for a loop that all ranks run together."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from esvit_scale.parallel import collectives
from esvit_scale.progress import Progress

T = TypeVar("T")


def progress(
    items: Iterable[T], name: str, total: int, unit: str, count: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield the items, and display on rank 0 how many of `total` units are done; an item is `count(item)` units."""
    if collectives.rank() != 0:
        yield from items
        return
    done = 0
    with Progress(total, unit, name, keep=False) as display:
        for item in items:
            yield item
            done += count(item)
            display.to(done)
