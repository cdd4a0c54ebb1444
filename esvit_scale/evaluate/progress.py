"""Progress of a loop that all ranks run together, displayed by rank 0."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from esvit_scale.parallel import collectives
from esvit_scale.progress import Progress

T = TypeVar("T")


def progress(
    items: Iterable[T], name: str, total: int, unit: str, count: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yield the items and display the progress on rank 0; an item counts for `count(item)` of `total` units."""
    if collectives.rank() != 0:
        yield from items
        return
    done = 0
    with Progress(total, unit, name, keep=False) as display:
        for item in items:
            yield item
            done += count(item)
            display.to(done)
