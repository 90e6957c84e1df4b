"""Few rows in which every two values of different parameters meet, in place of all products."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return rows with a value of each axis, such that every pair of values of two axes is in one.

    Greedy and the same at every call: a row begins with the first pair that is missing, and takes
    of each other axis the value that brings the most missing pairs.
    """
    if len(axes) == 1:
        return [(value,) for value in axes[0]]
    sizes = [range(len(axis)) for axis in axes]
    missing = {
        ((i, a), (j, b)): None
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(sizes[i], sizes[j])
    }
    rows = []
    while missing:
        chosen = dict(next(iter(missing)))
        for axis in range(len(axes)):
            if axis in chosen:
                continue

            def gain(value: int, axis: int = axis, chosen: dict[int, int] = chosen) -> int:
                pairs = (sorted([(axis, value), other]) for other in chosen.items())
                return sum(tuple(pair) in missing for pair in pairs)

            chosen[axis] = max(sizes[axis], key=gain)
        for pair in itertools.combinations(sorted(chosen.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(axes[axis][chosen[axis]] for axis in range(len(axes))))
    return rows


def crossed(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by `pairwise` rows of named axes; the longest axis first reads best."""
    rows = [
        pytest.param(*row, id="-".join(map(word, row)))
        for row in pairwise(*map(tuple, axes.values()))
    ]
    return pytest.mark.parametrize(tuple(axes), rows)


def in_turn(many: Iterable[Any], *ways: Any, every: Iterable[Any] = ()) -> list[tuple[Any, ...]]:
    """Return rows of each of many things with one of some ways, in turn; of some with every way."""
    every, listed = list(every), list(many)
    assert all(one in listed for one in every)
    tuples = [way if isinstance(way, tuple) else (way,) for way in ways]
    rows = [(one, *way) for one in every for way in tuples]
    others = [one for one in listed if one not in every]
    return rows + [(one, *tuples[place % len(ways)]) for place, one in enumerate(others)]


def word(value: Any) -> str:
    """Return what a value is called in the name of a test."""
    return getattr(value, "__name__", str(value)).removeprefix("torch.")
