"""Compass search on a grid of learning rates, the same for every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator

Place = tuple[int, ...]


def search(
    done: dict[Place, float],
    start: Place,
    points: int,
    allowed: Callable[[Place], bool] = lambda place: True,
    strides: tuple[int, ...] = (2, 1),
) -> Generator[Place, float, None]:
    """Yield places to measure and take their losses, until `done` holds `points` of them.

    Args:
        done: what was measured before; what is sent is added, in place.
        start: where to begin.
        allowed: whether there is such a place.
        strides: steps of the grid, one after the other; 2 is a factor of 3.
    """
    for place in wanted(done, start, strides):
        if len(done) >= points:
            return
        if place not in done and allowed(place):
            done[place] = yield place


def wanted(
    done: dict[Place, float], start: Place, strides: tuple[int, ...] = (2, 1)
) -> Iterator[Place]:
    """Yield the places of a compass search, in view of what was measured so far.

    Both neighbours on each axis, then on from the best; the next stride comes when nothing is
    better; what is left goes to the diagonals of the first two axes.
    """
    yield start
    for stride in strides:
        before: Place | None = None
        while before != (before := best(done)):
            for axis in range(len(start)):
                at = best(done)
                for step in (stride, -stride):
                    yield moved(at, {axis: step})
    at = best(done)
    for stride in (1, 2):
        for first, second in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
            yield moved(at, {0: stride * first, 1: stride * second})


def descend(done: dict[Place, float], points: int) -> Generator[Place, float, None]:
    """Yield lower places than the best as long as they are better, until there are `points`.

    First down the second axis with a stride of 2, then down the first with a stride of 1: larger
    models want smaller rates than those that a search began at, of the rest most of all.
    """
    for axis, stride in ((1, 2), (0, 1)):
        here = best(done)
        while len(done) < points:
            below = moved(here, {axis: -stride})
            if below not in done:
                done[below] = yield below
            if best(done) == here:
                break
            here = best(done)


def moved(place: Place, by: dict[int, int]) -> Place:
    """Return a place some steps away on some axes."""
    return tuple(at + by.get(axis, 0) for axis, at in enumerate(place))


def best(done: dict[Place, float]) -> Place:
    """Return the place with the least loss; a diverged run is never it."""
    return min(done, key=lambda place: done[place] if math.isfinite(done[place]) else math.inf)


def value(place: int) -> float:
    """The rate at a place of the grid: 1, 1.7, 3, 5.5 times a power of ten; 0 is 1."""
    return float(f"{(1, 1.7, 3, 5.5)[place % 4]}e{place // 4}")


def index(rate: float) -> int:
    """The place of the grid that is nearest to a rate."""
    return round(4 * math.log10(rate))
